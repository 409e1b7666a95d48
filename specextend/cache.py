"""Preallocated KV caches that `transformers` models write into.

A :class:`KVCache` never grows, copies or crops: new keys and values go to rows behind the committed
ones (``append_kv``), attention reads them where they lie, and accepted rows move to the front
(``compact_kv``). Lengths live on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from . import ops
from .attention import current_pass
from .compat import CacheLayer


class KVLayer(CacheLayer):
    """Keys and values of one layer: [B, Hkv, S, D], so that the rows of a head are contiguous.

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
    """One :class:`KVLayer` per layer and the number of committed rows, on the device.

    Args:
        num_layers: layers of the model.
        capacity: rows of each layer.
        batch, device: of ``lens``.

    Attributes:
        lens: [B] int32, committed rows; the same tensor for as long as the cache lives.
        length: the same number on the host, for batch 1, as far as it has learnt.
    """

    def __init__(self, num_layers: int, capacity: int, batch: int, device: torch.device):
        super().__init__(layers=[KVLayer(capacity) for _ in range(num_layers)])
        self.capacity = capacity
        self.lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.length = 0

    def advance(self, count: int) -> None:
        """Commit ``count`` more rows, which have been written."""
        if self.length + count > self.capacity:
            raise RuntimeError(
                f"the KV cache holds {self.capacity} tokens, but {self.length + count} are needed"
            )
        self.commit(count)
        self.settle(count)

    def commit(self, count: int | Tensor) -> None:
        """:meth:`advance` on the device alone, by a number that may be known only there.

        Args:
            count: a number, or [B] int32.
        """
        self.lens += count

    def settle(self, count: int) -> None:
        """What :meth:`commit` has added, once the host knows it."""
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
        """Bytes that the allocated layers take."""
        return sum(
            t.numel() * t.element_size()
            for layer in self.layers
            if layer.is_initialized
            for t in (layer.keys, layer.values)
        )
