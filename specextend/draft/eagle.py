"""EAGLE heads as drafts (EAGLE-1, 2, 3 and 3.1), with retrieval on the head's own keys.

A row of the head's cache pairs the target's hidden state at a position with the token behind it.
Rows of proposed nodes, made from the head's own guesses of hidden states, stay behind the committed
ones; after each verification the decided tokens' rows are made anew from the true ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..attention import Pass, PatchedModel
from ..cache import KVCache
from ..config import SpecConfig
from ..rotary import Rotary
from ..tree import Tree, grow_tree
from .base import Draft
from .checkpoint import Checkpoint
from .eagle_checkpoint import head_version, load_head
from .eagle_head import Attend, EagleHead
from .working_cache import WorkingCache


class EagleDraft(Draft):
    """A head trained for the target.

    Args:
        head: on the target's device, in its dtype.
        config: tree and cache options.
    """

    takes_count = True

    def __init__(self, head: EagleHead, config: SpecConfig):
        self.head = head
        self.config = config
        self.feature_layers = head.config.feature_layers
        self.wants_scores = config.draft_cache == "retrieval"
        self._vocabulary = head.vocabulary

    @staticmethod
    def recognises(checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is, or is meant to be, an EAGLE head."""
        return head_version(checkpoint) is not None

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, target: PatchedModel, config: SpecConfig
    ) -> EagleDraft:
        """Load a head for ``target``."""
        return cls(load_head(checkpoint, target.model), config)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.head.parameters())

    def obstacle(self) -> str | None:
        return self.head.obstacle()

    def begin(self, prompt, max_length, cache) -> None:
        config, layers, device = self.config, self.head.config.num_layers, prompt.device
        # Behind the committed rows: a growing tree, or a path of which not every token counts.
        capacity = max_length + 1 + max(config.tree_keys, config.max_depth + 1)
        full = KVCache(layers, capacity, batch=1, device=device)
        frequencies = self.head.rope(device).inv_freq.float()
        rotary = Rotary(frequencies.expand(layers, -1).contiguous(), interleaved=False)
        self._caches = WorkingCache(full, config, rotary, self.graphs)
        self._features: Tensor | None = None  # of the last tokens, whose next ones are not decided
        self._skip = 1  # the prompt's first token stands behind no hidden state

    def end(self) -> None:
        self._caches = self._features = self._hidden = None

    def prefill(self, tokens, features) -> None:
        tokens, features = self._pair(tokens, features)
        if tokens.shape[1]:
            self._fill(tokens, features)

    def retrieve(self, scores: Tensor) -> Tensor:
        return self._caches.refill(scores)

    def propose(self, tokens, depth, features, count=None) -> Tree:
        caches = self._caches
        if count is None:
            tokens, features = self._pair(tokens, features)
        # Else the loop gives what the last round emitted, as many features as tokens.
        if not caches.fits(tokens.shape[1]):
            if not caches.fits_refilled(tokens.shape[1]):
                # After a rest of the gate: more tokens than the working cache has room for.
                self._fill(tokens[:, :-1], features[:, :-1])
                tokens, features = tokens[:, -1:], features[:, -1:]
            caches.refill()
        elif caches.needs_refill:
            caches.refill()
        if count is not None:
            key = ("propose", tokens.shape[1], depth)
            return self.graphs.call(
                key, lambda *given: self._grow(depth, *given), tokens, features, count
            )
        tree = self._grow(depth, tokens, features, None)
        caches.settle(tokens.shape[1])
        return tree

    def settle(self, count: int) -> None:
        self._caches.settle(count)

    def _pair(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Each token and the features of the one before it; the rest is kept."""
        if self._features is not None:
            features = torch.cat([self._features, features], 1)
        tokens, self._skip = tokens[:, self._skip :], 0
        count = tokens.shape[1]
        self._features = features[:, count:].clone()  # what it is part of can be freed
        return tokens, features[:, :count]

    def _fill(self, tokens: Tensor, features: Tensor) -> None:
        """Tokens into the full cache alone."""
        full, count = self._caches.full, tokens.shape[1]
        self._take(tokens, features, self._caches.fill(count))
        full.advance(count)

    def _take(self, tokens: Tensor, features: Tensor, state: Pass) -> tuple[Tensor, Tensor]:
        """The head over decided tokens."""
        positions = self._positions(0, tokens.shape[1])
        return self.head(
            tokens, self.head.fuse(features), positions, attend(state, self.head.config.windows)
        )

    def _grow(self, depth: int, tokens: Tensor, features: Tensor, count: Tensor | None) -> Tree:
        """Take in ``tokens`` and grow a tree; on the device alone."""
        caches, width = self._caches, tokens.shape[1]
        if count is None:
            last = torch.full((1,), width - 1, device=tokens.device)
        else:
            # Rows that do not count are behind those that do, and the tree is written over them.
            last = count.long() - 1
            tokens = tokens.clamp(min=0)
        out, hidden = self._take(tokens, features, caches.extend(width))
        caches.commit(width if count is None else count)
        self._hidden = hidden.index_select(1, last)
        logits = self.head.logits(out.index_select(1, last))
        root = tokens.index_select(1, last)
        return grow_tree(root, logits, self._step, self.config, depth, self._vocabulary)

    def _step(self, tokens: Tensor, level: int, mask: Tensor, num_keys: int, parents) -> Tensor:
        rows = parents[..., None].expand(-1, -1, self._hidden.shape[-1])
        attention = attend(self._caches.grow(level, mask, num_keys), self.head.config.windows)
        out, self._hidden = self.head(
            tokens, self._hidden.gather(1, rows), self._positions(level, 1), attention
        )
        return self.head.logits(out)

    def _positions(self, first: int, count: int) -> Tensor:
        """[1, count] int64, from the ``first`` one behind the committed ones on."""
        lens = self._caches.full.lens
        return lens[:, None] + torch.arange(first, first + count, device=lens.device)


def attend(state: Pass, windows: tuple[int, ...]) -> Attend:
    """Attention of a head's layers in a pass, on our kernels."""

    def attention(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer = state.cache.layers[index]
        state.write(layer, k.transpose(1, 2), v.transpose(1, 2))
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
