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
from .eagle_head import Attend, EagleHead, head_version
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
        return cls(EagleHead.load(checkpoint, target.model), config)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.head.parameters())

    def obstacle(self) -> None:
        return None

    def begin(self, prompt, max_length, cache) -> None:
        layers, device = self.head.config.num_layers, prompt.device
        # Behind the committed rows: a growing tree, or a path of which not every token counts.
        rows = max_length + 1 + max(self.config.tree_keys, self.config.max_depth + 1)
        full = KVCache(layers, rows, batch=1, device=device)
        frequencies = self.head.rope(device).inv_freq.float()
        rotary = Rotary(frequencies.expand(layers, -1).contiguous(), interleaved=False)
        self._caches = WorkingCache(full, self.config, rotary, self.graphs)
        self._features: Tensor | None = None  # of the last tokens, whose next ones are not decided
        self._skip = 1  # the prompt's first token stands behind no hidden state

    def end(self) -> None:
        self._caches = self._features = self._hidden = None

    def prefill(self, tokens, features) -> None:
        tokens, hidden = self._pair(tokens, features)
        if tokens.shape[1]:
            self._fill(tokens, hidden)

    def retrieve(self, scores: Tensor) -> Tensor:
        return self._caches.refill(scores)

    def propose(self, tokens, depth, features, count=None) -> Tree:
        if count is None:
            tokens, hidden = self._pair(tokens, features)
        else:  # the last round's tokens, and as many hidden states: nothing is left over
            hidden = features
        caches = self._caches
        if not caches.fits(tokens.shape[1]):
            if not caches.fits_refilled(tokens.shape[1]):
                # After a rest of the gate: more tokens than the working cache has room for.
                self._fill(tokens[:, :-1], hidden[:, :-1])
                tokens, hidden = tokens[:, -1:], hidden[:, -1:]
            caches.refill()
        elif caches.needs_refill:
            caches.refill()
        if count is not None:
            key = ("propose", tokens.shape[1], depth)
            return self.graphs.call(
                key,
                lambda tokens, hidden, count: self._grow(
                    depth, tokens, self.head.fuse(hidden), count
                ),
                tokens,
                hidden,
                count,
            )
        tree = self._grow(depth, tokens, hidden, None)
        caches.settle(tokens.shape[1])
        return tree

    def settle(self, count: int) -> None:
        self._caches.settle(count)

    def _grow(self, depth: int, tokens: Tensor, hidden: Tensor, count: Tensor | None) -> Tree:
        """Take in ``tokens`` behind their fused hidden states and grow a tree; on the device."""
        width = tokens.shape[1]
        if count is None:
            last = torch.full((1,), width - 1, device=tokens.device)
        else:
            # Rows that do not count are behind those that do, and the tree is written over them.
            tokens, last = tokens.clamp(min=0), count.long() - 1
        out, hidden = self._forward(tokens, hidden, self._caches.extend(width))
        self._caches.commit(width if count is None else count)
        self._hidden = hidden.index_select(1, last)
        return grow_tree(
            tokens.index_select(1, last),
            self.head.logits(out.index_select(1, last)),
            self._step,
            self.config,
            depth,
            self.head.vocabulary,
        )

    def _pair(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Each token and the fused hidden state of the one before it; the rest is kept."""
        if self._features is not None:
            features = torch.cat([self._features, features], 1)
        tokens, self._skip = tokens[:, self._skip :], 0
        count = tokens.shape[1]
        self._features = features[:, count:].clone()  # what it is part of can be freed
        return tokens, self.head.fuse(features[:, :count])

    def _fill(self, tokens: Tensor, hidden: Tensor) -> None:
        """Tokens into the full cache alone."""
        full, count = self._caches.full, tokens.shape[1]
        self._forward(tokens, hidden, self._caches.fill(count))
        full.advance(count)

    def _forward(self, tokens: Tensor, hidden: Tensor, state: Pass) -> tuple[Tensor, Tensor]:
        positions = self._positions(tokens.shape[1])
        return self.head(tokens, hidden, positions, attend(state, self.head.config.windows))

    def _positions(self, count: int, first: int = 0) -> Tensor:
        """[1, count] int64, from the ``first`` one behind the committed ones on."""
        lens = self._caches.full.lens
        return lens[:, None] + torch.arange(first, first + count, device=lens.device)

    def _step(self, tokens: Tensor, level: int, mask: Tensor, num_keys: int, parents) -> Tensor:
        rows = parents[..., None].expand(-1, -1, self._hidden.shape[-1])
        positions = self._positions(1, level).expand_as(tokens)
        attention = attend(self._caches.grow(level, mask, num_keys), self.head.config.windows)
        hidden = self._hidden.gather(1, rows)
        out, self._hidden = self.head(tokens, hidden, positions, attention)
        return self.head.logits(out)


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
