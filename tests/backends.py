"""Says what the tests of an op run on: CPU kernels, CUDA kernels emulated, CUDA kernels.

A test that takes the fixture ``device`` runs once on each that there is:

    def test_sum(shape, device):
        ops.f(torch.zeros(shape, device=device))   # `ops` is specextend.ops, as always

On ``emulated`` the device is "cpu", and the functions of ``specextend.ops`` run the CUDA branch
there; all CPU tensors made in the test are poisoned and end at a page that must not be touched.
Launches follow a schedule drawn from the test's name and printed when it fails;
``SPECEXTEND_EMULATION_SEED=n`` draws others, and the fixture ``schedule`` says which:

    def test_races(device, schedule):
        for kind in KINDS:
            with schedule(kind=kind, seed=3, multiprocessors=2):   # does nothing on other backends
                ...

Cases that say nothing about the kernel or take too long (a thread costs about 0.1 us, and as much
at each barrier or shuffle; an mma costs about 10 us) are marked
``@pytest.mark.not_emulated("why")``; where a loop inside a test is too long, the test asks
``schedule.emulated``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
import os
import pkgutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import emulation
import pytest
import torch
from emulation import KINDS, Library, Schedule

from specextend import _C, ops

BACKENDS = ["cpu", "emulated"] + (["cuda"] if _C.has_cuda and torch.cuda.is_available() else [])


class Scheduler:
    """Changes the schedule of the test that runs: ``with schedule(kind="ahead"):``.

    Attributes:
        emulated: whether there is one to change.
    """

    def __init__(self, library: Library | None = None, drawn: Schedule | None = None):
        self.emulated = library is not None
        self._library = library
        self._drawn = drawn

    @contextlib.contextmanager
    def __call__(self, **changed) -> Iterator[None]:
        if self._library is None:
            yield
            return
        with self._library.schedule(replace(self._drawn, **changed)):
            yield


def for_each(**values: Iterable):
    """Make of a test one test of all combinations of the values that some arguments take:

        @for_each(seed=range(12), right_aligned=[False, True])
        def test_random(seed, right_aligned, device):

    Thousands of tests of a millisecond each cost more to be told apart. On the emulation every
    combination has a schedule of its own, drawn from its name. A failure names the combination.
    """
    combinations = [dict(zip(values, c, strict=True)) for c in itertools.product(*values.values())]

    def decorate(test):
        parameters = inspect.signature(test).parameters
        wanted = [p for name, p in parameters.items() if name not in values]
        if "device" in parameters and "schedule" not in parameters:
            wanted.append(inspect.Parameter("schedule", inspect.Parameter.KEYWORD_ONLY))

        @functools.wraps(test)
        def run(*instance, **fixtures):
            schedule = fixtures.get("schedule", Scheduler())
            given = {name: value for name, value in fixtures.items() if name in parameters}
            for case in combinations:
                name = "-".join(str(value) for value in case.values())
                drawn = draw_schedule(f"{test.__name__}[{name}]")
                with schedule(seed=drawn.seed, kind=drawn.kind):
                    try:
                        test(*instance, **given, **case)
                    except (Exception, pytest.fail.Exception) as error:
                        named = ", ".join(f"{name}={value}" for name, value in case.items())
                        raise AssertionError(f"{test.__name__}, {named}: {error}") from error

        run.__signature__ = inspect.Signature(wanted)
        return run

    return decorate


def capture(function):
    """Return a CUDA graph of a function, and what the function returned.

    It runs once before: a kernel is loaded at its first launch, which a capture may not allow.
    """
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        return graph, function()


def draw_schedule(test: str) -> Schedule:
    """Draw a schedule from a test's name, the same on every machine."""
    base = os.environ.get("SPECEXTEND_EMULATION_SEED", "")
    seed = zlib.crc32((test + base).encode())
    return Schedule(seed, KINDS[seed % len(KINDS)])


def build_or_skip(*args, build=emulation.build_ops) -> Library:
    """Return the ops as ``build`` makes them; what does not compile is a failure."""
    if not (emulation.ROOT / "csrc").is_dir():
        pytest.skip("csrc/ is not part of this installation")
    try:
        return build(*args)
    except emulation.ToolMissing as missing:
        pytest.skip(str(missing))


def _counterpart(op: torch._ops.OpOverload, namespace: str):
    name, overload = op._schema.name.split("::")[1], op._overloadname
    packet = getattr(getattr(torch.ops, namespace), name, None)
    other = op if packet is None else getattr(packet, overload)
    # What has no CUDA kernel has a schema there, and nothing behind it.
    return other if other.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU) else op


@contextlib.contextmanager
def emulated(library: Library, schedule: Schedule) -> Iterator[Scheduler]:
    """Have the functions of ``specextend.ops`` call the library's ops, on guarded memory.

    Ops that the library does not have stay as they are.
    """
    replaced = []
    for info in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"specextend.ops.{info.name}")
        for attribute, op in vars(module).items():
            if isinstance(op, torch._ops.OpOverload) and op.namespace == "specextend":
                replaced.append((module, attribute, op))
    try:
        for module, attribute, op in replaced:
            setattr(module, attribute, _counterpart(op, library.namespace))
        with library.guarded_memory(), library.schedule(schedule):
            yield Scheduler(library, schedule)
    finally:
        for module, attribute, op in replaced:
            setattr(module, attribute, op)
