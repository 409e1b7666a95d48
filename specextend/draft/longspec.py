"""Drafts with LongSpec: one decoder block reads the target's last-layer keys and values.

The block (arXiv 2502.17421, section 3.1) takes the target's token embeddings alone. Its own
self-attention sees a window, so its cache has a fixed size; what lies further back it reads by
cross-attention from the target's cache, where it lies. Embedding and head are the target's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from .. import ops
from ..attention import device_of
from ..config import SpecConfig
from ..pace import FREE
from ..products import OwnProducts
from ..target import Target, weights_identity
from ..tree import Tree, grow_tree
from .base import Draft, Source, Tokenizers
from .checkpoint import Checkpoint
from .longspec_block import BlockShape, LongSpecBlock, Rotation
from .longspec_checkpoint import is_block, load_block

WINDOW = 513  # keys that a token sees, itself included: flash attention's (512, 0)
_NEVER = -(1 << 30)  # position of a slot that holds nothing: before every window


class RingCache:
    """Holds the block's own keys and values: a ring of ``window`` slots behind rows for a tree.

    A token's slot is its position modulo ``window``; nothing is ever moved, and the size does not
    depend on the context. Attention takes all rows as tree keys, whose positions are data: to a
    softmax the order of keys does not matter, and the sliding window, measured in positions, hides
    what a row may not see any more as well as slots that are still empty.

    Args:
        shape: of the block.
        window: keys that a token sees, itself included.
        tree_keys: rows for a tree; rounded up to whole words of a mask.
        dtype, device: of keys and values.
    """

    def __init__(self, shape: BlockShape, window: int, tree_keys: int, dtype: torch.dtype, device):
        self.window, self.tree_words = window, -(-tree_keys // 64)
        self._first = 64 * self.tree_words  # the ring's first row
        rows = self._first + window
        size = (1, shape.kv_heads, rows, shape.head_dim)
        self.k = torch.zeros(size, dtype=dtype, device=device).transpose(1, 2)
        self.v = torch.zeros(size, dtype=dtype, device=device).transpose(1, 2)
        to = dict(dtype=torch.int32, device=device)
        self._positions = torch.full((1, rows), _NEVER, **to)
        self._no_prefix = torch.zeros(1, **to)
        self._all = torch.full((1, 1, -(-window // 64)), -1, dtype=torch.int64, device=device)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of keys and values."""
        return 2 * self.k.numel() * self.k.element_size()

    def slots(self, positions: Tensor) -> Tensor:
        """Return the rows [M] of the decided tokens at ``positions`` [1, M]."""
        return self._first + positions[0] % self.window

    def write(self, slots: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Put keys and values [1, M, Hkv, D] of ``positions`` [1, M] into the rows ``slots`` [M],
        all different."""
        self.k[:, slots], self.v[:, slots] = k, v
        self._positions[:, slots] = positions.int()

    def attend(self, q: Tensor, positions: Tensor, tree: Tensor) -> Tensor:
        """Attend with ``q`` [1, M, Hq, D] to the window and to what ``tree`` shows of the tree.

        Args:
            positions: [1, M] int64.
            tree: [1, M, words] int64, packed mask of tree rows; words beyond it are empty.
        """
        tree = F.pad(tree, (0, self.tree_words - tree.shape[-1]))
        return ops.tree_attention(
            q,
            self.k,
            self.v,
            self._no_prefix,
            torch.cat([tree, self._all.expand(-1, q.shape[1], -1)], -1),
            num_tree_keys=self.k.shape[1],
            window=self.window,
            q_depths=positions.int(),
            k_depths=self._positions,
        )[0]


class LongSpecDraft(Draft):
    """Drafts with a LongSpec block.

    A token's key and value depend on its embedding alone. So of all tokens but the root these are
    all that is computed, and of a prompt only for its last ``window`` tokens. Cross-attention reads
    the target's cache in place: every row sees the committed tokens, which end before the root.

    Args:
        block: the weights, in the target's dtype and on its device.
        model: the target.
        config: the shape of the tree.
        window: keys that self-attention sees, the token itself included.
    """

    kind = "longspec"
    cache_kinds = ("full",)  # a cache of its own kind

    def __init__(
        self,
        block: LongSpecBlock,
        model: PreTrainedModel,
        config: SpecConfig,
        window: int = WINDOW,
    ):
        self.block, self.config, self.window = block, config, window
        self._model = model
        self.rotation = Rotation(model)
        self.embedding, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self._products = OwnProducts(block, self.head)
        self.device = device_of(model)
        self._vocab = model.config.get_text_config().vocab_size
        fixed = config.tree_shape == "fixed"
        self._widths = config.tree_widths if fixed else (config.tree_width,) * config.tree_depth

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return isinstance(source, Checkpoint) and is_block(source)

    @classmethod
    def load(
        cls, source: Source, target: Target, config: SpecConfig, tokenizers: Tokenizers
    ) -> LongSpecDraft:
        return cls(load_block(source, target.model), target.model, config)

    def with_config(self, config: SpecConfig) -> LongSpecDraft:
        return LongSpecDraft(self.block, self._model, config, self.window)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.block.parameters())

    def identity(self) -> dict:
        return {"kind": self.kind, **weights_identity(self.block)}

    def begin(self, prompt, max_length, cache, graphs) -> None:
        self._target, self._prompt = cache, prompt
        # The last level is proposed, but never run.
        self.ring = RingCache(
            self.block.shape,
            self.window,
            sum(self._widths[:-1]),
            self.block.self_qkv.weight.dtype,
            self.device,
        )
        self._taken = 0  # tokens so far
        self._pending = torch.zeros(1, 0, dtype=torch.int64, device=self.device)

    def end(self) -> None:
        self._target = self._prompt = self.ring = self._pending = None

    def resume(self, kept, length, start) -> None:
        # Nothing was kept: keys and values are made of the tokens alone, and of the last ones only.
        first = max(0, start - self.window)
        self._taken = first
        self._take(self._prompt[:, first:start])

    def prefill(self, decided) -> None:
        self._take(decided.tokens)

    def _take(self, tokens: Tensor) -> None:
        """Remember tokens; those that no later token will see are forgotten at once."""
        self._pending = torch.cat([self._pending, tokens], 1)[:, -self.window :]
        self._taken += tokens.shape[1]

    def propose(self, decided, depth, price=FREE) -> Tree:
        self._take(decided.tokens)
        new, self._pending = self._pending, self._pending[:, :0]
        positions = torch.arange(self._taken - new.shape[1], self._taken, device=self.device)[None]
        slots = self.ring.slots(positions)
        if new.shape[1] > 1:
            k, v = self.block.keys_values(self.embedding(new[:, :-1]))
            k = self.rotation(k, self.rotation.angles(positions[:, :-1]))
            self.ring.write(slots[:-1], positions[:, :-1], k, v)
        root = new[:, -1:]
        with self._products.active():
            logits = self.logits(root, positions[:, -1:], slots[-1:], root.new_zeros(1, 1, 0))
            depth = min(depth, len(self._widths))
            return grow_tree(root, logits, self.step, self.config, depth, price=price)

    def step(
        self, tokens: Tensor, level: int, mask: Tensor, num_keys: int, parents: Tensor
    ) -> Tensor:
        positions = torch.full_like(tokens, self._taken + level)
        slots = torch.arange(num_keys - tokens.shape[1], num_keys, device=self.device)
        return self.logits(tokens, positions, slots, mask)

    def logits(self, tokens: Tensor, positions: Tensor, slots: Tensor, tree: Tensor) -> Tensor:
        """Return logits [1, M, V] of ``tokens`` [1, M], whose keys go to the rows ``slots`` [M];
        ``tree`` is the mask of the tree rows that each sees."""
        angles = self.rotation.angles(positions)

        def self_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.ring.write(slots, positions, self.rotation(k, angles), v)
            return self.ring.attend(self.rotation(q, angles), positions, tree)

        def cross_attention(q: Tensor) -> Tensor:
            last, lens = self._target.kv_layers[-1], self._target.lens
            q = self.rotation(q, angles)
            return ops.tree_attention(q, last.k, last.v, lens, num_tree_keys=0)[0]

        hidden = self.block(self.embedding(tokens), self_attention, cross_attention)
        return self.head(hidden)[..., : self._vocab]
