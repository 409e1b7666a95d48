"""Has memory of a GPU apart from the addresses that it is seen at.

The same physical memory is mapped into several ranges of addresses: so caches can have rows in
common, and operators see ordinary tensors. With the functions that CUDA has for virtual memory
(csrc/device_memory.h), as vAttention does it (Prabhu et al. 2024, arXiv 2405.04437).
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _C
from .graphs import capturing

_lock = threading.Lock()  # for those who map memory, and count who has it
_left: deque[_Range] = deque()  # ranges that no tensor has any more, until they are taken down


def driver(device: torch.device) -> Any:
    """Return what has the functions of csrc/device_memory.h for a device; None: nothing has."""
    return _C if device.type == "cuda" and _C.has_cuda else None


def as_tensor(addresses: Addresses) -> Tensor:
    """Return the memory behind a range, of which there is some, as uint8, without looking at it.
    The tensor keeps the range alive."""
    return torch.as_tensor(addresses, device=addresses.device)


def granularity(device: torch.device) -> int:
    """Return what sizes of memory of a device are multiples of, in bytes; 0: it cannot be mapped,
    as there is no GPU, or it or its driver is too old."""
    functions = driver(device)
    return 0 if functions is None else functions.memory_granularity(device.index)


@dataclass(eq=False)
class Memory:
    """Is physical memory of a GPU.

    Attributes:
        handle: the driver's.
        size: in bytes.
        holders: ranges of addresses that it is mapped into; with the last one it is given up.
    """

    handle: int
    size: int
    holders: int = 0


@dataclass(eq=False)
class _Range:
    """Says what is behind a range of addresses.

    Attributes:
        functions: the driver's.
        device: the GPU's index.
        begin, size: of the range, in bytes.
        memory: one behind the other, from the beginning on.
    """

    functions: Any
    device: int
    begin: int
    size: int
    memory: list[Memory]

    def take_down(self) -> None:
        """Give up all of it. Waits for the device."""
        at = self.begin
        for memory in self.memory:
            self.functions.unmap_memory(self.device, at, memory.size)
            self.give_up(memory)
            at += memory.size
        self.functions.free_addresses(self.begin, self.size)

    def give_up(self, memory: Memory) -> None:
        """Note that memory is no longer behind these addresses; the last range lets it go."""
        memory.holders -= 1
        if not memory.holders:
            self.functions.release_memory(memory.handle)


class Addresses:
    """Holds a range of addresses of a GPU, the first of which have memory behind them.

    It lives as long as a tensor that it has given, and is taken down once the device has done all
    that it was given by then; while a graph is captured that is put off.

    Args:
        device: with an index.
        size: bytes of the range; addresses cost nothing.

    Attributes:
        size: the same, or more, as many as memory comes in.

    Raises:
        RuntimeError: the driver refuses; with its error.
    """

    def __init__(self, device: torch.device, size: int):
        collect()
        functions = driver(device)
        self.device = device
        self.granularity = granularity(device)
        self.size = self._filled(size)
        begin = functions.reserve_addresses(self.size)
        self._range = _Range(functions, device.index, begin, self.size, [])
        weakref.finalize(self, _leave, self._range).atexit = False  # then the process ends with it

    @property
    def memory(self) -> tuple[Memory, ...]:
        """Return the memory behind the addresses, one behind the other from the first one on."""
        return tuple(self._range.memory)

    @property
    def end(self) -> int:
        """Count the bytes that have memory behind them."""
        return sum(memory.size for memory in self._range.memory)

    @property
    def __cuda_array_interface__(self) -> dict:
        data = (self._range.begin, False)
        return {"shape": (self.end,), "typestr": "|u1", "data": data, "version": 3}

    def tensor(self) -> Tensor:
        """Return what has memory behind it, as uint8 [end]."""
        return as_tensor(self)

    def map(self, memory: Memory) -> None:
        """Have the memory of another range, too, behind the next addresses."""
        own = self._range
        with _lock:
            own.functions.map_memory(own.device, own.begin + self.end, memory.size, memory.handle)
            memory.holders += 1
            own.memory.append(memory)

    def back(self, end: int, most: int = 1) -> None:
        """Have fresh memory, of zeros, behind all of the first ``end`` addresses.

        Args:
            end: in bytes, at most ``size``.
            most: granules that one memory may have.

        Raises:
            torch.OutOfMemoryError: there is not enough, also without what torch keeps unused. What
                was there by then is there still, as it is with other errors of the driver.
        """
        begin = self.end
        try:
            while self.end < end:
                self._add(min(self._filled(end - self.end), most * self.granularity))
        finally:
            if self.end > begin:
                self.tensor()[begin:].zero_()

    def replace(self, index: int, source: Addresses) -> None:
        """Have the memory of another range, which has just one, in the place of the own one of this
        index, which has the same size. Waits for the device.

        Raises:
            RuntimeError: the driver refuses, or a graph is being captured. All is as before.
        """
        own, (new,) = self._range, source.memory
        old, at = own.memory[index], own.begin + sum(m.size for m in own.memory[:index])
        if own.functions.is_captured(own.device):
            raise RuntimeError("memory of a cache cannot be changed while a graph is captured")
        with capturing, _lock:
            own.functions.unmap_memory(own.device, at, old.size)
            try:
                own.functions.map_memory(own.device, at, new.size, new.handle)
            except RuntimeError:
                own.functions.map_memory(own.device, at, old.size, old.handle)
                raise
            own.memory[index] = new
            new.holders += 1
            own.give_up(old)

    def _add(self, size: int) -> None:
        """Have fresh memory behind the next addresses."""
        own = self._range
        handle = own.functions.create_memory(own.device, size)
        if handle is None:
            collect()
            torch.cuda.empty_cache()
            handle = own.functions.create_memory(own.device, size)
        if handle is None:
            raise torch.OutOfMemoryError(
                f"{self.device} has no memory left for rows of a text: {size} bytes more were "
                f"wanted, behind {self.end} of one layer's keys or values. Keep fewer contexts, or "
                "take shorter ones"
            )
        try:
            self.map(Memory(handle, size))
        except RuntimeError:
            own.functions.release_memory(handle)
            raise

    def _filled(self, size: int) -> int:
        """Return the bytes of the granules that ``size`` bytes need, of one at least."""
        return max(1, -(-size // self.granularity)) * self.granularity


def collect() -> None:
    """Take down the ranges that no tensor has any more. Waits for the device, if there are some.

    While a graph is captured, and while memory is mapped, which may be what this is called from,
    they are left for the next time.
    """
    with _free(capturing) as may, _free(_lock) as alone:
        while may and alone and _left:
            own = _left.popleft()
            if own.functions.is_captured(own.device):
                _left.append(own)
                return
            own.take_down()


def _leave(left: _Range) -> None:
    """Note that no tensor has a range any more."""
    _left.append(left)
    collect()


@contextlib.contextmanager
def _free(lock: threading.Lock) -> Iterator[bool]:
    """Have a lock for a ``with`` block, if it is free; tells whether it was."""
    got = lock.acquire(blocking=False)
    try:
        yield got
    finally:
        if got:
            lock.release()
