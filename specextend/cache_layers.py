"""Holds what one layer of a model keeps of a text.

An attention layer keeps keys and values, a row for each token, which can be left and taken back one
by one. A recurrent or convolutional layer keeps a state: of all tokens up to some place, from which
nothing can be taken back. So its state is that behind the tokens that are decided, and what is
proposed works on copies.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .compat import CacheLayer, LinearAttentionLayer


class KVLayer(CacheLayer):
    """Holds keys and values of one layer: [B, Hkv, S, D] and [B, Hkv, S, Dv], the rows of a head
    contiguous.

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
        """Allocate with the heads, head dims, dtype and device of another layer."""
        self.lazy_initialization(other.keys[:, :, :1], other.values[:, :, :1])

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        return key_states, value_states

    # Asked for by code that builds masks, which our attention name switches off, and by models that
    # derive positions from the cache, which always get theirs from us.
    def get_seq_length(self, *args) -> int:
        return 0

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        return self.capacity, 0

    def get_max_length(self) -> int:
        return self.capacity


class StateLayer(LinearAttentionLayer):
    """Holds the state of a recurrent or convolutional layer behind the tokens that are decided.

    Args:
        states: that the layer keeps side by side.

    Attributes:
        pending: [1, n, H], what the layer was given for tokens that have been decided since, and
            that its state has yet to take in; None: no such tokens.
        proposed: [1, M, H], what it was given for the last tree, the root included.
        on_update: is told when the layer's module changes the state.
    """

    _decided: dict | None = None  # the state itself, while there are copies for a growing tree

    def __init__(self, states: int = 1):
        several = {} if states == 1 else dict(number_of_states=states)
        self._fresh = vars(LinearAttentionLayer(**several))
        self.forget()
        self.on_update: Callable[[], None] | None = None

    def follow(self, nodes: Sequence[int]) -> None:
        """Note which nodes of the last tree were accepted, behind the root, in order."""
        if nodes:
            self.pending = self.proposed[:, list(nodes)]
        self.proposed = None

    def forget(self) -> None:
        """Go back to where no token has been taken in."""
        self._decided = None
        vars(self).update(copy.deepcopy(self._fresh))
        self.pending: Tensor | None = None
        self.proposed: Tensor | None = None

    def grow(self, parents: Tensor) -> None:
        """Have a copy of the state for each node of a growing tree's next level, as a batch: that
        behind its parent.

        Args:
            parents: [W] int64, rows of the level before; of the first level all are 0.
        """
        state = {name: getattr(self, name) for name in self._fresh}
        self._decided = self._decided or state
        copies = tree_map_only(Tensor, lambda t: t.index_select(0, parents), state)
        vars(self).update(copies)

    def leave_tree(self) -> None:
        """Go back to the state behind what is decided."""
        if self._decided is not None:
            vars(self).update(self._decided)
            self._decided = None

    def take_over(self, other: StateLayer) -> None:
        """Go on from the state of another layer behind what is decided, or from the own one. The
        other is not to be used before it does the same."""
        other.leave_tree()
        vars(self).update({name: getattr(other, name) for name in self._fresh})

    @contextlib.contextmanager
    def branched(self, count: int) -> Iterator[None]:
        """Have ``count`` copies of the state, as a batch, for a ``with`` block."""
        own = {name: getattr(self, name) for name in self._fresh}

        def copied(tensor: Tensor) -> Tensor:
            return tensor.expand(count, *tensor.shape[1:]).clone()

        vars(self).update(tree_map_only(Tensor, copied, own))
        try:
            yield
        finally:
            vars(self).update(own)

    @property
    def states(self) -> list[Tensor]:
        """Return the tensors of the state; none before the first token."""
        held = tree_leaves([getattr(self, name) for name in self._fresh])
        return [t for t in held if isinstance(t, Tensor)]

    def update_conv_state(self, *args, **kwargs) -> Tensor:
        self._tell()
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args, **kwargs) -> Tensor:
        self._tell()
        return super().update_recurrent_state(*args, **kwargs)

    def _tell(self) -> None:
        if self.on_update is not None:
            self.on_update()


class HybridLayer(StateLayer, KVLayer):
    """Holds both, of a layer that attends and keeps a state side by side."""

    def __init__(self, capacity: int, states: int = 1):
        StateLayer.__init__(self, states)
        KVLayer.__init__(self, capacity)

    def lazy_initialization(self, *args, **kwargs) -> None:
        # As in `transformers`: keys and values come without their names, states with them.
        (KVLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)
