"""Drafts with EAGLE heads (EAGLE-1, 2, 3 and 3.1), and retrieves on the head's own keys.

A row of the head's cache pairs the target's hidden state at a position with the token behind it.
Rows of proposed nodes, made from the head's own guesses of hidden states, stay behind the committed
ones; after each verification the decided tokens' rows are made anew from the true ones.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from .. import ops
from ..cache import KVCache, Pass
from ..config import SpecConfig
from ..pace import FREE
from ..products import OwnProducts
from ..rotary import Rotary
from ..target import Target, weights_identity
from ..tree import Tree
from .base import Decided, Source, Tokenizers
from .cached import CachedDraft, KeptCache
from .checkpoint import Checkpoint
from .eagle_checkpoint import head_version, load_head
from .eagle_head import Attend, EagleHead


class EagleDraft(CachedDraft):
    """Drafts with a head that was trained for the target.

    A row of its caches is that of a token and of the features that it was decided from, so that the
    prompt's first token has none.

    Args:
        head: on the target's device, in its dtype.
        config: tree and cache options.
    """

    def __init__(self, head: EagleHead, config: SpecConfig):
        super().__init__(config)
        self.head = head
        self._products = OwnProducts(head, *head.shared)
        self.kind = f"eagle{head.config.version}"
        self.feature_layers = head.config.feature_layers
        self.vocabulary = head.vocabulary

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return isinstance(source, Checkpoint) and head_version(source) is not None

    @classmethod
    def load(
        cls, source: Source, target: Target, config: SpecConfig, tokenizers: Tokenizers
    ) -> EagleDraft:
        return cls(load_head(source, target.model), config)

    def with_config(self, config: SpecConfig) -> EagleDraft:
        return EagleDraft(self.head, config)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.head.parameters())

    def identity(self) -> dict:
        config, weights = asdict(self.head.config), weights_identity(self.head)
        return {"kind": self.kind, "config": config, **weights, "options": self._options()}

    def obstacle(self) -> str | None:
        return self.head.obstacle()

    def begin(self, prompt, max_length, cache, graphs) -> None:
        frequencies = self.head.rope(prompt.device).inv_freq.float()
        layers = self.head.config.num_layers
        rotary = Rotary(frequencies.expand(layers, -1).contiguous(), interleaved=False)
        self._begin(max_length, rotary, graphs)
        self._skip = 1  # the prompt's first token was decided from nothing

    def _make_cache(self, capacity: int) -> KVCache:
        device = next(self.head.parameters()).device
        return KVCache(self.head.config.num_layers, capacity, 1, device)

    def reusable(self, kept, length) -> int:
        # The next row is that of the token behind the last row's, and needs what the target saw at
        # that token: it reads it again.
        return 0 if kept is None else max(0, min(length - 1, kept.full.length))

    def resume(self, kept, length, start) -> None:
        if start:
            self._go_on(kept, start)

    def keep(self, decided) -> KeptCache | None:
        if decided is not None and self.caches is not None:
            self.prefill(decided)
        return super().keep(decided)

    def end(self) -> None:
        super().end()
        self._hidden = None

    def prefill(self, decided) -> None:
        decided = self._from_features(decided)
        if len(decided):
            self._fill(decided)

    def propose(self, decided, depth, price=FREE) -> Tree:
        with self._products.active():
            return super().propose(self._from_features(decided), depth, price)

    def _from_features(self, decided: Decided) -> Decided:
        """Return the tokens that were decided from features: all but the first of all."""
        if self._skip:
            self._skip, decided = 0, decided[1:]
        return decided

    def _fill(self, decided: Decided) -> None:
        full, count = self.caches.full, len(decided)
        self._run(decided.tokens, decided.features, self.caches.fill(count))
        full.advance(count)

    def _take_in(self, tokens, features, last) -> Tensor:
        if last is None:
            last = torch.full(tokens.shape[:1], tokens.shape[1] - 1, device=tokens.device)
        else:
            tokens = tokens.clamp(min=0)  # of rows that do not count
        out, hidden = self._run(tokens, features, self.caches.extend(tokens.shape[1]))
        self._hidden = hidden.index_select(1, last)
        return self.head.logits(out.index_select(1, last))

    def _run(self, tokens: Tensor, features: Tensor, state: Pass) -> tuple[Tensor, Tensor]:
        """Run the head over decided tokens; return what logits are made of, and hidden states."""
        attention = attend(state, self.head.config.windows)
        positions = self._positions(tokens.shape[1])
        return self.head(tokens, self.head.fuse(features), positions, attention)

    def step(self, tokens, level, mask, num_keys, parents) -> Tensor:
        rows = parents[..., None].expand(-1, -1, self._hidden.shape[-1])
        attention = attend(self.caches.grow(level, mask, num_keys), self.head.config.windows)
        positions = self._positions(1, level)
        out, self._hidden = self.head(tokens, self._hidden.gather(1, rows), positions, attention)
        return self.head.logits(out)


def attend(state: Pass, windows: tuple[int, ...]) -> Attend:
    """Give a head's layers their attention in a pass, on our kernels."""

    def attention(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer = state.cache.layers[index]
        state.write(index, k.transpose(1, 2), v.transpose(1, 2))
        window = min((w for w in (windows[index], state.window) if w), default=0)
        out, _, _ = ops.tree_attention(
            q,
            layer.k,
            layer.v,
            state.cache.lens,
            state.mask,
            num_tree_keys=state.num_tree_keys,
            window=window,
            q_depths=state.q_depths if window else None,
            k_depths=state.k_depths if window else None,
        )
        return out

    return attention
