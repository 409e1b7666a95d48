"""Any causal LM of `transformers` as a draft, with its full cache, a recent window, or retrieval.
 Two caches: the full one has the keys of every token at its absolute position; the working one is
what the draft attends to. A gather takes chunks from the full cache into the working one and moves
their keys to compact positions that end where the newest chunk ends: distances are those of a short
input, and new tokens go on at their absolute positions, so their keys are the same in both caches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..attention import Pass, PatchedModel
from ..cache import KVCache
from ..config import SpecConfig
from ..rotary import Rotary
from ..tree import Tree, grow_tree
from .base import Draft


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
        widths = config.tree_widths if config.tree_shape == "fixed" else (
            (config.tree_width,) * config.tree_depth
        )  # fmt: skip
        self._tree_keys = sum(widths)

    def begin(self, prompt, max_length, progress=None) -> None:
        config = self.config
        self._full = self._cache(max_length + 1 + self._tree_keys)
        self._work = self._full
        self._scores: Tensor | None = None
        self._extend(prompt, progress)
        if config.draft_cache != "full":
            # Between two gathers a round adds at most a whole path and the next root.
            room = (config.retrieve_every + 1) * (config.tree_depth + 2)
            self._work = self._cache(config.budget + max(room, config.chunk_size) + self._tree_keys)
            if self._full.length:
                self._gather(self._select())

    def end(self) -> None:
        self._full = self._work = self._scores = None

    def _cache(self, capacity: int) -> KVCache:
        return KVCache(self.num_layers, capacity, batch=1, device=self.device)

    def _extend(self, tokens: Tensor, progress: Callable[[int, int], None] | None = None) -> None:
        """Take tokens into the full cache alone, in chunks, without logits that anybody reads."""
        config, total = self.config, tokens.shape[1]
        window = 0 if config.draft_cache == "full" else config.draft_prefill_window or 0
        chunk = config.prefill_chunk or max(total, 1)
        for start in range(0, total, chunk):
            part = tokens[:, start : start + chunk]
            state = Pass(self._full, [(self._full, self._full.lens)], part.shape[1], window=window)
            positions = torch.arange(part.shape[1], device=self.device)[None] + self._full.length
            self._forward(part, positions, state, last_only=True)
            self._full.advance(part.shape[1])
            if progress is not None:
                progress(min(start + chunk, total), total)

    def _select(self) -> Tensor:
        """Chunk ids [1, budget] of the next working cache, from the last scores or from recency."""
        config, full = self.config, self._full
        scores = self._scores
        if scores is None:
            num_chunks = -(-full.capacity // config.chunk_size)
            scores = torch.zeros(1, num_chunks, device=self.device)
        recent = max(1, config.recent_chunks)  # the newest chunk anchors positions
        if config.draft_cache == "window" or self._scores is None:
            recent = config.budget_chunks - config.sink_chunks
        ids, self._counts = ops.select_chunks(
            scores,
            full.lens,
            chunk_size=config.chunk_size,
            budget=config.budget_chunks,
            num_sinks=config.sink_chunks,
            num_recent=recent,
        )
        return ids

    def _gather(self, ids: Tensor) -> None:
        config, full, work = self.config, self._full, self._work
        for ours, source in zip(work.layers, full.layers, strict=True):
            if not ours.is_initialized:
                ours.like(source)
        work.lens = ops.gather_chunks(
            [layer.k for layer in full.layers],
            [layer.v for layer in full.layers],
            [layer.k for layer in work.layers],
            [layer.v for layer in work.layers],
            ids,
            self._counts,
            full.lens,
            self.rotary.inv_freq,
            chunk_size=config.chunk_size,
            interleaved=self.rotary.interleaved,
            right_aligned=True,
        )
        # The host knows the length that the device computes: the newest chunk is always selected.
        num_chunks = -(-full.length // config.chunk_size)
        dropped = max(0, num_chunks - config.budget_chunks)
        work.length = full.length - dropped * config.chunk_size

    def retrieve(self, scores: Tensor) -> Tensor:
        self._scores = scores
        ids = self._select()
        self._gather(ids)
        return ids

    def propose(self, tokens: Tensor, depth: int) -> Tree:
        full, work = self._full, self._work
        if work is not full and (
            work.length + tokens.shape[1] + self._tree_keys > work.capacity or not work.length
        ):
            # After a rest of the gate: more tokens than the working cache has room for.
            self._extend(tokens[:, :-1])
            tokens = tokens[:, -1:]
            if full.length:
                self._gather(self._select())
        count = tokens.shape[1]
        writes = [(work, work.lens)] if work is full else [(work, work.lens), (full, full.lens)]
        positions = torch.arange(count, device=self.device)[None] + full.length
        logits = self._forward(tokens, positions, Pass(work, writes, count), last_only=True)
        work.advance(count)
        if work is not full:
            full.advance(count)
        depth = (
            min(depth, len(self.config.tree_widths)) if self.config.tree_shape == "fixed" else depth
        )
        return grow_tree(tokens[:, -1:], logits, self._step, self.config, depth)

    def _step(self, tokens: Tensor, level: int, mask: Tensor, num_keys: int) -> Tensor:
        work, count = self._work, tokens.shape[1]
        depths = torch.full_like(tokens, level, dtype=torch.int32)
        self._key_depths = depths if level == 0 else torch.cat([self._key_depths, depths], 1)
        positions = torch.full_like(tokens, self._full.length + level)
        state = Pass(
            work,
            [(work, work.lens + (num_keys - count))],
            num_keys,
            mask=mask,
            q_depths=depths,
            k_depths=self._key_depths,
        )
        return self._forward(tokens, positions, state)

    def _forward(self, tokens, positions, state: Pass, last_only: bool = False) -> Tensor:
        # An id beyond the draft's vocabulary is of the target's padding; any embedding will do.
        tokens = tokens.clamp(max=self._vocab - 1)
        return self.model.forward(tokens, positions, state, last_only)[..., : self._vocab]
