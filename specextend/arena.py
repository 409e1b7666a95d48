"""Maps rows of a text from a file, for several caches that have them.

The rows lie in a file, in memory or on disk, which every cache maps for itself: pages are the same
memory until one of them writes to its own, when the system copies that page alone. Nothing moves,
and operators see contiguous tensors as ever. On the host; in memory on Linux.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from . import _C


class OpenFile:
    """Holds a file open for as long as it is held itself.

    Args:
        descriptor: of the file, to be closed.
    """

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)


@dataclass(frozen=True)
class Place:
    """Says where rows of a tensor lie in a file.

    Attributes:
        shape: [B, H, S, D].
        dtype: of the numbers.
        offset: of the first byte.
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    offset: int

    @property
    def head_bytes(self) -> int:
        """Return the bytes of the S rows of a head."""
        return math.prod(self.shape[2:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all rows."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Rows:
    """Holds rows of a tensor [B, H, S, D] that are to be stored, for mapping.

    Attributes:
        tensor: in memory.
    """

    tensor: Tensor


@dataclass(frozen=True)
class Stored:
    """Holds rows of a tensor in a file on disk, which nobody writes to.

    Attributes:
        file: the open one.
        place: where each head begins with a page, and fills its last one with something else.
        rows: that there are.
    """

    file: OpenFile
    place: Place
    rows: int

    @property
    def can_be_mapped(self) -> bool:
        """Tell whether pages are as small here as where the file was written."""
        return self.place.offset % mmap.PAGESIZE == self.place.head_bytes % mmap.PAGESIZE == 0


def fill_pages(rows: int, row_bytes: Sequence[int], page: int = mmap.PAGESIZE) -> int:
    """Return the least number of rows, of at least ``rows``, that fill whole pages, for rows of
    each of these lengths."""
    step = max(page // math.gcd(page, length) for length in row_bytes)  # all powers of two
    return -(-rows // step) * step


class Arena:
    """Holds rows of a text's layers in a file.

    What has been written stays: rows are only added behind those that are there, which mappings
    made before do not look at.

    Args:
        file: with as many bytes as the places say; the heads of each begin with a page.
        places: of the layers' tensors.
        rows: that are written.
        capacity: rows of the tensors that map it, at least.

    Attributes:
        capacity: rows of the tensors that map it, as many as fill whole pages.
        rows: that are written by now.
        grows: whether rows can be added.
        lock: for those who add rows or map them.
    """

    def __init__(self, file: OpenFile, places: Sequence[Place], rows: int, capacity: int):
        row_bytes = [place.shape[3] * place.dtype.itemsize for place in places]
        self.capacity = fill_pages(capacity, row_bytes)
        self.rows, self.lock = rows, threading.Lock()
        self._file, self._places = file, places
        self.grows = all(place.shape[2] == self.capacity for place in places)
        self._own = self._map(shared=True) if self.grows else None

    @classmethod
    def like(cls, tensors: Sequence[Tensor], capacity: int) -> Arena:
        """Make an arena in memory, empty, for tensors like these [B, H, ..., D]."""
        capacity = fill_pages(capacity, [t.shape[-1] * t.element_size() for t in tensors])
        places: list[Place] = []
        end = 0
        for tensor in tensors:
            shape = (*tensor.shape[:2], capacity, tensor.shape[-1])
            places.append(Place(shape, tensor.dtype, end))
            end += places[-1].num_bytes
        file = OpenFile(os.memfd_create("specextend"))
        os.ftruncate(file.descriptor, end)  # what is not written takes no memory
        return cls(file, places, 0, capacity)

    @classmethod
    def of(cls, stored: Sequence[Stored]) -> Arena:
        """Make an arena of the rows of a text on disk."""
        rows = stored[0].rows
        return cls(stored[0].file, [one.place for one in stored], rows, with_room(rows))

    @staticmethod
    def serves(tensors: Sequence[Tensor]) -> bool:
        """Tell whether rows of these tensors can be shared here."""
        on_host = bool(tensors) and all(t.device.type == "cpu" for t in tensors)
        return on_host and hasattr(os, "memfd_create")

    def write(self, index: int, tensor: Tensor, rows: slice) -> None:
        """Write rows of a layer's [B, H, S, D] tensor."""
        self._own[index][:, :, rows] = tensor[:, :, rows]

    def map(self) -> list[Tensor]:
        """Return a tensor [B, H, capacity, D] for each layer, with the rows that are there; what is
        written to them is seen there alone.

        Raises:
            OSError: the system has no more mappings for this process.
        """
        return self._map(shared=False)

    def _map(self, shared: bool) -> list[Tensor]:
        shapes = [(*p.shape[:2], self.capacity, p.shape[3]) for p in self._places]
        sizes = [math.prod(s) * p.dtype.itemsize for s, p in zip(shapes, self._places, strict=True)]
        *begins, size = accumulate(sizes, initial=0)
        pieces = list(_joined(self._pieces(begins)))
        memory = _C.Mapping(self._file.descriptor, pieces, size=size, shared=shared)
        return [
            torch.frombuffer(memory, dtype=p.dtype, count=math.prod(s), offset=begin).view(s)
            for s, p, begin in zip(shapes, self._places, begins, strict=True)
        ]

    def _pieces(self, begins: list[int]) -> Iterator[tuple[int, int, int]]:
        """Yield each head's place in memory and in the file, and its bytes."""
        for place, begin in zip(self._places, begins, strict=True):
            (batch, heads, rows, _), size = place.shape, place.head_bytes
            room = size // rows * self.capacity
            for head in range(batch * heads):
                yield begin + head * room, place.offset + head * size, size


def with_room(rows: int) -> int:
    """Return a capacity for a text of so many rows and what may follow."""
    return rows + max(rows, 4096)


def _joined(pieces: Iterator[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Make one of pieces that follow each other in memory and in the file."""
    at, offset, size = next(pieces)
    for next_at, next_offset, next_size in pieces:
        if (next_at, next_offset) == (at + size, offset + size):
            size += next_size
        else:
            yield at, offset, size
            at, offset, size = next_at, next_offset, next_size
    yield at, offset, size
