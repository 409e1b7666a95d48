"""How a model of `transformers` is made to use our cache and our kernel, without touching its code.

The model calls the attention function registered here under the name ``"specextend"``. What it
needs to know beyond its arguments (which cache, which tree, where the new rows go, which layers are
scored) is the current :class:`Pass`, a context variable: extra keyword arguments do not reach the
attention function in every model family.
"""

from __future__ import annotations

import contextlib
import contextvars
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel

from . import ops
from .compat import CACHE

if TYPE_CHECKING:
    from .cache import KVCache, KVLayer

NAME = "specextend"


@dataclass
class Pass:
    """One forward of one model over ``num_rows`` tokens: a chain, or a tree.

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
        fused: tree attention by our kernel. False: SDPA with a dense mask.
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
    fused: bool = True
    feature_layers: tuple[int, ...] = ()
    recorded: dict[int, tuple] = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    _index: int = 0

    @property
    def features(self) -> Tensor | None:
        """[B, num_rows, F]: the hidden states of ``feature_layers`` side by side; None without."""
        if not self.feature_layers:
            return None
        return torch.cat([self.hidden[i] for i in self.feature_layers], -1)

    def write(self, layer: KVLayer, keys: Tensor, values: Tensor) -> None:
        """Store [B, Hkv, M, D] keys and values of ``layer`` in every cache of ``writes``."""
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        index = self._index % len(self.cache.layers)
        if self.cache.layers[index] is not layer:  # a model may not ask in order
            index = self.cache.layers.index(layer)
        self._index = index + 1
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        for cache, lens in self.writes:
            target = cache.layers[index]
            if not target.is_initialized:
                target.like(layer)
            ops.append_kv(target.k, target.v, k, v, lens)

    def dense_mask(self, rows: int, length: int, window: int, device: torch.device) -> Tensor:
        """[B, 1, rows, P + N] bool, for SDPA; ``length`` is P. Batch 1."""
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


def current_pass() -> Pass:
    """The pass under way in this thread."""
    state = _pass.get()
    if state is None:
        raise RuntimeError(
            f"the attention implementation {NAME!r} works inside specextend.SpecExtend only; "
            "choose another one with model.set_attn_implementation(...)"
        )
    return state


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    state = current_pass()
    layer_idx = module.layer_idx
    state.calls.append(layer_idx)
    if attention_mask is not None:
        raise RuntimeError(
            f"{type(module).__name__} brings an attention mask of its own; specextend serves "
            "models whose attention is causal, with or without a sliding window"
        )
    layer = state.cache.layers[layer_idx]
    window = sliding_window or 0
    if state.window:
        window = min(window, state.window) if window else state.window
    q = query.transpose(1, 2)
    scored = layer_idx in state.score_layers
    if not state.fused:
        if softcap or s_aux is not None:
            raise ValueError(
                "tree_attention=False: torch's SDPA knows no softcap and no sink logit"
            )
        if scored:
            state.recorded[layer_idx] = (q, scaling)
        return _dense_attention(state, layer, query, scaling, window), None
    out, lse, chunk_lse = ops.tree_attention(
        q,
        layer.k,
        layer.v,
        state.cache.lens,
        state.mask,
        num_tree_keys=state.num_tree_keys,
        scale=scaling,
        softcap=softcap or 0.0,
        window=window,
        q_depths=state.q_depths if window else None,
        k_depths=state.k_depths if window else None,
        sinks=None if s_aux is None else s_aux.float(),
        chunk_size=state.chunk_size if scored else 0,
    )
    if scored:
        state.recorded[layer_idx] = (chunk_lse, lse)
    return out, None


def _dense_attention(
    state: Pass, layer, query: Tensor, scaling: float | None, window: int
) -> Tensor:
    """Attention over prefix and tree by torch's SDPA with a dense mask: the ablation's baseline."""
    length = state.cache.length
    end = length + state.num_tree_keys
    mask = state.dense_mask(query.shape[2], length, window, query.device)
    out = F.scaled_dot_product_attention(
        query,
        layer.keys[:, :, :end],
        layer.values[:, :, :end],
        attn_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != layer.keys.shape[1],
    )
    return out.transpose(1, 2).contiguous()


AttentionInterface.register(NAME, _attention)
# Not registered as a mask: `transformers` then builds none, which is what we want.


@contextlib.contextmanager
def evaluating(model: torch.nn.Module):
    """Evaluation mode for a ``with`` block: dropout would change the output."""
    training = [m for m in model.modules() if m.training] if model.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class PatchedModel:
    """A model that runs :class:`Pass` es, and is as it was outside of them.

    Only the name of the attention implementation in the model's configurations is changed, and
    hooks collect the features that a pass asks for, both only during a forward, also when that
    forward raises.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        self._configs = [c for c in configs.values() if hasattr(c, "_attn_implementation_internal")]

    @contextlib.contextmanager
    def _installed(self, state: Pass):
        before = [c._attn_implementation_internal for c in self._configs]
        token = _pass.set(state)
        hooks = self._collect(state) if state.feature_layers else []
        try:
            for config in self._configs:
                config._attn_implementation_internal = NAME
            with evaluating(self.model):
                yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = name
            for hook in hooks:
                hook.remove()
            _pass.reset(token)

    def _collect(self, state: Pass) -> list[RemovableHandle]:
        """Hooks that put the hidden states of ``state.feature_layers`` into ``state.hidden``."""
        count = self.model.config.get_text_config().num_hidden_layers
        decoder = self.model.get_decoder()
        layers = next(
            m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count
        )

        def hook_on(index: int) -> RemovableHandle:
            def keep_input(module, args):
                state.hidden[index] = args[0]

            def keep_output(module, args, output):
                state.hidden[index] = output[0]

            if index == count:
                return decoder.register_forward_hook(keep_output)
            return layers[index].register_forward_pre_hook(keep_input)

        return [hook_on(i) for i in set(state.feature_layers)]

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        state: Pass,
        last_only: bool = False,
        row: Tensor | None = None,
    ) -> Tensor:
        """Logits of ``tokens``.

        Args:
            tokens: [B, M] int64.
            positions: [B, M] int64, of each token.
            state: the pass; its ``recorded`` and ``calls`` are filled.
            last_only: logits of the last row only (prefill).
            row: [1] int64, logits of that row only.

        Returns:
            [B, M or 1, V] in the model's dtype.
        """
        keep = row if row is not None else int(last_only)
        with self._installed(state):
            return self.model(
                input_ids=tokens,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=keep,
                **{CACHE: state.cache},
            ).logits
