"""Makes a model of `transformers` use our cache and our kernel, without touching its code.

The model calls the attention function registered here under the name ``"specextend"``. What it
needs to know beyond its arguments (which cache, which tree, where the new rows go, which layers are
scored) is the current :class:`specextend.cache.Pass`.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from functools import cache, partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from . import ops, recurrent
from .cache import ATTENTION, AllStored, KVCache, Pass, current_pass, in_pass, running
from .compat import CACHE, layer_kinds
from .fused import TOKENS as TRIAL
from .fused import Fusion, calls_of, install, is_off, tried
from .longrope import changing_modules, redirect
from .products import OwnProducts
from .recurrent import Keeper, keepers_of
from .switches import Undo, switched
from .windows import TOKENS, question

# Tensors that models hand on to every attention, and that say nothing new to ours.
_HARMLESS = {"position_ids", "cache_position"}


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
    if attention_mask is not None:
        raise RuntimeError(
            f"{type(module).__name__} brings an attention mask of its own; specextend serves "
            "models whose attention is causal, with or without a sliding window"
        )
    for name, given in kwargs.items():
        if isinstance(given, Tensor) and name not in _HARMLESS:
            raise RuntimeError(
                f"{type(module).__name__} brings a {name} of its own, which specextend's attention "
                "does not know"
            )
    source, new = state.source(key)
    if new:
        state.calls.append(source)
        state.write(source, key, value)
    if state.keys_only and state.last == source:
        raise AllStored  # nothing that follows is wanted
    layer, layer_idx = state.cache.layers[source], module.layer_idx
    window = state.layer_windows.get(layer_idx, sliding_window or 0)
    chunk = state.layer_chunks.get(layer_idx, 0)
    if state.window and not chunk:
        window = min(window, state.window) if window else state.window
    q = state.queries(query)
    scored_as = source if new else layer_idx  # a module that several layers share has one index
    scored = scored_as in state.score_layers
    if not state.fused:
        if softcap or s_aux is not None:
            raise ValueError(
                "tree_attention=False: torch's SDPA knows no softcap and no sink logit"
            )
        if scored:
            state.recorded[scored_as] = (q, scaling, source)
        return _dense_attention(state, layer, q.transpose(1, 2), scaling, window, chunk), None
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
        attention_chunk=chunk,
        q_depths=state.q_depths if window or chunk else None,
        k_depths=state.k_depths if window or chunk else None,
        sinks=None if s_aux is None else s_aux.float(),
        chunk_size=state.chunk_size if scored else 0,
    )
    if scored:
        state.recorded[scored_as] = (chunk_lse, lse, source)
    return out, None


def _dense_attention(
    state: Pass, layer, query: Tensor, scaling: float | None, window: int, chunk: int
) -> Tensor:
    """Attend to prefix and tree by torch's SDPA with a dense mask: the ablation's baseline."""
    length = state.cache.length
    end = length + state.num_tree_keys
    mask = state.dense_mask(query.shape[2], length, window, chunk, query.device)
    out = F.scaled_dot_product_attention(
        query,
        layer.keys[:, :, :end],
        layer.values[:, :, :end],
        attn_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != layer.keys.shape[1],
    )
    return out.transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION, _attention)
# Not registered as a mask: `transformers` then builds none, which is what we want.


def evaluating(model: torch.nn.Module) -> AbstractContextManager[None]:
    """Put a model in evaluation mode for a ``with`` block: dropout would change the output."""
    return switched({("evaluation", id(model)): partial(_evaluate, model)})


def _evaluate(model: torch.nn.Module) -> Undo:
    training = [m for m in model.modules() if m.training] if model.training else []

    def set_training(value: bool) -> None:
        for module in training:
            module.training = value

    set_training(False)
    return partial(set_training, True)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the module of a model that has its layers, without the head. (`get_decoder` may return
    the model, as Llama 4's does.)"""
    count = model.config.get_text_config().num_hidden_layers
    for part in model.get_decoder().modules():
        if any(_is_list_of(count, child) for child in part.children()):
            return part
    raise ValueError(
        f"{type(model).__name__} has no list of its {count} layers to take hidden states from"
    )


