"""Holds what a draft attends to: its full cache, a recent window of it, or retrieved chunks.

Two caches: the full one has the keys of every token at its absolute position; the working one is
what the draft attends to. A gather takes chunks from the full cache into the working one and moves
their keys to compact positions that end where the newest chunk ends: distances are those of a short
input, and new tokens go on at their absolute positions, so their keys are the same in both caches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..cache import KVCache, Pass
from ..config import SpecConfig
from ..graphs import Graphs
from ..rotary import Rotary


class WorkingCache:
    """Holds the full and the working cache of one generation; one and the same with "full".

    Args:
        full: keys and values of every token; its rows are filled through :meth:`fill` or by its
            owner.
        config: cache and tree options.
        rotary: how keys carry positions; None where the draft cache is "full".
        graphs: that a refill is captured in.

    Attributes:
        work: what the draft attends to; empty until the first :meth:`refill`.
        chosen: [C] bool, the prompt's chunks that the full cache has; None: all of them.
    """

    def __init__(
        self, full: KVCache, config: SpecConfig, rotary: Rotary | None, graphs: Graphs | None = None
    ):
        self.full = full
        self.graphs = graphs or Graphs()
        self.config = config
        self.rotary = rotary
        self.work = full
        if config.draft_cache != "full":
            # Between two gathers a round adds at most a whole path and the next root.
            room = max((config.retrieve_every + 1) * (config.max_depth + 2), config.chunk_size)
            capacity = config.budget + room + config.tree_keys
            self.work = full.another(capacity)
        self._holder = full  # of the states
        self.chosen: Tensor | None = None
        self._scores: Tensor | None = None

    @property
    def needs_refill(self) -> bool:
        """Tell whether the working cache has yet to be filled from the full one."""
        return self.work.length == 0 and self.full.length > 0 and self.work is not self.full

    def fits(self, count: int) -> bool:
        """Tell whether ``count`` more tokens and a tree behind them fit the working cache."""
        return (
            self.work is self.full
            or self.work.length + count + self.config.tree_keys <= self.work.capacity
        )

    def fits_refilled(self, count: int) -> bool:
        """Tell the same of a working cache that has been filled anew."""
        return self.config.budget + count + self.config.tree_keys <= self.work.capacity

    def fill(self, count: int) -> Pass:
        """Make a pass that takes ``count`` tokens of the prompt into the full cache alone."""
        config = self.config
        window = 0 if config.draft_cache == "full" else config.draft_prefill_window or 0
        full = self._with_states(self.full)
        return Pass(full, [(full, full.lens)], count, window=window)

    def extend(self, count: int) -> Pass:
        """Make a pass over the next ``count`` decided tokens, into both caches."""
        work = self._with_states(self.work)
        return Pass(work, [(cache, cache.lens) for cache in self._both], count)

    def _with_states(self, cache: KVCache) -> KVCache:
        """Return a cache of both with the states of the text: a forward finds them in its own."""
        cache.take_states(self._holder)
        self._holder = cache
        return cache

    def collected(self) -> KVCache:
        """Return the full cache with all that is kept of the text; the working one is done with."""
        return self._with_states(self.full)

    def advance(self, count: int) -> None:
        """Commit what :meth:`extend` wrote."""
        for cache in self._both:
            cache.advance(count)

    def commit(self, count: int | Tensor) -> None:
        """Do as :meth:`advance` on the device alone, by a number that may be known only there."""
        for cache in self._both:
            cache.commit(count)

    def settle(self, count: int) -> None:
        """Note what :meth:`commit` has added, once the host knows it."""
        for cache in self._both:
            cache.settle(count)

    @property
    def _both(self) -> list[KVCache]:
        return [self.work] if self.work is self.full else [self.work, self.full]

    def grow(self, level: int, mask: Tensor, num_keys: int, parents: Tensor | None = None) -> Pass:
        """Make a pass over a level of a growing tree, as ``grow_tree`` describes it to its step;
        ``parents`` are for layers that keep a state."""
        count = mask.shape[1]
        depths = torch.full((1, count), level, dtype=torch.int32, device=mask.device)
        self._depths = depths if level == 0 else torch.cat([self._depths, depths], 1)
        return Pass(
            self.work,
            [(self.work, self.work.lens + (num_keys - count))],
            num_keys,
            mask=mask,
            q_depths=depths,
            k_depths=self._depths,
            level=None if parents is None else parents[0],
        )

    def refill(self, scores: Tensor | None = None) -> Tensor:
        """Fill the working cache anew from the full one, which is not empty.

        Args:
            scores: [1, C] fp32 per chunk; None: the last ones, or recency if there are none.

        Returns:
            [1, budget] int32 chunk ids with a -1 tail.
        """
        if scores is not None:
            self._scores = scores
        ids = self.graphs.call(("refill", self._scores is None), self._refill, self._scores)
        # The host knows the length that the device computes: the newest chunk is always selected.
        num_chunks = -(-self.full.length // self.config.chunk_size)
        dropped = max(0, num_chunks - self.config.budget_chunks)
        self.work.length = self.full.length - dropped * self.config.chunk_size
        return ids

    def _refill(self, scores: Tensor | None) -> Tensor:
        if scores is not None and self.chosen is not None:
            scores = self._among_chosen(scores)
        ids, counts = self._select(scores)
        self._gather(ids, counts)
        return ids

    def missing(self, scores: Tensor) -> Tensor:
        """Return [C] bool, the prompt's chunks that ``scores`` want most, a quarter of the budget,
        and that the full cache lacks."""
        count, most = len(self.chosen), max(1, self.config.budget_chunks // 4)
        best = scores[0].topk(min(most, scores.shape[1])).indices
        wanted = torch.zeros_like(self.chosen)
        wanted[best[best < count]] = True  # others are behind the prompt
        return wanted & ~self.chosen

    def _among_chosen(self, scores: Tensor) -> Tensor:
        """Leave out the prompt's chunks that the full cache lacks."""
        lacking = F.pad(~self.chosen, (0, scores.shape[1] - len(self.chosen)))
        return scores.masked_fill(lacking, -torch.inf)

    def _select(self, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        config, full = self.config, self.full
        recent = max(1, config.recent_chunks)  # the newest chunk anchors positions
        if scores is None:
            num_chunks = -(-full.capacity // config.chunk_size)
            scores = torch.zeros(1, num_chunks, device=full.lens.device)
            recent = config.budget_chunks - config.sink_chunks
        return ops.select_chunks(
            scores,
            full.lens,
            chunk_size=config.chunk_size,
            budget=config.budget_chunks,
            num_sinks=config.sink_chunks,
            num_recent=recent,
        )

    def _gather(self, ids: Tensor, counts: Tensor) -> None:
        config, full, work = self.config, self.full, self.work
        work.allocate_as(full)
        filled = ops.gather_chunks(
            [layer.k for layer in full.kv_layers],
            [layer.v for layer in full.kv_layers],
            [layer.k for layer in work.kv_layers],
            [layer.v for layer in work.kv_layers],
            ids,
            counts,
            full.lens,
            self.rotary.at(full.rotary_length),
            chunk_size=config.chunk_size,
            interleaved=self.rotary.interleaved,
            right_aligned=True,
        )
        work.lens.copy_(filled)
