"""The target as its own draft, on a small part of its own cache.

The target's layers run over a working cache of retrieved chunks (TriForce, arXiv 2404.11912, here
with the fused scores of SpecExtend) or over sinks and a recent window (MagicDec, arXiv 2408.11049).
No draft model is needed; it pays where attention over the context costs more than the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..attention import Pass, PatchedModel
from ..config import SpecConfig
from ..rotary import probe_rotary
from ..tree import Tree, grow_tree
from .causal_lm import CausalLMDraft
from .working_cache import WorkingCache


class SelfDraft(CausalLMDraft):
    """The target on a working cache that is filled from its own.

    There is no full cache besides the target's: verified keys and values are copied from there, so
    that nothing that was computed from a part of the context stays.

    Args:
        target: the model of the loop.
        config: tree and cache options; ``draft_cache`` is "retrieval" or "window".
        vocab: entries of its vocabulary.
    """

    caches = ("window", "retrieval")
    num_parameters = 0
    _root_rows = 1

    def __init__(self, target: PatchedModel, config: SpecConfig, vocab: int):
        if config.draft_cache not in self.caches:
            raise ValueError(
                'draft="self" needs draft_cache="retrieval" or "window": on its full cache the '
                "target is no faster as its own draft"
            )
        super().__init__(target.model, config, probe_rotary(target.model), vocab)

    def begin(self, prompt, max_length, cache) -> None:
        self._caches = WorkingCache(cache, self.config, self.rotary, self.graphs)
        # Rows of the target's cache that the working cache stands for; known on the device alone.
        self._copied = torch.zeros_like(cache.lens)

    def prefill(self, tokens, features) -> None:
        """The target's prefill has filled its cache."""

    def retrieve(self, scores: Tensor | None) -> Tensor:
        ids = self._caches.refill(scores)
        self._copied.copy_(self._caches.full.lens)
        return ids

    def propose(self, tokens, depth, features, count=None) -> Tree:
        caches, width = self._caches, tokens.shape[1]
        if caches.needs_refill or not caches.fits(width + self._root_rows):
            self.retrieve(None)
        if count is not None:
            key = ("propose", width, depth)
            return self.graphs.call(key, lambda *given: self._grow(depth, *given), tokens, count)
        tree = self._grow(depth, tokens, None)
        self.settle(width)
        return tree

    def settle(self, count: int) -> None:
        # A bound: a refill since the last call has brought some of these rows already.
        self._caches.work.settle(count)

    def _grow(self, depth: int, tokens: Tensor, count: Tensor | None) -> Tree:
        work = self._caches.work
        self._copy(tokens.shape[1])
        root = tokens[:, -1:] if count is None else tokens.index_select(1, count.long() - 1)
        # The root stays in the working cache while the tree grows behind it.
        logits = self._logits(root, self._positions(1), Pass(work, [(work, work.lens)], 1))
        work.commit(1)
        tree = grow_tree(root, logits, self._step, self.config, depth)
        work.commit(-1)
        return tree

    def _copy(self, most: int) -> None:
        """The target's new rows, ``most`` of them at most, behind those of the working cache."""
        full, work = self._caches.full, self._caches.work
        rows = self._copied + torch.arange(most, device=self.device)
        rows = rows.clamp(max=full.capacity - 1)  # what is beyond the new ones does not count
        for ours, source in zip(work.layers, full.layers, strict=True):
            k, v = (x[:, rows] for x in (source.k, source.v))  # index_select copies the cache first
            ops.append_kv(ours.k, ours.v, k, v, work.lens)
        work.commit(full.lens - self._copied)
        self._copied.copy_(full.lens)
