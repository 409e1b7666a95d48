"""Lets several caches have the rows of one text, each with its own continuation.

What is committed lies where forks see it, and what one of them writes is its own. On the host the
system copies a page when it is written to (:mod:`arena`). On a GPU memory is mapped into the ranges
of addresses of several caches (:mod:`device_memory`): what lies below the length of a fork is
written by nobody, and a cache that goes back there is given its own before it writes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import device_memory
from .arena import Arena, Stored, with_room
from .cache_layers import KVLayer
from .device_memory import Addresses

#: granules of a GPU's memory that are mapped at a time, of rows that are there. More make a fork
#: quicker, fewer leave more in common to one that goes back
_PIECE = 16


class SharedRows(ABC):
    """Holds the rows of a cache's layers where its forks see them.

    Attributes:
        capacity: rows of each layer.
    """

    capacity: int

    @abstractmethod
    def fork(self, layers: Sequence[KVLayer], length: int) -> SharedRows:
        """Have the first ``length`` rows, which are committed, in another cache's layers.

        Args:
            layers: allocated by this.
        """

    @abstractmethod
    def own(self, first: int) -> None:
        """Have the rows from ``first`` on alone, before one that is committed is written again."""

    @abstractmethod
    def reserve(self, capacity: int) -> bool:
        """Have room for ``capacity`` rows, if that can be without moving any; tells whether."""

    @abstractmethod
    def num_rows(self, length: int) -> int:
        """Count the rows that take memory; ``length`` of them are committed."""


def share(layers: Sequence[KVLayer], length: int, capacity: int) -> SharedRows | None:
    """Move rows to where forks see them; the layers have them there from then on.

    Args:
        layers: of a cache, allocated.
        length: rows that are committed.
        capacity: rows that the layers are to have at least.

    Returns:
        The rows; None: they cannot be shared here, and stay where they are.

    Raises:
        torch.OutOfMemoryError: the device has no room to move them. They are what they were, as
            after other errors of the system or the driver.
    """
    if Arena.serves(_tensors(layers)):
        return HostRows.of(layers, length, capacity)
    if DeviceRows.serve(_tensors(layers), length):
        return DeviceRows.of(layers, length, capacity)
    return None


def _tensors(layers: Sequence[KVLayer]) -> list[Tensor]:
    """Return keys and values of layers in turn."""
    return [t for layer in layers for t in (layer.keys, layer.values)]


def _hold(layers: Sequence[KVLayer], tensors: Sequence[Tensor]) -> None:
    """Have layers hold keys and values, which come in turn."""
    for layer, keys, values in zip(layers, tensors[::2], tensors[1::2], strict=True):
        layer.hold(keys, values)


class HostRows(SharedRows):
    """Holds rows of layers in an arena, of which each cache has a mapping of its own.

    Args:
        layers: allocated by this.
        arena: with rows of the text.
        shared: rows that are in the arena as this cache has them.
    """

    def __init__(self, layers: Sequence[KVLayer], arena: Arena, shared: int):
        self._layers, self._arena, self._shared = layers, arena, shared
        self.capacity = arena.capacity
        _hold(layers, arena.map())

    @classmethod
    def of(cls, layers: Sequence[KVLayer], length: int, capacity: int) -> HostRows:
        """Make an arena of the rows of a text."""
        tensors = _tensors(layers)
        arena = Arena.like(tensors, max(capacity, with_room(length)))
        for index, tensor in enumerate(tensors):
            arena.write(index, tensor, slice(length))
        arena.rows = length
        return cls(layers, arena, length)

    @classmethod
    def stored(cls, layers: Sequence[KVLayer], tensors: Sequence[Stored]) -> HostRows:
        """Have the rows of a text on disk."""
        arena = Arena.of(tensors)
        return cls(layers, arena, arena.rows)

    def fork(self, layers: Sequence[KVLayer], length: int) -> HostRows:
        arena, ours = self._arena, _tensors(self._layers)
        with arena.lock:
            if arena.grows and self._shared == arena.rows:
                for index, tensor in enumerate(ours):
                    arena.write(index, tensor, slice(arena.rows, length))
                arena.rows = self._shared = length
            made = HostRows(layers, arena, self._shared)
        for tensor, theirs in zip(ours, _tensors(layers), strict=True):
            theirs[:, :, self._shared : length] = tensor[:, :, self._shared : length]
        return made

    def own(self, first: int) -> None:
        self._shared = min(first, self._shared)

    def reserve(self, capacity: int) -> bool:
        return False

    def num_rows(self, length: int) -> int:
        return length  # others are pages that nobody has written to


@dataclass
class _Placed:
    """Says where the rows of a tensor [1, H, S, D] lie: [S, H, D] in a range of addresses, so that
    a granule is as many rows of all heads as there can be.

    Attributes:
        heads, dim, dtype: of the tensor.
        addresses: the range; memory is behind those of the rows that there are.
    """

    heads: int
    dim: int
    dtype: torch.dtype
    addresses: Addresses

    @classmethod
    def like(cls, tensor: Tensor, rows: int) -> _Placed:
        """Reserve addresses for rows of a tensor [1, H, ..., D]."""
        addresses = Addresses(tensor.device, rows * _row_bytes(tensor))
        return cls(tensor.shape[1], tensor.shape[-1], tensor.dtype, addresses)

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row of all heads."""
        return self.heads * self.dim * self.dtype.itemsize

    def tensor(self, rows: int) -> Tensor:
        """Return the first rows: [1, H, rows, D]."""
        numbers = self.addresses.tensor()[: rows * self.row_bytes].view(self.dtype)
        return numbers.view(1, rows, self.heads, self.dim).transpose(1, 2)

    def whole(self, rows: int) -> int:
        """Return the bytes of the granules that the first rows fill."""
        return rows * self.row_bytes // self.addresses.granularity * self.addresses.granularity

    def pieces(self) -> Iterator[tuple[int, device_memory.Memory]]:
        """Yield what is behind the addresses, with the place behind each, in bytes."""
        end = 0
        for memory in self.addresses.memory:
            end += memory.size
            yield end, memory

    def fork(self, length: int, capacity: int) -> _Placed:
        """Map the granules that the first ``length`` rows fill to addresses for another cache, and
        copy the other rows of these behind them; it has memory for ``capacity`` rows."""
        made = self.with_addresses(with_room(capacity))
        for end, memory in self.pieces():
            if end <= self.whole(length):
                made.addresses.map(memory)
        copied = slice(made.addresses.end, length * self.row_bytes)
        made.addresses.back(capacity * self.row_bytes)
        made.addresses.tensor()[copied] = self.addresses.tensor()[copied]
        return made

    def grown(self, capacity: int) -> _Placed:
        """Have memory behind the addresses of ``capacity`` rows; if there are not as many, map the
        same memory to more addresses."""
        made = self
        if capacity * self.row_bytes > self.addresses.size:
            made = self.with_addresses(with_room(capacity))
            for memory in self.addresses.memory:
                made.addresses.map(memory)
        made.addresses.back(capacity * self.row_bytes)
        return made

    def with_addresses(self, rows: int) -> _Placed:
        """Reserve addresses for rows of the same kind."""
        addresses = Addresses(self.addresses.device, rows * self.row_bytes)
        return _Placed(self.heads, self.dim, self.dtype, addresses)


