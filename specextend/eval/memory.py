"""Measures the most memory that a stretch of work takes."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


class PeakMemory:
    """Watches the memory of one device.

    Args:
        device: the one that the models are on.

    Attributes:
        kind: see ``records.Header.peak_memory``.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.kind: str | None = "cuda" if device.type == "cuda" else None
        if self.kind is None and self._reset():
            self.kind = "resident"

    def start(self) -> None:
        """Forget what was before."""
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self.kind == "resident":
            self._reset()

    def peak(self) -> int | None:
        """Return the peak since ``start`` in bytes, None where nobody says."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return self._high_water() if self.kind == "resident" else None

    def _reset(self) -> bool:
        """Make Linux count the peak anew (proc_pid_clear_refs(5)); False where it does not."""
        try:
            (_PROCESS / "clear_refs").write_text("5")
        except OSError:
            return False
        return self._high_water() is not None

    @staticmethod
    def _high_water() -> int | None:
        try:
            found = re.search(r"VmHWM:\s*(\d+) kB", (_PROCESS / "status").read_text())
        except OSError:
            return None
        return int(found[1]) * 1024 if found else None
