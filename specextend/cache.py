"""Holds KV caches, allocated once, that `transformers` models write into.

A :class:`KVCache` never grows, copies or crops: new keys and values go to rows behind the committed
ones (``append_kv``), attention reads them where they lie, and accepted rows move to the front
(``compact_kv``). Layers that keep a state have it beside them. Lengths live on the device. Which
cache a forward of a model attends to, and which ones it writes to, is said by its :class:`Pass`.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from . import ops, sharing
from .arena import Stored
from .cache_layers import HybridLayer, KVLayer, Marks, StateLayer
from .compat import Kind
from .layout import by_rows
from .sharing import HostRows, SharedRows

#: the name that our attention has in `transformers`
ATTENTION = "specextend"


class KVCache(Cache):
    """Holds what each layer keeps and the number of committed rows, on the device.

    Args:
        layers: of the model: how many, or what each keeps (:func:`compat.layer_kinds`).
        capacity: rows of each layer.
        batch, device: of ``lens``.

    Attributes:
        lens: [B] int32, committed rows; the same tensor for as long as the cache lives.
        length: the same number on the host, for batch 1, as far as it has learnt.
        shares: some layer keeps nothing; it may attend to what another keeps.
        rotary_length: tokens of the text that the rows are read as a part of. Where the factors of
            a rotary embedding depend on the length of a forward, they are those of one over as many
            tokens, or more; 0: of each forward's own.
    """

    def __init__(
        self, layers: int | Sequence[Kind], capacity: int, batch: int, device: torch.device
    ):
        self.kinds = (Kind(True, 0),) * layers if isinstance(layers, int) else tuple(layers)
        self.shares = not all(kind.keeps for kind in self.kinds)
        Cache.__init__(self, layers=[_make(kind, capacity) for kind in self.kinds])
        self.capacity = capacity
        self.lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.length = 0
        self.rotary_length = 0
        self._marks = Marks(self.state_layers)
        self._rows: SharedRows | None = None  # None: nobody else has rows of the layers

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Return what is new. It is written as attention gets it, which may be something else:
        keys and values made of the latents that a model caches."""
        current_pass().open(layer_idx)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int | None = None) -> int | Tensor:
        """Return 0, as models are given positions; to a layer that asks by its index, and counts
        from there, [M] int64 numbers that make of 0, 1, ... the positions of the tokens."""
        state = in_pass()
        if layer_idx is None or state is None or state.positions is None:
            return 0
        return state.positions[0] - torch.arange(state.positions.shape[1]).to(state.positions)

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
        tensors = [t for layer in self.kv_layers for t in (layer.k, layer.v)]
        if path.shape[1] > 1 and tensors:
            ops.compact_kv(tensors, self.lens, path.contiguous(), num_accepted)

    def follow(self, nodes: Sequence[int]) -> None:
        """Note on the host which nodes of the last tree were accepted, the root first, in order."""
        for layer in self.state_layers:
            layer.follow(nodes[1:])

    def take_states(self, other: KVCache) -> None:
        """Have the states of another cache of the same model behind what is decided; the other
        loses them. They may be its own: then it leaves a tree that has grown."""
        for ours, theirs in zip(self.state_layers, other.state_layers, strict=True):
            ours.take_over(theirs)

    def mark(self) -> None:
        """Note the states of what is committed, for :meth:`go_back`; nothing without states."""
        if self.state_layers:
            self._marks.add(self.length)

    def go_back(self, length: int, sound: bool = True) -> int:
        """Forget the text behind ``length`` tokens, or behind fewer, where states were marked.

        Args:
            length: not beyond the committed rows.
            sound: the states are those of what is committed; False: a forward was broken off.

        Returns:
            The committed rows that are left. Others are written again; nobody reads them before.

        Raises:
            torch.OutOfMemoryError: rows that forks share would be written again, and the GPU has no
                room for others in their place. Nothing is forgotten then.
        """
        states = self.state_layers and not (sound and length == self.length)
        length = self._marks.place(length) if states else length
        self.own(length)
        if states:
            self._marks.go_back(length)
        self.lens.fill_(length)
        self.length = length
        return length

    def restart(self) -> None:
        """Forget the text."""
        self.go_back(0, sound=False)

    def reserve(self, capacity: int) -> None:
        """Have room for ``capacity`` rows at least; those that are committed stay."""
        if capacity <= self.capacity:
            return
        if self._rows is not None and self._rows.reserve(capacity):
            self.capacity = self._rows.capacity
            return
        for layer in self.layers:
            if isinstance(layer, KVLayer):
                layer.resize(capacity, self.length)
        self.capacity, self._rows = capacity, None

    def another(self, capacity: int) -> KVCache:
        """Make an empty cache for the same model and text."""
        made = type(self)(self.kinds, capacity, len(self.lens), self.lens.device)
        made.rotary_length = self.rotary_length
        return made

    @property
    def is_shared(self) -> bool:
        """Tell whether forks may have the same rows."""
        return self._rows is not None

    def own(self, first: int) -> None:
        """Have the committed rows from ``first`` on alone, before one of them is written again.
        Waits for the device where forks on a GPU share some of them; errors are as of
        :meth:`go_back`."""
        if self._rows is not None:
            self._rows.own(first)

    def share(self) -> None:
        """Have forks see the committed rows where they lie, if that can be; errors are as of
        :func:`sharing.share`."""
        if self._rows is None:
            self._share_by(sharing.share(self.kv_layers, self.length, self.capacity))

    def fork(self) -> KVCache:
        """Make a cache that goes on by itself from what is committed."""
        self.share()
        made = self.another(self.length)
        pairs = [
            (ours, theirs)
            for ours, theirs in zip(made.layers, self.layers, strict=True)
            if isinstance(theirs, KVLayer) and theirs.is_initialized
        ]
        if self._rows is not None:
            made._share_by(self._rows.fork([ours for ours, _ in pairs], self.length))
        else:
            for ours, theirs in pairs:
                ours.like(theirs)
                ours.copy_rows(theirs, slice(self.length))
        made._marks.copy(self._marks)
        for ours, theirs in zip(made.state_layers, self.state_layers, strict=True):
            ours.go_back(theirs.mark())
        made.advance(self.length)
        return made

    def _share_by(self, rows: SharedRows | None) -> None:
        """Note that the layers' rows are shared; None: they are not."""
        self._rows = rows
        if rows is not None:
            self.capacity = rows.capacity

    def take_in(self, other: Cache, length: int) -> None:
        """Copy a cache of `transformers` of the same model and a text of ``length`` tokens, which
        this one, whose layers are allocated, has room for.

        Raises:
            ValueError: a layer has something else than this one would.
        """
        if len(other.layers) != len(self.layers):
            raise ValueError(
                f"the cache must have the model's {len(self.layers)} layers, got "
                f"{len(other.layers)}"
            )
        for index, (ours, theirs) in enumerate(zip(self.layers, other.layers, strict=True)):
            try:
                ours.take_in(theirs, length)
            except ValueError as error:
                raise ValueError(f"layer {index} of the cache {error}") from None
        self.advance(length)

    def parts(self) -> dict:
        """Return what is committed: plain data, with tensors where they lie. The states behind
        what is committed are to be marked."""
        return {
            "length": self.length,
            "rotary_length": self.rotary_length,
            "rows": [
                layer.parts(self.length) if isinstance(layer, KVLayer) else {}
                for layer in self.layers
            ],
            "marks": self._marks.parts(),
        }

    def take_parts(self, parts: dict) -> None:
        """Have the :meth:`parts` of a cache of the same model, as :mod:`context_file` returns them,
        for its own. It is empty, with a capacity of as many rows."""
        held = [(la, rows) for la, rows in zip(self.layers, parts["rows"], strict=True) if rows]
        tensors = [rows[name] for _, rows in held for name in ("keys", "values")]
        if tensors and isinstance(tensors[0], Stored):
            self._share_by(HostRows.stored([layer for layer, _ in held], tensors))
        else:
            for layer, rows in held:
                layer.hold(rows["keys"], rows["values"])
        self._marks.take_parts(parts["marks"])
        self.rotary_length = parts["rotary_length"]
        self.go_back(parts["length"], sound=False)  # to the states that are marked there

    def allocate_as(self, other: KVCache) -> None:
        """Allocate the rows of the layers that another cache of the same model has allocated."""
        for ours, theirs in zip(self.layers, other.layers, strict=True):
            if isinstance(theirs, KVLayer) and theirs.is_initialized and not ours.is_initialized:
                ours.like(theirs)

    @property
    def kv_layers(self) -> list[KVLayer]:
        """Return the layers that hold keys and values, once they are allocated."""
        return [la for la in self.layers if isinstance(la, KVLayer) and la.is_initialized]

    @property
    def state_layers(self) -> list[StateLayer]:
        """Return the layers that hold a state."""
        return [la for la in self.layers if isinstance(la, StateLayer)]

    @property
    def num_bytes(self) -> int:
        """Count the bytes that the allocated layers take; rows that forks share, for each."""
        rows = slice(None if self._rows is None else self._rows.num_rows(self.length))
        held = [t[:, :, rows] for layer in self.kv_layers for t in (layer.keys, layer.values)]
        held += [t for layer in self.state_layers for t in layer.states]
        return sum(t.numel() * t.element_size() for t in held) + self._marks.num_bytes


