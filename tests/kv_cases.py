"""Makes KV caches in every layout, with guards around them."""

import torch
from torch import Tensor

LAYOUTS = ["bshd", "bhsd", "sliced", "kv_packed"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def as_bits(t: Tensor) -> Tensor:
    """View the same memory as integers, so that NaN equals itself and -0 is not 0."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.view(sizes[t.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(as_bits(a), as_bits(b))


class Guarded:
    """Holds a tensor [B, S, H, D] inside a larger one of NaN, all of which can be compared.

    Attributes:
        t: the tensor, in the layout asked for.
        base: all memory that belongs to it.
    """

    def __init__(self, layout, batch, rows, heads, dim, dtype=torch.float32, device="cpu", seed=0):
        def nan(*shape):
            return torch.full(shape, torch.nan, dtype=dtype, device=device)

        if layout == "bshd":
            self.base = nan(batch + 2, rows, heads, dim)
            self.t = self.base[1:-1]
        elif layout == "bhsd":
            self.base = nan(batch, heads + 2, rows, dim)
            self.t = self.base[:, 1:-1].transpose(1, 2)
        elif layout == "sliced":  # odd paddings: no row begins at a multiple of 16 bytes
            self.base = nan(batch, rows + 5, heads + 3, dim + 1)
            self.t = self.base[:, 2:-3, 1:-2, 1:]
        else:
            self.base = nan(batch, rows, 2, heads, dim)
            self.t = self.base[:, :, 1]
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(batch, rows, heads, dim, generator=generator)
        self.t.copy_(values.to(dtype))

    def twin(self) -> "Guarded":
        """Make another one of the same contents and layout, elsewhere."""
        other = object.__new__(Guarded)
        other.base = self.base.clone()
        other.t = torch.as_strided(
            other.base, self.t.shape, self.t.stride(), self.t.storage_offset()
        )
        return other

    def poison(self, lens: list[int]) -> "Guarded":
        """Write NaN from row lens[b] on."""
        for b, length in enumerate(lens):
            self.t[b, max(length, 0) :] = torch.nan
        return self


def int32(values, device="cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def run_with_threads(threads: int, function):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function()
    finally:
        torch.set_num_threads(before)