def _is_list_of(count: int, module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == count


def _num_weights(*modules: nn.Module) -> int:
    return sum({p: p.numel() for m in modules for p in m.parameters()}.values())


def _rename(config: PreTrainedConfig) -> Undo:
    """Have a configuration name our attention to whoever asks from within a pass.

    The name that it holds stays, and other threads are told it. An instance cannot do that, so
    the configuration is of another class for a while.
    """
    own = type(config)
    object.__setattr__(config, "__class__", _in_passes(own))
    return partial(object.__setattr__, config, "__class__", own)


@cache
def _in_passes(own: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Make the class that a configuration of class ``own`` has while its model runs in passes."""

    def name(self) -> str | None:
        state = in_pass()
        return self._attn_implementation_internal if state is None else state.attention

    def reduce(self, protocol):  # copies are of the class that has a name
        make, (_, *args), *state = own.__reduce_ex__(self, 0)
        return make, (own, *args), *state

    body = {
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__reduce_ex__": reduce,
        "_attn_implementation": property(name, own._attn_implementation.fset),
    }
    return type(own.__name__, (own,), body)


# What is known of models. It is found anew whenever a model is tried, as it may have changed.
_windows: WeakKeyDictionary[PreTrainedModel, tuple[dict[int, int], dict[int, int]]] = (
    WeakKeyDictionary()
)
# With the dtype and the device that it was tried in.
_fusions: WeakKeyDictionary[PreTrainedModel, tuple[object, tuple[Fusion, ...]]] = (
    WeakKeyDictionary()
)
_keepers: WeakKeyDictionary[PreTrainedModel, tuple[Keeper, ...]] = WeakKeyDictionary()


def device_of(model: PreTrainedModel) -> torch.device:
    """Return the device that a model's embedding works on, also where accelerate keeps its weights
    somewhere else until they are needed."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)


def check_autocast(device: torch.device) -> None:
    """Refuse to compute in other dtypes than those of the weights.

    Raises:
        RuntimeError: with the dtype that autocast would use.
    """
    if torch.is_autocast_enabled(device.type):
        raise RuntimeError(
            f"torch.autocast computes in {torch.get_autocast_dtype(device.type)} here and there, "
            "which specextend's caches and kernels do not follow: leave its block, or load the "
            "model in that dtype"
        )


class PatchedModel:
    """Runs a model in :class:`Pass` es, and leaves it as it was outside of them.

    While a forward of ours runs, also until it raises, the model is in evaluation mode, its
    configurations name our attention to the threads that are in a pass, rotary embeddings that
    depend on the length of a forward work on copies, and hooks collect the features that a pass
    asks for. Other threads may run the same model meanwhile, in passes of
    other :class:`PatchedModel` s or without one, with its own attention.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        self._configs = [c for c in configs.values() if isinstance(c, PreTrainedConfig)]
        self._changing = changing_modules(model)
        self.kinds = layer_kinds(model.config)
        self._products = OwnProducts(model)

    @property
    def num_layers(self) -> int:
        """Count the layers."""
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def vocab_size(self) -> int:
        """Count the entries of the vocabulary; the head may be padded."""
        return self.model.config.get_text_config().vocab_size

    @contextlib.contextmanager
    def _installed(self, state: Pass):
        changes = {("name", id(c)): partial(_rename, c) for c in self._configs}
        changes |= {("rotary", id(m)): partial(redirect, m) for m in self._changing}
        if state.fusions:
            changes["fusions", id(self.model)] = partial(install, state.fusions)
        if state.keepers:
            changes["keepers", id(self.model)] = partial(recurrent.install, state.keepers)
        if state.feature_layers:
            changes["features", id(state)] = partial(self._collect, state)
        with switched(changes), evaluating(self.model), self._products.active(), running(state):
            yield

    @property
    def device(self) -> torch.device:
        """Return where token ids are wanted."""
        return device_of(self.model)

    @property
    def keeps_states(self) -> bool:
        """Tell whether any layer keeps a state, of which nothing can be taken back."""
        return any(kind.states for kind in self.kinds)

    @property
    def branches(self) -> float:
        """Return the share of the model's weights that a tree passes path by path, those of modules
        that keep a state, instead of once for each node."""
        own = {id(keeper.module) for keeper in _keepers.get(self.model, ())}
        if not own:
            return 0.0
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        kept = [m for m in decoder.modules() if id(m) in own]
        table = self.model.get_input_embeddings()
        looked_up = 0 if table.weight is head.weight else _num_weights(table)
        return _num_weights(*kept) / (_num_weights(decoder, head) - looked_up)

    def make_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """Make a cache for what each of the model's layers keeps of ``capacity`` tokens."""
        return recurrent.cache_class(type(self.model))(self.kinds, capacity, batch, self.device)

    def find_windows(self) -> dict[int, int]:
        """Ask the model's masks how far each layer sees, as :mod:`specextend.windows` describes it.

        Returns:
            By layer, keys that a token sees, the own one included; 0: all, or from the start of its
            own chunk on, where masks cut attention into chunks.
        """
        asked = question(self.model, self.device)
        tokens = torch.zeros(1, TOKENS, dtype=torch.int64, device=self.device)
        seen = torch.ones_like(tokens)  # without this, some make no mask
        with torch.inference_mode(), self._installed(asked):
            self.model(input_ids=tokens, attention_mask=seen, use_cache=False, logits_to_keep=1)
        _windows[self.model] = asked.windows, asked.chunks
        return asked.windows

    @property
    def chunks(self) -> dict[int, int]:
        """Return, by layer, the length of its chunks of attention, where it has any; known from
        :meth:`find_windows`."""
        return _windows[self.model][1]

    def find_fusions(self) -> tuple[Fusion, ...]:
        """Try which of the model's modules our operators may compute (:mod:`specextend.fused`)."""
        cache = self.make_cache(TRIAL)
        state = Pass(cache, [(cache, cache.lens)], TRIAL)
        state.layer_windows, state.layer_chunks = _windows[self.model]
        # Of padding some would warn.
        padding = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        positions = torch.arange(TRIAL, device=self.device)[None]
        with torch.inference_mode(), self._installed(state):
            with calls_of(self.model, state) as calls, keepers_of(self.model, state) as keepers:
                self.model(
                    input_ids=torch.full_like(positions, int(padding == 0)),
                    position_ids=positions,
                    use_cache=True,
                    logits_to_keep=1,
                    **{CACHE: cache},
                )
            found = tried(self.model, calls, state)
        _fusions[self.model] = self._computed_in, found
        _keepers[self.model] = tuple(Keeper(module) for module in keepers.values())
        return found

    @property
    def _computed_in(self) -> tuple[torch.device, torch.dtype]:
        return self.device, self.model.dtype

    def _collect(self, state: Pass) -> Undo:
        """Hook the model, so that ``state.hidden`` gets the layers of ``state.feature_layers``."""
        count = self.num_layers
        decoder = decoder_of(self.model)
        layers = next(m for m in decoder.children() if _is_list_of(count, m))

        def hook_on(index: int) -> RemovableHandle:
            def keep_input(module, args):
                if in_pass() is state:  # not another thread's forward
                    state.hidden[index] = args[0]

            def keep_output(module, args, output):
                if in_pass() is state:
                    state.hidden[index] = output[0]

            if index == count:
                return decoder.register_forward_hook(keep_output)
            return layers[index].register_forward_pre_hook(keep_input)

        hooks = [hook_on(i) for i in set(state.feature_layers)]

        def remove() -> None:
            for hook in hooks:
                hook.remove()

        return remove

    def read(self, tokens: Tensor, positions: Tensor, state: Pass) -> None:
        """Run the model over ``tokens`` for their keys, values and features, without logits.

        The last layer's attention and all that follows it is left out, where it can be.

        Args:
            tokens, positions, state: as of :meth:`forward`.
        """
        state.keys_only = self.num_layers not in state.feature_layers and not any(
            # Left by an exception, they would not put weights back, or would compile once more.
            hasattr(m, "_hf_hook") or hasattr(m, "_orig_mod") or m._compiled_call_impl is not None
            for m in self.model.modules()
        )
        with contextlib.suppress(AllStored):
            self.forward(tokens, positions, state, last_only=True)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        state: Pass,
        last_only: bool = False,
        row: Tensor | None = None,
    ) -> Tensor:
        """Run the model over ``tokens``.

        Args:
            tokens: [B, M] int64.
            positions: [B, M] int64, of each token.
            state: the pass; its ``recorded`` and ``calls`` are filled.
            last_only: logits of the last row only (prefill).
            row: [1] int64, logits of that row only.

        Returns:
            [B, M or 1, V] logits in the model's dtype.
        """
        check_autocast(self.device)
        if last_only and row is None and state.feature_layers:
            # As a number it would let Gemma 4 leave out rows before the last layer.
            row = torch.tensor([tokens.shape[1] - 1], device=tokens.device)
        keep = row if row is not None else int(last_only)
        if self.model not in _windows:
            self.find_windows()
        if _fusions.get(self.model, (None,))[0] != self._computed_in:
            self.find_fusions()
        state.positions = positions
        state.layer_windows, state.layer_chunks = _windows[self.model]
        state.keepers = _keepers[self.model]
        state.fusions = None if is_off() else _fusions[self.model][1]
        with self._installed(state):
            return self.model(
                input_ids=tokens,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=keep,
                **{CACHE: state.cache},
            ).logits
