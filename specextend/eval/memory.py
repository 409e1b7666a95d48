"""Measures memory: the most that a stretch of work takes, and what caches take for each token."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import SpecConfig
from ..decode import SpecExtend
from ..draft import Draft

_PROCESS = Path("/proc/self")


def cache_bytes(
    target: PreTrainedModel,
    draft: Draft | None,
    config: SpecConfig,
    tokenizer: PreTrainedTokenizerBase | None,
) -> int:
    """Return the bytes that the caches of target and draft take for each token of a text, by two
    texts that are read. The tokenizer is for stop strings, which the checkpoint may bring."""
    spec = SpecExtend(target, draft, config, keep_contexts=0)
    ids = torch.zeros(1, 2 * config.chunk_size, dtype=torch.int64, device=target.device)
    texts = (ids[:, : config.chunk_size], ids)
    sizes = [
        spec.read(t, attention_mask=torch.ones_like(t), tokenizer=tokenizer).num_bytes
        for t in texts
    ]
    return (sizes[1] - sizes[0]) // config.chunk_size


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
