"""Multiplies few rows of a draft by weights as fast as the machine reads them.

A step of a draft is a handful of rows, whose products take the time of their weights' bytes at
best. On a CPU, torch's libraries are made for many rows and take up to three times as long; our own
product (``invariant_linear``) is ahead where the table says so. Its sums come in another order:
that may change what a draft proposes, and never the text.
"""

from __future__ import annotations

import contextlib
import contextvars
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _C, ops
from .switches import Undo, switched

# Rows, from and to, in which our product was measured ahead of torch's (docs/measured.md). For one
# row torch has a way of its own in fp16, and in bf16 where the processor multiplies no bf16; where
# it does, more rows gain less.
_BF16_PRODUCTS = _C.cpu_isa() not in ("baseline", "avx2", "avx512")
_AHEAD = {
    torch.float32: (1, 6),
    torch.bfloat16: (1, 4) if _BF16_PRODUCTS else (2, 6),
    torch.float16: (2, 6),
}

_drafting: contextvars.ContextVar[bool] = contextvars.ContextVar("specextend_few", default=False)


class FewRows:
    """Has the linear layers of models multiply few rows by our product while they draft.

    Only layers of exactly torch's own class whose forward nobody has changed take part, and only in
    threads that are in :meth:`drafting`.
    """

    def __init__(self, *models: nn.Module):
        self._layers = [m for x in models for m in x.modules() if type(m) is nn.Linear]
        self._changes = {("few rows", id(m)): partial(_install, m) for m in self._layers}

    @contextlib.contextmanager
    def drafting(self):
        """Draft, for a ``with`` block without gradients."""
        token = _drafting.set(True)
        try:
            with switched(self._changes):
                yield
        finally:
            _drafting.reset(token)


def _install(layer: nn.Linear) -> Undo:
    if "forward" in vars(layer):
        return lambda: None
    vars(layer)["forward"] = partial(_forward, layer)
    return partial(vars(layer).pop, "forward")


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    if _drafting.get() and weight.device.type == "cpu" and x.dtype == weight.dtype:
        least, most = _AHEAD.get(x.dtype, (1, 0))
        if least <= x.numel() // max(x.shape[-1], 1) <= most:
            return ops.invariant_linear(x, weight, bias)
    return F.linear(x, weight, bias)
