"""The target as its own draft, on a small part of its own cache.

The target's layers run over a working cache of retrieved chunks (TriForce, arXiv 2404.11912, here
with the fused scores of SpecExtend) or over sinks and a recent window (MagicDec, arXiv 2408.11049).
No draft model is needed; it pays where attention over the context costs more than the weights.
"""

from __future__ import annotations

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

    takes_count = False
    _root_rows = 1
    caches = ("window", "retrieval")
    num_parameters = 0

    def __init__(self, target: PatchedModel, config: SpecConfig, vocab: int):
        if config.draft_cache not in self.caches:
            raise ValueError(
                'draft="self" needs draft_cache="retrieval" or "window": on its full cache the '
                "target is no faster as its own draft"
            )
        super().__init__(target.model, config, probe_rotary(target.model), vocab)

    def obstacle(self) -> str | None:
        return "it copies rows of the target's cache by the host's count"

    def begin(self, prompt, max_length, cache) -> None:
        self._caches = WorkingCache(cache, self.config, self.rotary)
        self._copied = 0  # rows of the target's cache that the working cache stands for

    def prefill(self, tokens, features) -> None:
        """The target's prefill has filled its cache."""

    def retrieve(self, scores: Tensor) -> Tensor:
        self._copied = self._caches.full.length
        return super().retrieve(scores)

    def propose(self, tokens, depth, features) -> Tree:
        root = tokens[:, -1:]
        caches, length = self._caches, self._caches.full.length
        work = caches.work
        if caches.needs_refill or not caches.fits(length - self._copied + 1):
            caches.refill()
        elif length:
            self._copy(self._copied, length)
        self._copied = length
        # The root stays in the working cache while the tree grows behind it.
        state = Pass(work, [(work, work.lens)], 1)
        logits = self._logits(root, self._positions(1), state)
        work.advance(1)
        tree = grow_tree(root, logits, self._step, self.config, depth)
        work.advance(-1)
        return tree

    def _copy(self, first: int, end: int) -> None:
        """Rows [first, end) of the target's cache behind those of the working cache."""
        work, rows = self._caches.work, slice(first, end)
        for ours, source in zip(work.layers, self._caches.full.layers, strict=True):
            if not ours.is_initialized:
                ours.like(source)
            ops.append_kv(ours.k, ours.v, source.k[:, rows], source.v[:, rows], work.lens)
        work.advance(end - first)
