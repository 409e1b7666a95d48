"""Holds KV caches, allocated once, that `transformers` models write into.

A :class:`KVCache` never grows, copies or crops: new keys and values go to rows behind the committed
ones (``append_kv``), attention reads them where they lie, and accepted rows move to the front
(``compact_kv``). Lengths live on the device. Which cache a forward of a model attends to, and which
ones it writes to, is said by its :class:`Pass`.
"""

from __future__ import annotations

import contextlib
import contextvars
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from . import ops
from .compat import CacheLayer

#: the name that our attention has in `transformers`
ATTENTION = "specextend"


class KVLayer(CacheLayer):
    """Holds keys and values of one layer: [B, Hkv, S, D], the rows of a head contiguous.

    ``k`` and ``v`` are the same memory seen as [B, S, Hkv, D], the layout of the ops.
    """

    is_sliding = False

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        if value_states is None:
            value_states = key_states
        batch, heads, _, k_dim = key_states.shape
        v_dim = value_states.shape[-1]
        # Zeros: rows are read before they are written only under a mask, and 0 * 0 stays 0.
        self.keys = key_states.new_zeros(batch, heads, self.capacity, k_dim)
        self.values = value_states.new_zeros(batch, heads, self.capacity, v_dim)
        self.k, self.v = self.keys.transpose(1, 2), self.values.transpose(1, 2)
        self.is_initialized = True

    def like(self, other: KVLayer) -> None:
        """Allocate with the heads, head dim, dtype and device of another layer."""
        self.lazy_initialization(other.keys[:, :, :1], other.values[:, :, :1])

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        current_pass().write(self, key_states, value_states)
        return key_states, value_states

    # Asked for by code that builds masks, which our attention name switches off, and by models that
    # derive positions from the cache, which always get theirs from us.
    def get_seq_length(self, *args) -> int:
        return 0

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        return self.capacity, 0

    def get_max_length(self) -> int:
        return self.capacity


class KVCache(Cache):
    """Holds a :class:`KVLayer` per layer and the number of committed rows, on the device.

    Args:
        num_layers: layers of the model.
        capacity: rows of each layer.
        batch, device: of ``lens``.

    Attributes:
        lens: [B] int32, committed rows; the same tensor for as long as the cache lives.
        length: the same number on the host, for batch 1, as far as it has learnt.
        rotary_length: tokens of the text that the rows are read as a part of. Where the factors of
            a rotary embedding depend on the length of a forward, they are those of one over as many
            tokens, or more; 0: of each forward's own.
    """

    def __init__(self, num_layers: int, capacity: int, batch: int, device: torch.device):
        super().__init__(layers=[KVLayer(capacity) for _ in range(num_layers)])
        self.capacity = capacity
        self.lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.length = 0
        self.rotary_length = 0

    def advance(self, count: int) -> None:
        """Commit ``count`` more rows, which have been written."""
        if self.length + count > self.capacity:
            raise RuntimeError(
                f"the KV cache holds {self.capacity} tokens, but {self.length + count} are needed"
            )
        self.commit(count)
        self.settle(count)

    def commit(self, count: int | Tensor) -> None:
        """Do as :meth:`advance` on the device alone, by a number that may be known only there.

        Args:
            count: a number, or [B] int32.
        """
        self.lens += count

    def settle(self, count: int) -> None:
        """Note what :meth:`commit` has added, once the host knows it."""
        self.length += count

    def compact(self, path: Tensor, num_accepted: Tensor) -> None:
        """Move the rows of the accepted path behind the committed ones.

        Args:
            path: [B, N] int32, tree slots of the path, the root first.
            num_accepted: [B] int32, accepted nodes besides the root, below N.
        """
        if path.shape[1] > 1:
            tensors = [t for layer in self.layers for t in (layer.k, layer.v)]
            ops.compact_kv(tensors, self.lens, path.contiguous(), num_accepted)

    @property
    def num_bytes(self) -> int:
        """Count the bytes that the allocated layers take."""
        return sum(
            t.numel() * t.element_size()
            for layer in self.layers
            if layer.is_initialized
            for t in (layer.keys, layer.values)
        )


