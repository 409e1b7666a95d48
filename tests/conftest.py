import pytest
import torch

from specextend import _C

DEVICES = ["cpu"] + (["cuda"] if _C.has_cuda and torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device that this build and this machine have."""
    return request.param


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Ops whose CUDA kernels are still to be written are skipped on the GPU."""
    try:
        return (yield)
    except NotImplementedError as error:
        if "no CUDA kernel for it yet" in str(error):
            pytest.skip(str(error))
        raise
