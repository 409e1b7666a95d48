"""Wraps and documents `silu_mul`; the fake kernel is here too."""

import torch
from torch import Tensor

_silu_mul = torch.ops.specextend.silu_mul.default


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Multiply by silu(gate): the middle of a gated feed-forward layer (SwiGLU, Shazeer 2020).

    ``silu(x) = x / (1 + exp(-x))`` is computed in fp32 and rounded to the dtype, then the product
    is, as in the models of `transformers`.

    Args:
        gate, up: [..., N], of one shape and dtype, fp32, fp16 or bf16, of at most four dimensions,
            any strides with a unit last one: both may be views of one projection.

    Returns:
        [..., N] of the dtype, contiguous. The bits are torch's; on a CPU, fp32 goes through torch's
        own functions, whose last bit depends on where an element lies. In the other dtypes an
        element's bits depend on the two numbers alone. Does not synchronise.

    Example:
        >>> gate, up = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).chunk(2, -1)  # views of one tensor
        >>> ops.silu_mul(gate, up)
        tensor([[0.0000, 2.1932]])
    """
    return _silu_mul(gate, up)


@torch.library.register_fake("specextend::silu_mul")
def _(gate, up):
    return gate.new_empty(gate.shape)
