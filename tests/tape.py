"""Stands in for CUDA graphs on the CPU: records the ops of a function, and does them again.

What would break or betray a capture shows here, too: a value read by the host, a tensor made from
host memory, a number that the host computed while recording and that no longer holds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = (
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2",
    "unique_dim", "bincount", "repeat_interleave.Tensor",
)  # fmt: skip


class HostRead(RuntimeError):
    """Raised where a captured function asks for a value, or brings one from the host."""


class _Recording(TorchDispatchMode):
    def __init__(self, tape: list):
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func).split(".", 1)[-1]
        if any(name.startswith(read) for read in _READS):
            raise HostRead(f"{func} waits for the device")
        if name.startswith("lift_fresh") and args[0].dim() > 0:  # a number alone is a constant
            raise HostRead(f"{func} brings a tensor from the host, which waits for the device")
        if name.startswith("index"):
            if any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in _indices(args)):
                raise HostRead(f"{func} with a mask waits for the device")
        out = func(*args, **kwargs)
        self.tape.append((func, args, kwargs, out))
        return out


def _indices(args):
    return args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()


@contextmanager
def _no_lists():
    """Refuse ``tolist`` and ``numpy``, which do not go through the dispatcher."""
    originals = {name: getattr(torch.Tensor, name) for name in ("tolist", "numpy")}

    def refuse(self, *args, **kwargs):
        raise HostRead("a tensor became a Python value")

    for name in originals:
        setattr(torch.Tensor, name, refuse)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)


def _storages(values) -> set[int]:
    return {
        t.untyped_storage().data_ptr() for t in tree_leaves(values) if isinstance(t, torch.Tensor)
    }


def launches(tape: list) -> list[str]:
    """Name the kernels of a tape's ops on a GPU: none for views and for memory that is not filled;
    attention has two."""
    names = []
    for func, args, kwargs, out in tape:
        name = str(func).rsplit(".", 1)[0]
        if name == "specextend.invariant_linear":  # as few rows are multiplied on a CPU
            name = "aten.linear"
        view = not func._schema.is_mutable and _storages(out) <= _storages((args, kwargs))
        if not view and "empty" not in name:
            names += [name] * (2 if name == "specextend.tree_attention" else 1)
    return names


class TapeRecorder:
    """Has the interface of ``specextend.graphs.CudaRecorder``.

    Attributes:
        records, replays: how often each was done.
        tapes: what was recorded, in order.
    """

    def __init__(self):
        self.records, self.replays = 0, 0
        self.tapes: list[list] = []

    def record(self, function: Callable[[], object]):
        self.records += 1
        tape: list = []
        with _no_lists(), _Recording(tape):
            outputs = function()
        self.tapes.append(tape)
        fresh = True  # recording has run the function once, which a capture does not

        def replay() -> None:
            nonlocal fresh
            self.replays += 1
            if fresh:
                fresh = False
                return
            for func, args, kwargs, out in tape:
                inputs = _storages((args, kwargs))
                if not func._schema.is_mutable and _storages(out) <= inputs:
                    continue  # a view
                again = func(*args, **kwargs)
                for kept, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(kept, torch.Tensor) and _storages(kept).isdisjoint(inputs):
                        kept.copy_(new)

        return replay, outputs

    def finish(self) -> None:
        pass


class Tapes(list):
    """Makes the recorders of a ``SpecExtend(..., recorder=tapes)``, and keeps them in order."""

    def __call__(self, device: torch.device) -> TapeRecorder:
        self.append(TapeRecorder())
        return self[-1]
