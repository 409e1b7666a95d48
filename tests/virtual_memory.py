"""Makes tensors with strides beyond 32 bits, in memory of which only elements are ever touched."""

import math
import mmap

import pytest
import torch
from torch import Tensor

MAP_NORESERVE = 0x4000  # on Linux; the module `mmap` has it from Python 3.13 on


def spread(t: Tensor, dim: int, device: str = "cpu", far: int = 2**32) -> Tensor:
    """Copy ``t``, with a stride beyond ``far`` elements in one dimension.

    The low 32 bits of any offset in it are those of another place in its memory, which reads as 0:
    what computes with 32 bits is wrong there and does not crash.

    On a GPU all of the memory is real. There only the last element is beyond ``far``, and the test
    is skipped where memory does not suffice.
    """
    sizes = [*t.shape]
    sizes[dim] = 1
    strides = [math.prod(sizes[i + 1 :]) for i in range(t.dim())]
    inner, steps = math.prod(sizes), t.shape[dim] - 1
    assert steps > 0, "the dimension has one element"
    far //= 1 if device == "cpu" else steps
    strides[dim] = (far + inner + 127) // 64 * 64  # what is aligned stays so
    memory = _reserve(steps * strides[dim] + inner, t.dtype, device)
    return memory.as_strided(t.shape, strides).copy_(t)


def _reserve(count: int, dtype: torch.dtype, device: str) -> Tensor:
    size = count * dtype.itemsize
    if device != "cpu":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < size:
            pytest.skip(f"{size >> 30} GiB of memory, {free >> 30} GiB are free")
        return torch.empty(count, dtype=dtype, device=device)
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype)
    except OSError as error:
        pytest.skip(f"{size >> 30} GiB of address space: {error}")
