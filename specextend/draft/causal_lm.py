"""Any causal LM of `transformers` as a draft: full cache, a recent window, or retrieval."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention import Pass, PatchedModel
from ..cache import KVCache
from ..config import SpecConfig
from ..graphs import obstacle
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

    takes_count = True
    _root_rows = 0  # of the root, behind the committed rows, while a tree grows behind it

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

    def obstacle(self) -> str | None:
        return obstacle(self.model.model)

    @property
    def num_parameters(self) -> int:
        return self.model.model.num_parameters()

    def begin(self, prompt, max_length, cache) -> None:
        # Behind the committed rows: a growing tree, or a path of which not every token counts.
        capacity = max_length + 1 + max(self.config.tree_keys, self.config.max_depth + 1)
        full = KVCache(self.num_layers, capacity, batch=1, device=self.device)
        self._caches = WorkingCache(full, self.config, self.rotary, self.graphs)
        self._last_position = max_length - 1

    def end(self) -> None:
        self._caches = None

    def prefill(self, tokens, features) -> None:
        """Tokens into the full cache alone, without logits that anybody reads."""
        full, count = self._caches.full, tokens.shape[1]
        self._logits(tokens, self._positions(count), self._caches.fill(count), last_only=True)
        full.advance(count)

    def retrieve(self, scores: Tensor) -> Tensor:
        return self._caches.refill(scores)

    def propose(self, tokens, depth, features, count=None) -> Tree:
        caches = self._caches
        if not caches.fits(tokens.shape[1]):
            if not caches.fits_refilled(tokens.shape[1]):
                # After a rest of the gate: more tokens than the working cache has room for.
                self.prefill(tokens[:, :-1], features)
                tokens = tokens[:, -1:]
            caches.refill()
        elif caches.needs_refill:
            caches.refill()
        if self.config.tree_shape == "fixed":
            depth = min(depth, len(self.config.tree_widths))
        if count is not None:
            key = ("propose", tokens.shape[1], depth)
            return self.graphs.call(key, lambda *given: self._grow(depth, *given), tokens, count)
        tree = self._grow(depth, tokens, None)
        caches.settle(tokens.shape[1])
        return tree

    def settle(self, count: int) -> None:
        self._caches.settle(count)

    def _grow(self, depth: int, tokens: Tensor, count: Tensor | None) -> Tree:
        """Take in ``tokens`` and grow a tree; on the device alone."""
        caches, width = self._caches, tokens.shape[1]
        positions, state = self._positions(width), caches.extend(width)
        if count is None:
            root = tokens[:, -1:]
            logits = self._logits(tokens, positions, state, last_only=True)
        else:
            # Rows that do not count are behind those that do, and the tree is written over them.
            last = count.long() - 1
            root = tokens.index_select(1, last)
            positions = positions.clamp(max=self._last_position)
            logits = self._logits(tokens, positions, state, row=last)
        caches.commit(width if count is None else count)
        return grow_tree(root, logits, self._step, self.config, depth)

    def _step(self, tokens: Tensor, level: int, mask: Tensor, num_keys: int, parents) -> Tensor:
        positions = self._positions(1, self._root_rows + level).expand_as(tokens)
        return self._logits(tokens, positions, self._caches.grow(level, mask, num_keys))

    def _positions(self, count: int, first: int = 0) -> Tensor:
        """[1, count] int64, from the ``first`` one behind the committed ones on."""
        steps = torch.arange(first, first + count, device=self.device)
        return self._caches.full.lens[:, None] + steps

    def _logits(
        self,
        tokens: Tensor,
        positions: Tensor,
        state: Pass,
        last_only: bool = False,
        row: Tensor | None = None,
    ) -> Tensor:
        # An id beyond the draft's vocabulary is of the target's padding, one below 0 of a row that
        # does not count; any embedding will do.
        tokens = tokens.clamp(0, self._vocab - 1)
        return self.model.forward(tokens, positions, state, last_only, row)[..., : self._vocab]
