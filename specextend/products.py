"""Multiplies rows by weights with our own product where that is faster than torch's: on a CPU.

A step of a draft, a plain round, a tree: a handful of rows, whose products take the time of their
weights' bytes at best. Torch's libraries are made for many rows and take up to six times as long;
our own product (``invariant_linear``) is ahead for as many rows as the table says. In a dtype of
which torch's library has no products on this machine, it is for any number of rows: a whole prompt.
Its sums are fp32, as theirs, and come in another order.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _C, ops
from .layout import by_rows
from .switches import Undo, switched


def _has_products(dtype: str) -> bool:
    """Tell whether oneDNN, torch's library, multiplies in a dtype on this machine. It does so in
    bf16 from AVX-512 on and in fp16 from AVX-512-FP16 on; elsewhere torch takes plain loops."""
    return getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported", lambda: True)()


# Rows up to which our product was measured ahead of torch's (docs/measured.md).
_BF16_PRODUCTS = _C.cpu_isa() not in ("baseline", "avx2", "avx512")
_MOST = {
    torch.float32: 16,
    torch.float16: 16 if _has_products("fp16") else math.inf,
    torch.bfloat16: (20 if _BF16_PRODUCTS else 16) if _has_products("bf16") else math.inf,
}

_active: contextvars.ContextVar[bool] = contextvars.ContextVar("specextend_products", default=False)


class OwnProducts:
    """Has the linear layers of models multiply by our product where that is faster.

    Layers of exactly torch's own class and weights take part, if nobody has changed their forward;
    and only threads that are in :meth:`active`, on a CPU and without gradients.
    """

    def __init__(self, *models: nn.Module):
        self._layers = [m for x in models for m in x.modules() if type(m) is nn.Linear]
        key = ("products", *(id(x) for x in models))
        self._changes = {key: partial(_install, self._layers)}

    @contextlib.contextmanager
    def active(self):
        """Multiply so for a ``with`` block."""
        token = _active.set(True)
        try:
            with switched(self._changes):
                yield
        finally:
            _active.reset(token)


def _install(layers: list[nn.Linear]) -> Undo:
    changed = [m for m in layers if "forward" not in vars(m)]
    for layer in changed:
        vars(layer)["forward"] = partial(_forward, layer)

    def undo() -> None:
        for layer in changed:
            vars(layer).pop("forward", None)

    return undo


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    ours = _active.get() and x.numel() <= _MOST.get(x.dtype, 0) * x.shape[-1]
    if ours and type(weight) is nn.Parameter and x.device == weight.device:
        if x.is_cpu and x.dtype == weight.dtype and not torch.is_grad_enabled():
            return ops.invariant_linear(by_rows(x), weight, bias)
    return F.linear(x, weight, bias)
