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

from .arena import Rows
from .compat import CacheLayer, LinearAttentionLayer

#: that copies of states may take, of one text
MARK_BYTES = 1 << 28


class KVLayer(CacheLayer):
    """Holds keys and values of one layer: [B, Hkv, S, D] and [B, Hkv, S, Dv], the numbers of a row
    of a head contiguous. The rows of a head follow each other; or those of all heads do that are of
    a token, where forks share them on a GPU (:mod:`sharing`).

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
        keys = key_states.new_zeros(batch, heads, self.capacity, k_dim)
        self.hold(keys, value_states.new_zeros(batch, heads, self.capacity, v_dim))

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Take the memory of the rows."""
        self.keys, self.values, self.capacity = keys, values, keys.shape[2]
        self.k, self.v = self.keys.transpose(1, 2), self.values.transpose(1, 2)
        self.is_initialized = True

    def resize(self, capacity: int, rows: int) -> None:
        """Hold ``capacity`` rows from now on; the first ``rows`` stay as they are."""
        own = copy.copy(self)
        self.capacity, self.is_initialized = capacity, False
        if own.is_initialized:
            self.like(own)
            self.copy_rows(own, slice(rows))

    def copy_rows(self, other: KVLayer, rows: slice) -> None:
        """Copy rows of a layer of another cache of the same model."""
        self.keys[:, :, rows] = other.keys[:, :, rows]
        self.values[:, :, rows] = other.values[:, :, rows]

    def take_in(self, other, length: int) -> None:
        """Copy the keys and values of ``length`` tokens that a layer of `transformers` has; as of
        :meth:`KVCache.take_in`."""
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            ours, theirs = getattr(self, name), getattr(other, name, None)
            batch, heads, _, dim = ours.shape
            wanted = [batch, heads, length, dim]
            if not isinstance(theirs, Tensor) or list(theirs.shape) != wanted:
                got = list(theirs.shape) if isinstance(theirs, Tensor) else "none"
                raise ValueError(f"must have {name} {wanted} of all {length} tokens, got {got}")
            if theirs.dtype != ours.dtype:
                raise ValueError(f"must have {name} in {ours.dtype}, got {theirs.dtype}")
            ours[:, :, :length] = theirs

    def parts(self, rows: int) -> dict[str, Rows]:
        """Return its first rows by name, where they lie; nothing before the first token."""
        if not self.is_initialized:
            return {}
        return {name: Rows(getattr(self, name)[:, :, :rows]) for name in ("keys", "values")}

    def like(self, other: KVLayer) -> None:
        """Allocate with the heads, head dims, dtype and device of another layer."""
        KVLayer.lazy_initialization(self, other.keys[:, :, :1], other.values[:, :, :1])

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

    def mark(self) -> dict:
        """Copy the state behind what is decided, with what it has yet to take in."""
        state = {name: getattr(self, name) for name in (*self._fresh, "pending")}
        return tree_map_only(Tensor, Tensor.clone, state)

    def go_back(self, mark: dict) -> None:
        """Have the state of a :meth:`mark` again."""
        self.forget()
        vars(self).update(tree_map_only(Tensor, Tensor.clone, mark))

    def take_in(self, other, length: int) -> None:
        """Copy the state that a layer of `transformers` has."""
        if not isinstance(other, LinearAttentionLayer):
            raise ValueError(f"must keep a state, got {type(other).__name__}")
        state = {name: getattr(other, name) for name in self._fresh}
        vars(self).update(tree_map_only(Tensor, Tensor.clone, state))

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


class Marks:
    """Holds copies of the states of a text's layers behind some of its places, to go back to.

    Of more than ``MARK_BYTES`` those leave first that are closest to their neighbours; the last
    two stay: they are those behind the last prompt and what was written to it.

    Args:
        layers: whose states they are.
    """

    def __init__(self, layers: list[StateLayer]):
        self._layers = layers
        self._marks: list[tuple[int, list[dict]]] = []  # by the length of the text, ascending

    def add(self, length: int) -> None:
        """Copy the states, which are those behind ``length`` tokens."""
        self._forget(length)
        self._marks.append((length, [layer.mark() for layer in self._layers]))
        while len(self._marks) > 2 and self.num_bytes > MARK_BYTES:
            places = [0] + [at for at, _ in self._marks]
            gaps = [places[i + 2] - places[i] for i in range(len(places) - 3)]
            del self._marks[gaps.index(min(gaps))]

    def place(self, length: int) -> int:
        """Return the place that :meth:`go_back` would go to."""
        return max((at for at, _ in self._marks if at <= length), default=0)

    def go_back(self, length: int) -> int:
        """Have the states again of the last place that was marked up to ``length``; none: none.

        Returns:
            The tokens before that place.
        """
        self._forget(length + 1)
        at, states = self._marks[-1] if self._marks else (0, [None] * len(self._layers))
        for layer, state in zip(self._layers, states, strict=True):
            layer.forget() if state is None else layer.go_back(state)
        return at

    def parts(self) -> list[tuple[int, list[dict]]]:
        """Return the places, and the states of each layer behind them."""
        return list(self._marks)

    def take_parts(self, parts: list) -> None:
        """Have the :meth:`parts` of others for its own."""
        self._marks = [(at, states) for at, states in parts]

    def copy(self, other: Marks) -> None:
        """Have the marks of another cache of the same model and text."""
        self._marks = list(other._marks)  # which nobody changes

    def _forget(self, length: int) -> None:
        """Drop what is behind ``length`` tokens or more."""
        self._marks = [mark for mark in self._marks if mark[0] < length]

    @property
    def num_bytes(self) -> int:
        """Count the bytes that the copies take."""
        held = tree_leaves([states for _, states in self._marks])
        return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))


class HybridLayer(StateLayer, KVLayer):
    """Holds both, of a layer that attends and keeps a state side by side."""

    def __init__(self, capacity: int, states: int = 1):
        StateLayer.__init__(self, states)
        KVLayer.__init__(self, capacity)

    def take_in(self, other, length: int) -> None:
        KVLayer.take_in(self, other, length)
        StateLayer.take_in(self, other, length)

    def lazy_initialization(self, *args, **kwargs) -> None:
        # As in `transformers`: keys and values come without their names, states with them.
        (KVLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)
