"""Any causal LM of `transformers` as a draft: full cache, a recent window, or retrieval."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention import Pass, PatchedModel
from ..cache import KVCache
from ..config import SpecConfig
from ..rotary import Rotary
from ..tree import Tree, grow_tree
from .base import Draft
from .working_cache import WorkingCache


class CausalLMDraft(Draft):
    """A small causal LM that shares the target's tokenizer.

    Args:
        model: the draft; batch 1.
        config: tree and cache options.
        rotary: how its keys carry positions; None where the draft cache is "full".
        vocab: entries of the target's vocabulary; either head may be padded.
    """

    def __init__(
        self, model: PreTrainedModel, config: SpecConfig, rotary: Rotary | None, vocab: int
    ):
        self.model = PatchedModel(model)
        self.config = config
        self.rotary = rotary
        self.device = model.device
        text_config = model.config.get_text_config()
        self.num_layers = text_config.num_hidden_layers
        self._vocab = min(vocab, text_config.vocab_size)
        self.wants_scores = config.draft_cache == "retrieval"

    def begin(self, prompt, max_length, cache) -> None:
        capacity = max_length + 1 + self.config.tree_keys
        full = KVCache(self.num_layers, capacity, batch=1, device=self.device)
        self._caches = WorkingCache(full, self.config, self.rotary)

    def end(self) -> None:
        self._caches = None

    def prefill(self, tokens, features) -> None:
        """Tokens into the full cache alone, without logits that anybody reads."""
        full, count = self._caches.full, tokens.shape[1]
        self._forward(tokens, full.length, self._caches.fill(count), last_only=True)
        full.advance(count)

    def retrieve(self, scores: Tensor) -> Tensor:
        return self._caches.refill(scores)

    def propose(self, tokens, depth, features) -> Tree:
        caches = self._caches
        if not caches.fits(tokens.shape[1]):
            # After a rest of the gate: more tokens than the working cache has room for.
            if tokens.shape[1] > 1:
                self.prefill(tokens[:, :-1], features)
            tokens = tokens[:, -1:]
            caches.refill()
        elif caches.needs_refill:
            caches.refill()
        count = tokens.shape[1]
        logits = self._forward(tokens, caches.full.length, caches.extend(count), last_only=True)
        caches.advance(count)
        self._first = caches.full.length
        if self.config.tree_shape == "fixed":
            depth = min(depth, len(self.config.tree_widths))
        return grow_tree(tokens[:, -1:], logits, self._step, self.config, depth)

    def _step(self, tokens: Tensor, level: int, mask: Tensor, num_keys: int, parents) -> Tensor:
        positions = torch.full_like(tokens, self._first + level)
        return self._logits(tokens, positions, self._caches.grow(level, mask, num_keys))

    def _forward(self, tokens: Tensor, first: int, state: Pass, last_only: bool = False) -> Tensor:
        positions = torch.arange(first, first + tokens.shape[1], device=self.device)[None]
        return self._logits(tokens, positions, state, last_only)

    def _logits(self, tokens, positions, state: Pass, last_only: bool = False) -> Tensor:
        # An id beyond the draft's vocabulary is of the target's padding; any embedding will do.
        tokens = tokens.clamp(max=self._vocab - 1)
        return self.model.forward(tokens, positions, state, last_only)[..., : self._vocab]