class DeviceRows(SharedRows):
    """Holds rows of layers in memory of a GPU that is mapped to addresses of each cache.

    A cache alone has the memory behind its committed rows, and of the granule in which they end.
    It is not given what nobody needs: ``capacity`` is what has been asked for, and what fills
    granules. Batch 1.
    """

    def __init__(self, layers: Sequence[KVLayer], placed: Sequence[_Placed], capacity: int):
        self._layers, self._placed, self.capacity = layers, list(placed), capacity
        _hold(layers, [one.tensor(capacity) for one in placed])

    @staticmethod
    def serve(tensors: Sequence[Tensor], length: int) -> bool:
        """Tell whether rows of these tensors can be shared: some fill a granule."""
        if not tensors or tensors[0].shape[0] != 1:
            return False
        sizes = [device_memory.granularity(t.device) for t in tensors]
        return all(sizes) and any(
            length * _row_bytes(t) >= size for t, size in zip(tensors, sizes, strict=True)
        )

    @classmethod
    def of(cls, layers: Sequence[KVLayer], length: int, capacity: int) -> DeviceRows:
        """Move the rows of a text, layer by layer, so that only one is there twice."""
        capacity = _filling(_tensors(layers), capacity)
        placed: list[_Placed] = []
        for layer in layers:
            for tensor in (layer.keys, layer.values):
                made = _Placed.like(tensor, with_room(capacity))
                if whole := made.whole(length):
                    made.addresses.back(whole, _PIECE)
                made.addresses.back(capacity * made.row_bytes)
                made.tensor(length)[:] = tensor[:, :, :length]
                placed.append(made)
            del tensor
            layer.hold(*(one.tensor(capacity) for one in placed[-2:]))
        return cls(layers, placed, capacity)

    def fork(self, layers: Sequence[KVLayer], length: int) -> DeviceRows:
        capacity = _filling(_tensors(self._layers), length)
        return DeviceRows(layers, [one.fork(length, capacity) for one in self._placed], capacity)

    def own(self, first: int) -> None:
        copies: list[tuple[Addresses, int, Addresses]] = []
        for one in self._placed:
            ours = one.addresses
            for index, (end, memory) in enumerate(one.pieces()):
                if end > first * one.row_bytes and memory.holders > 1:
                    copied = Addresses(ours.device, memory.size)
                    copied.back(memory.size, memory.size // ours.granularity)
                    copied.tensor().copy_(ours.tensor()[end - memory.size : end])
                    copies.append((ours, index, copied))
        for ours, index, copied in copies:  # there is memory for all of them
            ours.replace(index, copied)

    def reserve(self, capacity: int) -> bool:
        capacity = _filling(_tensors(self._layers), capacity)
        self._placed = [one.grown(capacity) for one in self._placed]
        self.capacity = capacity
        _hold(self._layers, [one.tensor(capacity) for one in self._placed])
        return True

    def num_rows(self, length: int) -> int:
        return self.capacity


def _row_bytes(tensor: Tensor) -> int:
    """Return the bytes of a row of all heads of a tensor [1, H, ..., D]."""
    return tensor.shape[1] * tensor.shape[-1] * tensor.element_size()


def _filling(tensors: Sequence[Tensor], rows: int) -> int:
    """Return how many rows fit the granules that ``rows`` rows need, of each of these tensors."""
    fitting = []
    for tensor in tensors:
        step, size = _row_bytes(tensor), device_memory.granularity(tensor.device)
        fitting.append(max(1, -(-rows * step // size)) * size // step)
    return min(fitting)
