"""Wraps and documents `invariant_linear`; the fake kernel and the one for CUDA are here too."""

import torch
from torch import Tensor
from torch.nn import functional as F

_invariant_linear = torch.ops.specextend.invariant_linear.default

_BLOCK = 64  # rows of the one shape that a GPU computes


def invariant_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply rows by a weight, so that a row has the same bits whatever rows are beside it.

    Libraries choose an algorithm by the number of rows, and a row's sums then come in another
    order; here an element's order of summation follows from K and the instruction set alone (batch
    invariance: Horace He, "Defeating Nondeterminism in LLM Inference", 2025). Sums are fp32. On the
    CPU a kernel for few rows, as many as trees have: it reads the weight once for each 64 of them.
    On a GPU, rows are padded to blocks of 64, each of which is one product of torch's of the same
    shape; this way has not run on a GPU yet.

    Args:
        x: [..., M, K], fp32, fp16 or bf16, any strides with a unit last one.
        w: [N, K], or [B, N, K] for ``x`` [B, M, K]: a product for each batch. Of x's dtype, with a
            stride of 1 in one of the last two dimensions: row-major, as ``nn.Linear`` has it, or
            the transpose of a row-major [K, N]. The bits are the same for both.
        bias: [N], of x's dtype, added in fp32; None: none.

    Returns:
        [..., M, N] of x's dtype, contiguous. The bits may differ between instruction sets and
        devices. Does not synchronise.

    Example:
        >>> x, w = torch.randn(9, 256), torch.randn(100, 256)  # [M, K], [N, K]
        >>> y = ops.invariant_linear(x, w)
        >>> y.shape, torch.equal(y[3:4], ops.invariant_linear(x[3:4], w))
        (torch.Size([9, 100]), True)
    """
    if w.dim() != 2:
        return _invariant_linear(x, w, bias)
    flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
    y = _invariant_linear(flat, w, bias)
    return y.view(*x.shape[:-1], y.shape[-1])


@torch.library.register_fake("specextend::invariant_linear")
def _(x, w, bias=None):
    return x.new_empty(*x.shape[:-1], w.shape[-2])


def _by_blocks(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = x.shape[-2]
    blocks = F.pad(x, (0, 0, 0, -rows % _BLOCK)).split(_BLOCK, -2)
    y = torch.cat([block @ w.mT for block in blocks] or [x @ w.mT], -2)[..., :rows, :]
    return y.contiguous() if bias is None else y + bias


torch.library.impl("specextend::invariant_linear", "cuda", _by_blocks)
