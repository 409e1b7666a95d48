"""Makes the target its own draft, on a small part of its own cache.

The target's layers run over a working cache of retrieved chunks (TriForce, arXiv 2404.11912, here
with the fused scores of SpecExtend) or over sinks and a recent window (MagicDec, arXiv 2408.11049).
No draft model is needed; it pays where attention over the context costs more than the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..cache import Pass
from ..config import SpecConfig
from ..rotary import Rotary
from ..target import Target
from ..tree import Tree, grow_tree
from .base import Decided, Source, Tokenizers
from .causal_lm import CausalLMDraft
from .working_cache import WorkingCache


class SelfDraft(CausalLMDraft):
    """Drafts with the target, on a working cache that is filled from its own.

    There is no full cache besides the target's: verified keys and values are copied from there, so
    that nothing that was computed from a part of the context stays.

    Args:
        model: the target.
        config: tree and cache options; ``draft_cache`` is "retrieval" or "window".
        vocab: entries of its vocabulary.
        rotary: how its keys carry positions; None: to be found out.
    """

    kind = word = "self"
    cache_kinds = ("window", "retrieval")
    num_parameters = 0
    causal_lm = None

    def __init__(
        self, model: PreTrainedModel, config: SpecConfig, vocab: int, rotary: Rotary | None = None
    ):
        if config.draft_cache not in self.cache_kinds:
            raise ValueError(
                'draft="self" needs draft_cache="retrieval" or "window": on its full cache the '
                "target is no faster as its own draft"
            )
        super().__init__(model, config, vocab, rotary)
        if self.patched.keeps_states:
            raise ValueError(
                f'draft="self" does not serve {type(model).__name__}: its recurrent or '
                "convolutional layers have no part of their state to leave out"
            )

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return isinstance(source, str) and source == cls.word

    @classmethod
    def load(
        cls, source: Source, target: Target, config: SpecConfig, tokenizers: Tokenizers
    ) -> SelfDraft:
        return cls(target.model, config, target.vocab_size)

    def with_config(self, config: SpecConfig) -> SelfDraft:
        return SelfDraft(self.patched.model, config, self._target_vocab, self.rotary)

    def identity(self) -> dict:
        return {"kind": self.kind}  # all that it has is the target's

    def check_length(self, prompt: int, total: int) -> None:
        """Refuse nothing: what the target can hold is known of the target."""

    def begin(self, prompt, max_length, cache, graphs) -> None:
        self.caches = WorkingCache(cache, self.config, self.rotary, graphs)
        self._graphs = graphs
        # Rows of the target's cache that the working cache stands for; known on the device alone.
        self._copied = torch.zeros_like(cache.lens)

    def resume(self, kept, length, start) -> None:
        """Do nothing: the target's cache is all there is."""

    def keep(self, decided) -> None:
        """Return None: the target's cache is kept as the target's."""

    def late_part(self, length) -> float:
        return 0.0  # the target has read it

    def finish_prefill(self, scores) -> bool:
        """Do nothing: the target's prefill has filled its cache."""
        return True

    def retrieve(self, scores: Tensor | None) -> Tensor:
        ids = self.caches.refill(scores)
        self._copied.copy_(self.caches.full.lens)
        return ids

    def settle(self, counts: list[int]) -> None:
        # A bound: a refill since the last call has brought some of these rows already.
        (count,) = counts
        self.caches.work.settle(count)

    def _make_room(self, decided: Decided) -> Decided:
        if self.caches.needs_refill or not self.caches.fits(len(decided) + 1):  # and the root
            self.retrieve(None)
        return decided

    def _grow(self, depth, price, tokens, features, counts) -> Tree:
        work = self.caches.work
        self._copy(tokens.shape[1])
        root = tokens[:, -1:] if counts is None else tokens.gather(1, counts.long()[:, None] - 1)
        # The root stays in the working cache while the tree grows behind it.
        logits = self.logits(root, self._positions(1), Pass(work, [(work, work.lens)], 1))
        work.commit(1)
        tree = grow_tree(root, logits, self.step, self.config, depth, price=price)
        work.commit(-1)
        return tree

    def step(self, tokens, level, mask, num_keys, parents) -> Tensor:
        # Positions are counted from the target's committed rows, behind which the root comes first.
        positions = self._positions(1, 1 + level).expand_as(tokens)
        return self.logits(tokens, positions, self.caches.grow(level, mask, num_keys))

    def _copy(self, most: int) -> None:
        """Copy the target's new rows, ``most`` of them at most, behind the working cache's."""
        full, work = self.caches.full, self.caches.work
        rows = self._copied + torch.arange(most, device=full.lens.device)
        rows = rows.clamp(max=full.capacity - 1)  # what is beyond the new ones does not count
        for ours, source in zip(work.kv_layers, full.kv_layers, strict=True):
            k, v = (x[:, rows] for x in (source.k, source.v))  # index_select copies the cache first
            ops.append_kv(ours.k, ours.v, k, v, work.lens)
        work.commit(full.lens - self._copied)
        self._copied.copy_(full.lens)
