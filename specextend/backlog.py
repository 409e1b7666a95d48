"""Holds what a draft has yet to take in of the text, and what the target saw there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .draft import Decided
from .verify import Decisions


class Backlog:
    """Holds what the draft has yet to take in. Batch 1.

    Args:
        decisions: the text so far.
        seen: tokens that the draft takes in during the prefill.

    Attributes:
        features: [1, n, F] each, in order: what the tokens from ``seen`` on were decided from.
    """

    def __init__(self, decisions: Decisions, seen: int):
        self._decisions = decisions
        self._seen = seen
        self.features: list[Tensor] = []

    def shift(self, features: Tensor | None) -> Tensor | None:
        """Return what the tokens of a part of the prompt stand behind.

        Args:
            features: [1, T, F] of these tokens; None without.

        Returns:
            [1, T, F]: zeros or the last row of the part before, then all but the last row.
        """
        if features is None:
            return None
        before = self.features or [torch.zeros_like(features[:, :1])]
        self.features = [features[:, -1:].clone()]  # so that the part's others can be freed
        return torch.cat([*before, features[:, :-1]], 1)

    def add(self, count: int) -> None:
        """Add the ``count`` tokens that a round has decided."""
        features = self._decisions.features
        if features is not None:
            self.features.append(features[:, :count].clone())

    def upto(self, length: int) -> Decided:
        """Return all tokens up to the root behind ``length`` committed ones."""
        tokens, features = self._decisions.ids[:, self._seen : length + 1], None
        if self.features:
            features = torch.cat(self.features, 1)
            # A prompt of one token has nothing that it was decided from.
            features = F.pad(features, (0, 0, tokens.shape[1] - features.shape[1], 0))
        return Decided(tokens, features)

    def emitted(self) -> Decided:
        """Return what the last round emitted, whose number the host need not know."""
        decisions = self._decisions
        return Decided(decisions.emitted, decisions.features, decisions.counts)

    def clear(self, length: int) -> None:
        """Forget what the draft has taken in: all up to the root behind ``length`` tokens."""
        self._seen, self.features = length + 1, []
