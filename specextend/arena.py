"""Lets several caches have the rows of one text, each with its own continuation.

The rows lie in a file in memory, which every cache maps for itself: pages are the same memory until
one of them writes to its own, when the system copies that page alone. Nothing moves, and operators
see contiguous tensors as ever. On Linux, on the host.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor


class Arena:
    """Holds rows of a text's layers in a file in memory.

    What has been written stays: rows are only added behind those that are there, which mappings
    made before do not look at.

    Args:
        like: [B, H, ..., D] each, tensors of the layers.
        capacity: rows of each.

    Attributes:
        rows: that have been written.
        lock: for those who add rows or map them.
    """

    def __init__(self, like: Sequence[Tensor], capacity: int):
        self.capacity, self.rows, self.lock = capacity, 0, threading.Lock()
        self._shapes = [(*t.shape[:2], capacity, t.shape[-1]) for t in like]
        self._dtypes = [t.dtype for t in like]
        self._places, end = [], 0
        for shape, dtype in zip(self._shapes, self._dtypes, strict=True):
            self._places.append(end)
            size = torch.Size(shape).numel() * dtype.itemsize
            end += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._size = end
        self._file = os.memfd_create("specextend")
        weakref.finalize(self, os.close, self._file)
        os.ftruncate(self._file, end)
        self._own = self._map(shared=True)

    @staticmethod
    def serves(tensors: Sequence[Tensor]) -> bool:
        """Tell whether the rows of these tensors can be shared here."""
        on_host = bool(tensors) and all(t.device.type == "cpu" for t in tensors)
        return on_host and hasattr(os, "memfd_create") and os.path.exists("/proc/self/fd")

    def write(self, index: int, tensor: Tensor, rows: slice) -> None:
        """Write rows of a layer's [B, H, S, D] tensor."""
        self._own[index][:, :, rows] = tensor[:, :, rows]

    def map(self) -> list[Tensor]:
        """Return a tensor [B, H, capacity, D] for each layer, with the rows that are there; what is
        written to them is seen there alone."""
        return self._map(shared=False)

    def _map(self, shared: bool) -> list[Tensor]:
        path = f"/proc/self/fd/{self._file}"
        storage = torch.UntypedStorage.from_file(path, shared, self._size)
        return [
            torch.tensor([], dtype=dtype).set_(
                storage, place // dtype.itemsize, shape, torch.empty(shape, device="meta").stride()
            )
            for shape, dtype, place in zip(self._shapes, self._dtypes, self._places, strict=True)
        ]
