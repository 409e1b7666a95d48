import pytest
import torch

from specextend import _C

DEVICES = ["cpu"] + (["cuda"] if _C.has_cuda and torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device that this build and this machine have."""
    return request.param
