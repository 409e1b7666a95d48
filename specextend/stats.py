"""Counts what a generation did: acceptance in vLLM's terms, seconds per phase, retrievals."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

#: phases of a generation, in the order of a round; the target's prefill comes before the rounds,
#: the draft's in part behind the first token
PHASES = ("prefill", "draft_prefill", "verify", "accept", "retrieve", "draft")


@dataclass
class SpecStats:
    """Counts what one generation did.

    "Accepted" are proposed tokens that the target confirmed, "emitted" are those and the target's
    own token of each round. The prefill and the first token, which no draft could propose, are not
    counted as a round.

    Attributes:
        num_prompt_tokens: tokens of the prompt.
        num_cached_tokens: of these, those at its beginning that a kept context had, which were not
            read again.
        num_emitted_tokens: tokens returned, the first one included.
        num_rounds: target forwards after the first token.
        num_plain_rounds: of these, rounds without a tree (the gate, or no draft).
        num_draft_tokens: proposed tokens.
        num_accepted_tokens: of these, accepted.
        acceptance_histogram: rounds by number of accepted tokens.
        seconds: wall time by phase, see ``PHASES``. On a GPU the host's time.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_emitted_tokens: int = 0
    num_rounds: int = 0
    num_plain_rounds: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_retrievals: int = 0
    acceptance_histogram: Counter = field(default_factory=Counter)
    seconds: defaultdict = field(default_factory=lambda: defaultdict(float))
    retrieved_ids: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def retrieved_chunks(self) -> list[list[int]]:
        """List the chunk ids of each retrieval, ascending. Reads the device."""
        return [[i for i in ids[0].tolist() if i >= 0] for ids in self.retrieved_ids]

    @property
    def mean_acceptance_length(self) -> float:
        """Divide emitted tokens by target forwards (tau of the paper); 1.0 is plain decoding."""
        return 1.0 + self.num_accepted_tokens / self.num_rounds if self.num_rounds else 1.0

    @property
    def draft_acceptance_rate(self) -> float:
        """Divide accepted tokens by proposed ones."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def acceptance_rate_per_position(self) -> list[float]:
        """Give the shares of speculative rounds that accepted at least 1, 2, ... tokens."""
        rounds = sum(self.acceptance_histogram.values())
        deepest = max(self.acceptance_histogram, default=0)
        return [
            sum(n for length, n in self.acceptance_histogram.items() if length >= i) / rounds
            for i in range(1, deepest + 1)
        ]

    @property
    def decode_seconds(self) -> float:
        """Add up the seconds outside of the prefills."""
        return sum(s for phase, s in self.seconds.items() if not phase.endswith("prefill"))

    @property
    def tokens_per_second(self) -> float:
        """Divide emitted tokens after the first by the seconds outside of the prefills."""
        seconds = self.decode_seconds
        return (self.num_emitted_tokens - 1) / seconds if seconds > 0 else 0.0

    @contextmanager
    def phase(self, name: str):
        """Count the time of a ``with`` block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def count_round(self, proposed: int, accepted: int) -> None:
        """Count a target forward after the first token."""
        self.num_rounds += 1
        if proposed:
            self.num_draft_tokens += proposed
            self.num_accepted_tokens += accepted
            self.acceptance_histogram[accepted] += 1
        else:
            self.num_plain_rounds += 1

    def as_dict(self) -> dict:
        """Return plain data, for JSON."""
        return {
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "num_emitted_tokens": self.num_emitted_tokens,
            "num_rounds": self.num_rounds,
            "num_plain_rounds": self.num_plain_rounds,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            "mean_acceptance_length": self.mean_acceptance_length,
            "draft_acceptance_rate": self.draft_acceptance_rate,
            "acceptance_rate_per_position": self.acceptance_rate_per_position,
            "acceptance_histogram": dict(sorted(self.acceptance_histogram.items())),
            "num_retrievals": self.num_retrievals,
            "tokens_per_second": self.tokens_per_second,
            "seconds": dict(self.seconds),
        }