@dataclass
class Pass:
    """Says what one forward of one model over ``num_rows`` tokens, a chain or a tree, is given.

    Attributes:
        cache: what is attended to: its committed rows, and the tree's keys behind them.
        writes: (cache, lens [B] int32) pairs: new keys and values go to rows ``lens`` on.
        num_tree_keys: tree keys behind the committed rows, those written now included.
        mask: [B, num_rows, words] int64, packed; None: a chain.
        q_depths, k_depths: [B, rows] int32, distance of a row from the first tree position; read by
            layers with a sliding window; None: a chain's.
        window: a window for every layer, besides the layer's own; 0: none.
        score_layers: layers that record what chunk scores need.
        chunk_size: of the recorded log-sum-exps.
        keys_only: the forward ends once every layer's keys are written.
        fused: tree attention by our kernel. False: SDPA with a dense mask.
        attention: the name of the attention that the model is to call.
        layer_windows: of layers whose window is known better than they say; 0: none.
        fusions: what our operators compute of the model (:mod:`specextend.fused`); None: attention
            alone.
        feature_layers: hidden states to hand out, counted as `transformers` does: i is the input of
            layer i, and the number of layers is what the head reads.
        recorded: per scored layer (chunk_lse, lse) when fused, else (queries, scale).
        calls: layers that asked for attention, in order.
        hidden: [B, num_rows, H] per index of ``feature_layers``.
    """

    cache: KVCache
    writes: list[tuple[KVCache, Tensor]]
    num_tree_keys: int
    mask: Tensor | None = None
    q_depths: Tensor | None = None
    k_depths: Tensor | None = None
    window: int = 0
    score_layers: frozenset[int] = frozenset()
    chunk_size: int = 0
    keys_only: bool = False
    fused: bool = True
    attention: str = ATTENTION
    layer_windows: dict[int, int] = field(default_factory=dict)
    fusions: tuple | None = None
    feature_layers: tuple[int, ...] = ()
    recorded: dict[int, tuple] = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    _index: int = 0
    _left: tuple[Tensor, ...] | None = None
    _rotated: tuple[Tensor, Tensor] | None = None

    @property
    def features(self) -> Tensor | None:
        """Join the hidden states of ``feature_layers``: [B, num_rows, F]; None without."""
        if not self.feature_layers:
            return None
        return torch.cat([self.hidden[i] for i in self.feature_layers], -1)

    def write(self, layer: KVLayer, keys: Tensor, values: Tensor) -> None:
        """Store [B, Hkv, M, D] keys and values of ``layer`` in every cache of ``writes``.

        Keys that :meth:`leave_rotation` got are rotated on their way, and so are the queries.
        """
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        index = self._index % len(self.cache.layers)
        if self.cache.layers[index] is not layer:  # a model may not ask in order
            index = self.cache.layers.index(layer)
        self._index = index + 1
        left, self._left = self._left, None
        if left is not None and left[1] is not keys:
            raise RuntimeError("a layer stores other keys than those that it rotated")
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        for cache, lens in self.writes:
            target = cache.layers[index]
            if not target.is_initialized:
                target.like(layer)
            if left is None:
                ops.append_kv(target.k, target.v, k, v, lens)
                continue
            q = left[0].transpose(1, 2)
            rotated = ops.rotary_append(q, k, v, *left[2:], target.k, target.v, lens)
            self._rotated = left[0], rotated

    def leave_rotation(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Note a rotation that is to be made with the next write.

        Args:
            q, k: [B, heads, M, D], queries and keys.
            cos, sin: [B or 1, M, R], as of ``rotary_append``.
        """
        if self._left or self._rotated:
            raise RuntimeError("a layer rotates twice what it has not yet attended with")
        self._left = q, k, cos, sin

    def queries(self, query: Tensor) -> Tensor:
        """Return the rows [B, M, Hq, D] of a layer's queries [B, Hq, M, D], rotated if that was
        left to the pass."""
        if self._left:
            raise RuntimeError("a layer attends with keys that it has not stored")
        rotated, self._rotated = self._rotated, None
        if rotated is None:
            return query.transpose(1, 2)
        if rotated[0] is not query:
            raise RuntimeError("a layer attends with other queries than those that it rotated")
        return rotated[1]

    def dense_mask(self, rows: int, length: int, window: int, device: torch.device) -> Tensor:
        """Make the mask of SDPA: [B, 1, rows, P + N] bool; ``length`` is P. Batch 1."""
        keys = self.num_tree_keys
        if self.mask is None:
            tree = torch.ones(1, rows, keys, dtype=torch.bool, device=device).tril(keys - rows)
        else:
            bits = torch.arange(64, device=device)
            tree = (self.mask.unsqueeze(-1) >> bits) & 1
            tree = tree.flatten(-2)[..., :keys].bool()
        seen = torch.cat([tree.new_ones(1, rows, length), tree], -1)
        if window:
            chain = torch.arange(keys, device=device, dtype=torch.int32)[None]
            q = chain[:, keys - rows :] if self.q_depths is None else self.q_depths
            k = chain if self.k_depths is None else self.k_depths
            at = torch.cat(
                [torch.arange(-length, 0, device=device, dtype=torch.int32)[None], k], -1
            )
            seen = seen & (at[:, None, :] > q[:, :, None] - window)
        return seen.unsqueeze(1)


_pass: contextvars.ContextVar[Pass | None] = contextvars.ContextVar("specextend_pass", default=None)


@contextlib.contextmanager
def running(state: Pass):
    """Make ``state`` the current pass of this thread for a ``with`` block."""
    token = _pass.set(state)
    try:
        yield
    finally:
        _pass.reset(token)


def in_pass() -> Pass | None:
    """Return the pass under way in this thread; None where there is none.

    It is a context variable, as extra keyword arguments do not reach the attention function in
    every model family.
    """
    return _pass.get()


def current_pass() -> Pass:
    """Return the pass that must be under way in this thread.

    Raises:
        RuntimeError: it is not.
    """
    state = in_pass()
    if state is None:
        raise RuntimeError(
            f"the attention implementation {ATTENTION!r} works inside specextend.SpecExtend only; "
            "choose another one with model.set_attn_implementation(...)"
        )
    return state
