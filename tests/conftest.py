import logging
import os
import random
from collections import defaultdict
from collections.abc import Iterator

import pytest
from backends import BACKENDS, Scheduler, build_or_skip, draw_schedule, emulated
from emulation import Library, Schedule, build_avx512, build_cpu


class DeprecationsAreErrors(logging.Handler):
    """Raises where `transformers` logs that something is deprecated."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecat" in record.getMessage().lower():
            raise AssertionError(record.getMessage())


def pytest_configure(config: pytest.Config):
    config.addinivalue_line("markers", "not_emulated(why): not to be run on the emulation")
    config.addinivalue_line("markers", "sweep(n): n of its parameters; the others are long")
    logging.getLogger("transformers").addHandler(DeprecationsAreErrors())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Draw, from each sweep, the parameters that every run has, the same ones always; a test that
    is named alone runs."""
    sweeps: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sweep"):
            sweeps[item.nodeid.partition("[")[0]].append(item)
    for name, those in sweeps.items():
        count = those[0].get_closest_marker("sweep").args[0]
        drawn = random.Random(name).sample(those, min(count, len(those)))
        for item in those:
            if item not in drawn:
                item.add_marker("long")


@pytest.fixture(scope="session")
def emulated_library() -> Library:
    """Return the CUDA branch of all ops, compiled for this machine's processor."""
    return build_or_skip("specextend_emulated")


@pytest.fixture(scope="session")
def avx512_library() -> Library:
    """Return the ops on the CPU by AVX-512, its instructions emulated."""
    return build_or_skip("specextend_avx512", build=build_avx512)


@pytest.fixture(scope="session", autouse=True)
def emulated_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run all tests on the CPU by the kernels of SPECEXTEND_EMULATED_ISA=avx512|avx512_bf16|amx;
    with =own, by this processor's, in which tools/mutate.py plants faults."""
    name = os.environ.get("SPECEXTEND_EMULATED_ISA")
    if not name:
        yield
        return
    if name == "own":
        library = build_or_skip("specextend_cpu", build=build_cpu)
    else:
        library = request.getfixturevalue("avx512_library")
        library.use_isa(name)
    with emulated(library, Schedule()):
        yield


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[tuple[str, Scheduler]]:
    """Return each backend of this build and machine, as device and schedule: see backends.py."""
    if request.param != "emulated":
        yield request.param, Scheduler()
        return
    marker = request.node.get_closest_marker("not_emulated")
    if marker is not None:
        pytest.skip(f"not emulated: {marker.args[0]}")
    drawn = draw_schedule(request.node.nodeid)
    print(drawn)  # shown if the test fails
    with emulated(request.getfixturevalue("emulated_library"), drawn) as schedule:
        yield "cpu", schedule


@pytest.fixture
def device(backend) -> str:
    return backend[0]


@pytest.fixture
def schedule(backend) -> Scheduler:
    return backend[1]