def _make(kind: Kind, capacity: int) -> KVLayer | StateLayer:
    if kind.states and kind.rows:
        return HybridLayer(capacity, kind.states)
    return StateLayer(kind.states) if kind.states else KVLayer(capacity)


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
        layer_chunks: of layers in which a row sees from the start of its own chunk on: its length.
        positions: [B, M] int64, of the tokens; given by the model's forward.
        paths: for layers with a state: rows [P, L] int64, the nodes on the P paths from below the
            root to a leaf, filled up with the last one, and places [num_rows - 1] int64, where each
            node is in them (:func:`tree.paths`); None: all rows are decided, one behind the other.
        level: for layers with a state, [num_rows] int64: the rows are a level of a growing tree,
            and these their parents in the level before; None: they are not.
        keepers: what runs the model's layers with a state (:mod:`specextend.recurrent`).
        fusions: what our operators compute of the model (:mod:`specextend.fused`); None: attention
            alone.
        feature_layers: hidden states to hand out, counted as `transformers` does: i is the input of
            layer i, and the number of layers is what the head reads.
        recorded: per scored layer (chunk_lse, lse) when fused, else (queries, scale); and the layer
            whose keys they are of.
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
    layer_chunks: dict[int, int] = field(default_factory=dict)
    positions: Tensor | None = None
    paths: tuple[Tensor, Tensor] | None = None
    level: Tensor | None = None
    keepers: tuple = ()
    fusions: tuple | None = None
    feature_layers: tuple[int, ...] = ()
    recorded: dict[int, tuple] = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    _open: int | None = None
    _written: list[tuple[Tensor, int]] = field(default_factory=list)
    _left: tuple[Tensor, ...] | None = None
    _rotated: tuple[Tensor, Tensor] | None = None

    @property
    def features(self) -> Tensor | None:
        """Join the hidden states of ``feature_layers``: [B, num_rows, F]; None without."""
        if not self.feature_layers:
            return None
        return torch.cat([self.hidden[i] for i in self.feature_layers], -1)

    @property
    def last(self) -> int | None:
        """Return the last layer that stores anything; None if it stores two things."""
        kinds = self.cache.kinds
        index = max(i for i, kind in enumerate(kinds) if kind.keeps)
        return None if kinds[index].rows and kinds[index].states else index

    def write(self, index: int, keys: Tensor, values: Tensor) -> None:
        """Store [B, Hkv, M, D] keys and [B, Hkv, M, Dv] values of a layer in every cache of
        ``writes``.

        Keys that :meth:`leave_rotation` got are rotated on their way, and so are the queries.
        """
        left, self._left = self._left, None
        if left is not None and left[1] is not keys:
            raise RuntimeError("a layer stores other keys than those that it rotated")
        if not self.cache.layers[index].is_initialized:
            self.cache.layers[index].lazy_initialization(keys, values)
        k, v = (by_rows(x).transpose(1, 2) for x in (keys, values))
        for cache, lens in self.writes:
            target = cache.layers[index]
            if not target.is_initialized:
                target.lazy_initialization(keys, values)
            if left is None:
                ops.append_kv(target.k, target.v, k, v, lens)
                continue
            q = by_rows(left[0]).transpose(1, 2)
            rotated = ops.rotary_append(q, k, v, *left[2:], target.k, target.v, lens)
            self._rotated = left[0], rotated

    def open(self, index: int) -> None:
        """Note that a layer has new keys and values, which attention brings next, as they are
        or made into others."""
        self._open = index

    def source(self, keys: Tensor) -> tuple[int, bool]:
        """Return the layer whose rows attention with ``keys`` is over, and whether they are its
        new ones: it may have been handed those of a layer before."""
        index, self._open = self._open, None
        if index is not None:
            if self.cache.shares:
                self._written.append((keys, index))
            return index, True
        for written, other in reversed(self._written):
            if written is keys:
                return other, False
        raise RuntimeError("a layer attends to keys that no layer has put into its cache")

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
            return by_rows(query).transpose(1, 2)
        if rotated[0] is not query:
            raise RuntimeError("a layer attends with other queries than those that it rotated")
        return rotated[1]

    def dense_mask(
        self, rows: int, length: int, window: int, chunk: int, device: torch.device
    ) -> Tensor:
        """Make the mask of SDPA: [B, 1, rows, P + N] bool; ``length`` is P. Batch 1."""
        keys = self.num_tree_keys
        if self.mask is None:
            tree = torch.ones(1, rows, keys, dtype=torch.bool, device=device).tril(keys - rows)
        else:
            bits = torch.arange(64, device=device)
            tree = (self.mask.unsqueeze(-1) >> bits) & 1
            tree = tree.flatten(-2)[..., :keys].bool()
        seen = torch.cat([tree.new_ones(1, rows, length), tree], -1)
        if window or chunk:
            chain = torch.arange(keys, device=device, dtype=torch.int32)[None]
            q = chain[:, keys - rows :] if self.q_depths is None else self.q_depths
            k = chain if self.k_depths is None else self.k_depths
            at = torch.cat(
                [torch.arange(-length, 0, device=device, dtype=torch.int32)[None], k], -1
            )
            q, at = q[:, :, None] + length, at[:, None, :] + length
            seen = seen & (at >= (q // chunk * chunk if chunk else q - window + 1))
        return seen.unsqueeze(1)


class AllStored(Exception):
    """Ends a forward of which only what it stores is wanted."""


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
