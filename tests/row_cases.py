"""Makes rows [.., N] in every layout, with NaN around them, and says how near a result is."""

import torch
from kv_cases import same_bits
from torch import Tensor

LAYOUTS = ["contiguous", "merged", "padded", "heads first"]


def rows(layout: str, shape, dtype=torch.float32, device="cpu", seed=0, scale=1.0) -> Tensor:
    """Return random rows; every layout of a seed has the same."""
    generator = torch.Generator().manual_seed(seed)
    values = (scale * torch.randn(shape, generator=generator)).to(dtype)

    def nan(*sizes):
        return torch.full(sizes, torch.nan, dtype=dtype, device=device)

    *outer, length = shape
    if layout == "contiguous":
        t = nan(*shape)
    elif layout == "merged":  # the second half of one projection
        t = nan(*outer, 2 * length)[..., length:]
    elif layout == "padded":  # odd: no row begins at a multiple of 16 bytes
        t = nan(*outer, length + 3)[..., 1 : length + 1]
    else:  # the last two dimensions before N have changed places in memory
        sizes = [*outer[:-2], *outer[:-3:-1], length]
        t = nan(*sizes).transpose(-2, -3) if len(outer) > 1 else nan(*sizes)
    return t.copy_(values)


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Compare the bits; NaN equals any NaN."""
    number = ~a.isnan()
    return torch.equal(number, ~b.isnan()) and same_bits(
        a.masked_fill(~number, 0), b.masked_fill(~number, 0)
    )


def check_near(got: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Hold a result to twice the error that the reference makes in the same dtype."""
    assert got.dtype == plain.dtype and got.shape == exact.shape and got.is_contiguous()
    error = (got.double() - exact).abs().max()
    assert error <= 2 * (plain.double() - exact).abs().max() + 1e-6
