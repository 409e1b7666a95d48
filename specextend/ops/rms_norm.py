"""Wraps and documents `rms_norm` and `add_rms_norm`; their fake kernels are here too."""

import torch
from torch import Tensor

_rms_norm = torch.ops.specextend.rms_norm.default
_add_rms_norm = torch.ops.specextend.add_rms_norm.default


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, round_first: bool = True
) -> Tensor:
    """Divide rows by the root of the mean of their squares, and multiply them by a weight.

    This is RMSNorm (Zhang and Sennrich 2019) as the models of `transformers` compute it, with their
    points of rounding: with ``h = x.float()`` and ``n = h * rsqrt(mean(h * h) + eps)``, in fp32,
    the result is ``weight * n.to(x.dtype)`` (Llama), or, without ``round_first``,
    ``((offset + weight.float()) * n).to(x.dtype)`` (Gemma, whose offset is 1; OLMo 2, where it is
    0).

    Args:
        x: [..., N], fp32, fp16 or bf16, of at most four dimensions, any strides with a unit last
            one.
        weight: [N], of x's dtype, contiguous.
        eps: is added to the mean.
        offset: is added to the weight; with ``round_first`` it must be 0.
        round_first: whether the normalised row is rounded to the dtype before the weight.

    Returns:
        [..., N] of x's dtype, contiguous. A row's bits depend on the row alone. On a CPU they are
        those of torch's operators, whose order of additions this follows: lanes of 8, four abreast,
        16 terms to a partial sum (as long as torch sums a row by one thread: a single row of 32,768
        elements it gives to all of them). On a GPU the order is fixed, but its own: the mean, and
        with it the result, can differ from torch's in the last bit.

    Does not synchronise.

    Example:
        >>> ops.rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), eps=0.0)
        tensor([[0.8485, 1.1314]])
    """
    return _rms_norm(x, weight, eps=eps, offset=offset, round_first=round_first)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    round_first: bool = True,
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, and normalise the sum as :func:`rms_norm` does.

    Args:
        x, residual: [..., N], of one shape and dtype, any strides with a unit last one.
        weight, eps, offset, round_first: as for ``rms_norm``.

    Returns:
        (out, total), [..., N] each, contiguous: ``total = residual + x``, rounded to the dtype, and
        ``out = rms_norm(total, ...)``.

    Example:
        >>> x, residual = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 3.0]])
        >>> ops.add_rms_norm(x, residual, torch.ones(2), eps=0.0)
        (tensor([[0.8485, 1.1314]]), tensor([[3., 4.]]))
    """
    return _add_rms_norm(x, residual, weight, eps=eps, offset=offset, round_first=round_first)


@torch.library.register_fake("specextend::rms_norm")
def _(x, weight, **options):
    return x.new_empty(x.shape)


@torch.library.register_fake("specextend::add_rms_norm")
def _(x, residual, weight, **options):
    return x.new_empty(x.shape), x.new_empty(x.shape)
