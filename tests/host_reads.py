"""Counts what turns tensors into Python values while a stream runs: each may wait for a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

READERS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")


def reads_per_round(stream: Iterator, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run a stream to its end, and return the names of the calls of each round but the prefill."""
    reads: list[str] = []
    for name in READERS:
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    next(stream)  # prefill and the first token
    rounds = []
    while True:
        reads.clear()
        if next(stream, None) is None:
            return rounds
        rounds.append(reads.copy())
