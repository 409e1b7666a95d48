"""Has forks share memory on the CPU as on a GPU: by csrc/device_memory.cpp and an emulated driver.

Tensors of the CPU are taken for those of a GPU whose granule is 4096 bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from emulation import ROOT, ToolMissing, build_device_memory
from torch import Tensor

from specextend import device_memory
from specextend.arena import Arena
from specextend.device_memory import Addresses

GRANULE = 4096
INVALID_VALUE, OUT_OF_MEMORY = 1, 2  # errors of the driver


class EmulatedDriver:
    """Has what ``_C`` has for memory where it is built for CUDA, and what tests ask.

    What is made while it is in use is to be gone before the next one is made.
    """

    def __init__(self):
        self._handle = ctypes.CDLL(str(build_device_memory()))
        for count in ("memory_in_use", "ranges"):
            getattr(self._handle, f"emulated_{count}").restype = ctypes.c_int64

    def _call(self, name: str, *arguments: int) -> int:
        function, result = getattr(self._handle, f"call_{name}"), ctypes.c_int64()
        function.restype = ctypes.c_char_p
        error = function(ctypes.byref(result), *map(ctypes.c_int64, arguments))
        if error is not None:
            raise RuntimeError(error.decode())
        return result.value

    def memory_granularity(self, device: int | None) -> int:
        return self._call("memory_granularity", device or 0)

    def create_memory(self, device: int | None, size: int) -> int | None:
        made = self._call("create_memory", device or 0, size)
        return None if made < 0 else made

    def release_memory(self, memory: int) -> None:
        self._call("release_memory", memory)

    def reserve_addresses(self, size: int) -> int:
        return self._call("reserve_addresses", size)

    def free_addresses(self, begin: int, size: int) -> None:
        self._call("free_addresses", begin, size)

    def map_memory(self, device: int | None, begin: int, size: int, memory: int) -> None:
        self._call("map_memory", device or 0, begin, size, memory)

    def unmap_memory(self, device: int | None, begin: int, size: int) -> None:
        self._call("unmap_memory", device or 0, begin, size)

    def is_captured(self, device: int | None) -> bool:
        return bool(self._call("is_captured", device or 0))

    @property
    def memory_in_use(self) -> int:
        """Count the bytes of the GPU's memory that are in use."""
        device_memory.collect()
        return self._handle.emulated_memory_in_use()

    @property
    def ranges(self) -> int:
        """Count ranges of addresses and mappings into them."""
        device_memory.collect()
        return self._handle.emulated_ranges()

    def leave(self, size: int | None) -> None:
        """Have so much memory left; None: any amount."""
        self._handle.emulated_memory_left(ctypes.c_int64(-1 if size is None else size))

    def support(self, on: bool) -> None:
        """Be a device that can map memory, or none."""
        self._handle.emulated_support(int(on))

    def fail(self, calls: int, error: int) -> None:
        """Have the call fail that comes after so many, with an error of the driver."""
        self._handle.emulated_failure(calls, error)

    def has_failed(self) -> bool:
        """Tell whether the call that was to fail has come; none will from now on."""
        return bool(self._handle.emulated_failure(-1, 0))

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Have the current stream captured inside."""
        self._handle.emulated_capture(1)
        try:
            yield
        finally:
            self._handle.emulated_capture(0)


def _as_tensor(addresses: Addresses) -> Tensor:
    """Do as :func:`device_memory.as_tensor` by the host's interface for memory."""
    said = addresses.__cuda_array_interface__
    memory = (ctypes.c_uint8 * said["shape"][0]).from_address(said["data"][0])
    memory.addresses = addresses  # alive for as long as the tensor
    return torch.frombuffer(memory, dtype=torch.uint8)


@contextlib.contextmanager
def emulated_gpu_memory() -> Iterator[EmulatedDriver]:
    """Have forks share memory in this way inside; nothing of it may be left at the end."""
    if not (ROOT / "csrc").is_dir():
        pytest.skip("csrc/ is not part of this installation")
    try:
        driver = EmulatedDriver()
    except ToolMissing as missing:
        pytest.skip(str(missing))
    with (
        mock.patch.object(Arena, "serves", staticmethod(lambda tensors: False)),
        mock.patch.object(device_memory, "driver", lambda device: driver),
        mock.patch.object(device_memory, "as_tensor", _as_tensor),
    ):
        try:
            yield driver
        finally:
            driver.leave(None)
            driver.support(True)
            driver.has_failed()
