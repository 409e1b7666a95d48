"""Holds what drafts with keys and values share: caches, taking in, growing, graphs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache import KVCache
from ..config import SpecConfig
from ..graphs import Graphs
from ..pace import FREE, Price
from ..rotary import Rotary
from ..tree import Tree, grow_tree
from .base import Decided, Draft, Kept
from .working_cache import WorkingCache


@dataclass
class KeptCache(Kept):
    """Holds a draft's full cache of a text, between two generations.

    Attributes:
        full: rows of the text's tokens.
        chosen: [C] bool, chunks of its beginning whose rows were filled; None: all of them were.
    """

    full: KVCache
    chosen: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Count the bytes that it takes."""
        return self.full.num_bytes

    def share(self) -> None:
        self.full.share()

    def fork(self) -> KeptCache:
        return KeptCache(self.full.fork(), self.chosen)

    def parts(self) -> dict:
        return {"full": self.full.parts(), "chosen": self.chosen}


class CachedDraft(Draft):
    """Drafts with a model that attends to its full cache, a recent window, or retrieved chunks.

    Args:
        config: tree and cache options.

    Attributes:
        caches: of the generation under way, None outside of one.
    """

    caches: WorkingCache | None = None

    #: [V] int64, the target's id of each entry of the logits; None: the same ids
    vocabulary: Tensor | None = None

    def __init__(self, config: SpecConfig):
        self.config = config
        self.wants_scores = config.draft_cache == "retrieval"

    @abstractmethod
    def _make_cache(self, capacity: int) -> KVCache:
        """Make an empty cache for the draft's layers."""

    def _options(self) -> dict:
        """Return the options that the rows of the full cache depend on."""
        names = ("draft_cache", "draft_prefill_window", "chunk_size")
        return {name: getattr(self.config, name) for name in names}

    def _begin(self, max_length: int, rotary: Rotary | None, graphs: Graphs) -> None:
        """Make the caches of a generation of ``max_length`` tokens."""
        # Behind the committed rows: a growing tree, or a path of which not every token counts.
        capacity = max_length + 1 + max(self.config.tree_keys, self.config.max_depth + 1)
        full = self._make_cache(capacity)
        full.rotary_length = max_length
        self.caches = WorkingCache(full, self.config, rotary, graphs)
        self._graphs = graphs

    def _go_on(self, kept: KeptCache, length: int) -> None:
        """Have the first ``length`` rows of an earlier generation's cache, or as many as it has."""
        begun = self.caches.full
        kept.full.go_back(min(length, kept.full.length))
        kept.full.reserve(begun.capacity)
        kept.full.rotary_length = begun.rotary_length
        self.caches = WorkingCache(kept.full, self.config, self.caches.rotary, self._graphs)
        self.caches.chosen = kept.chosen

    def keep(self, decided) -> KeptCache | None:
        if self.caches is None:
            return None
        full = self.caches.collected()
        full.mark()
        return KeptCache(full, self.caches.chosen)

    def kept_from(self, parts) -> KeptCache:
        full = self._make_cache(parts["full"]["length"])
        full.take_parts(parts["full"])
        return KeptCache(full, parts["chosen"])

    def end(self) -> None:
        self.caches = self._graphs = None

    def retrieve(self, scores: Tensor) -> Tensor:
        return self.caches.refill(scores)

    def propose(self, decided, depth, price=FREE) -> Tree:
        decided = self._make_room(decided)
        given = decided.tokens, decided.features, decided.counts
        if decided.counts is not None:
            key = ("propose", len(decided), depth)
            return self._graphs.call(key, lambda *given: self._grow(depth, FREE, *given), *given)
        tree = self._grow(depth, price, *given)
        self.settle([len(decided)])
        return tree

    def settle(self, counts: list[int]) -> None:
        (count,) = counts
        self.caches.settle(count)

    def _make_room(self, decided: Decided) -> Decided:
        """Refill the working cache where the tokens and a tree do not fit behind what it has.

        Returns:
            What is still to be taken in.
        """
        caches = self.caches
        if not caches.fits(len(decided)):
            if not caches.fits_refilled(len(decided)):
                # After a rest of the gate: more tokens than the working cache has room for.
                self._fill(decided[:-1])
                decided = decided[-1:]
            caches.refill()
        elif caches.needs_refill:
            caches.refill()
        return decided

    def _grow(
        self,
        depth: int,
        price: Price,
        tokens: Tensor,
        features: Tensor | None,
        counts: Tensor | None,
    ) -> Tree:
        """Take in what is decided and grow a tree; on the device alone where that is free."""
        if counts is None:
            last, root = None, tokens[:, -1:]
        else:
            # Rows that do not count are behind those that do, and the tree is written over them.
            last = counts.long() - 1
            root = tokens.gather(1, last[:, None])
        logits = self._take_in(tokens, features, last)
        self.caches.commit(tokens.shape[1] if counts is None else counts)
        return grow_tree(root, logits, self.step, self.config, depth, self.vocabulary, price)

    @abstractmethod
    def _fill(self, decided: Decided) -> None:
        """Run decided tokens into the full cache alone, and commit them."""

    @abstractmethod
    def _take_in(self, tokens: Tensor, features: Tensor | None, last: Tensor | None) -> Tensor:
        """Run decided tokens into both caches, without committing them.

        Args:
            tokens: [B, T] int64.
            features: [B, T, F] or None.
            last: [B] int64, the last token that counts; None: the last one.

        Returns:
            [B, 1, V] logits behind it.
        """

    @abstractmethod
    def step(
        self, tokens: Tensor, level: int, mask: Tensor, num_keys: int, parents: Tensor
    ) -> Tensor:
        """Run a level of a growing tree, as ``grow_tree`` asks for it."""

    def _positions(self, count: int, first: int = 0) -> Tensor:
        """Return [B, count] int64, from the ``first`` one behind the committed ones on."""
        lens = self.caches.full.lens
        return lens[:, None] + torch.arange(first, first + count, device=lens.device)
