"""Computes what lies between a model's matrix products by operators of ours.

A model of `transformers` makes an RMSNorm of six operators, a rotation with its writes to the cache
of a dozen. One operator each gives the same bits and takes a launch, or a pass through memory. The
forwards here stand in for those of a model's modules while it runs in a pass:

* an RMSNorm is ``rms_norm``;
* a gated feed-forward layer, ``down(silu(gate(x)) * up(x))``, has ``silu_mul`` in its middle;
* an attention layer runs its own code, in which the function ``apply_rotary_pos_emb`` leaves the
  rotation to the pass: it is made with the write to the cache (``rotary_append``);
* a decoder layer of one of the forms in ``_LAYERS`` adds and normalises by ``add_rms_norm``.

Names and attributes only say what may be tried. Each form that a model has is tried on random rows,
beside the modules' own forward, and is used where all that it gives and writes has the same bits.
All else stays as it is, and so does what somebody else has changed.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from . import ops
from .cache import Pass, current_pass, in_pass, running
from .layout import by_rows
from .switches import Undo, switched

#: tokens of the forward in which forms are tried
TOKENS = 5

_ROTATION = "apply_rotary_pos_emb"  # the function by this name in a family's file
_GATED = ("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj")
_ACTIVATIONS = {"act_fn", "activation_fn"}
# Norms of a decoder layer, besides the first: of what attention gives, of the sum with it, and of
# what the feed-forward layer gives.
_LAYERS = (
    (None, "post_attention_layernorm", None),  # Llama
    (
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),  # Gemma 2
    ("post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),  # GLM-4
)

_off: contextvars.ContextVar[bool] = contextvars.ContextVar("specextend_unfused", default=False)


@contextlib.contextmanager
def unfused():
    """Have models compute in their own way for a ``with`` block, to compare with."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def is_off() -> bool:
    """Tell whether this thread is in :func:`unfused`."""
    return _off.get()


@dataclass(frozen=True, eq=False)
class Fusion:
    """Holds the forward that stands in for a module's own.

    Attributes:
        kind: "norm", "gated", "attention" or "layer".
        module: whose it is.
        own: its own forward, as it was when it was tried.
        forward: ours.
        skipped: modules below it that it does not call. It is not used while they have hooks, or
            a forward that somebody else has put there.
    """

    kind: str
    module: nn.Module
    own: Callable
    forward: Callable
    skipped: tuple[nn.Module, ...] = ()

    def __call__(self, *args, **kwargs):
        state = in_pass()
        if state is None or state.fusions is None:
            return self.own(*args, **kwargs)
        for module in self.skipped:
            changed = type(vars(module).get("forward", self)) is not Fusion
            if changed or module._forward_hooks or module._forward_pre_hooks:
                return self.own(*args, **kwargs)
        return self.forward(*args, **kwargs)


def install(fusions: Iterable[Fusion]) -> Undo:
    """Have modules run our forwards in passes, except those whose forward is another one now."""
    done = [f for f in fusions if f.module.forward == f.own]
    for fusion in done:
        vars(fusion.module)["forward"] = fusion

    def undo() -> None:
        for fusion in done:
            if vars(fusion.module).get("forward") is fusion:
                del vars(fusion.module)["forward"]

    return undo


# ---- the forms ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Norm:
    """Normalises rows by ``rms_norm``, or a sum by ``add_rms_norm``."""

    module: nn.Module
    options: dict[str, object]

    def __call__(self, x: Tensor) -> Tensor:
        return ops.rms_norm(by_rows(x), self.module.weight, **self.options)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return (the norm of the sum, the sum)."""
        return ops.add_rms_norm(by_rows(x), by_rows(residual), self.module.weight, **self.options)


def _norms(module: nn.Module, known) -> Iterator[Fusion]:
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or weight is None or weight.dim() != 1:
        return
    if isinstance(eps, float) and not module._modules:
        for offset, round_first in (0.0, True), (1.0, False), (0.0, False):
            options = dict(eps=eps, offset=offset, round_first=round_first)
            yield Fusion("norm", module, module.forward, _Norm(module, options))


def _gated(module: nn.Module, known) -> Iterator[Fusion]:
    names = next((names for names in _GATED if set(names) <= module._modules.keys()), None)
    if names is None or not _made_of(module, {*names, *_ACTIVATIONS}):
        return

    def apart(x: Tensor) -> Tensor:
        return module.down_proj(ops.silu_mul(module.gate_proj(x), module.up_proj(x)))

    def merged(x: Tensor) -> Tensor:
        return module.down_proj(ops.silu_mul(*module.gate_up_proj(x).chunk(2, -1)))

    skipped = tuple(m for name, m in module._modules.items() if name not in names)
    forward = apart if names is _GATED[0] else merged
    yield Fusion("gated", module, module.forward, forward, skipped)


def _attentions(module: nn.Module, known) -> Iterator[Fusion]:
    code = inspect.unwrap(type(module).forward)
    known_code = isinstance(code, FunctionType) and _ROTATION in code.__code__.co_names
    if known_code and hasattr(module, "layer_idx"):
        forward = MethodType(_leaving_rotation(code), module)
        yield Fusion("attention", module, module.forward, forward)


@functools.cache
def _leaving_rotation(code: FunctionType) -> FunctionType:
    """Copy a forward, with the rotation of queries and keys left to the pass."""

    def leave(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        current_pass().leave_rotation(q, k, cos, sin)
        return q, k

    names = {**code.__globals__, _ROTATION: leave}
    new = FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)
    new.__kwdefaults__ = code.__kwdefaults__
    return new


def _layers(layer: nn.Module, known: dict[nn.Module, Fusion]) -> Iterator[Fusion]:
    for names in _LAYERS:
        children = {"input_layernorm", "self_attn", "mlp", *names} - {None}
        if not (children <= layer._modules.keys() and _made_of(layer, children)):
            continue
        first, middle, last = (layer._modules.get(name) for name in names)
        if middle in known:
            forward = functools.partial(_run_layer, layer, first, known[middle].forward, last)
            rest = (m for name, m in layer._modules.items() if name not in children)
            yield Fusion("layer", layer, layer.forward, forward, (middle, *rest))


def _run_layer(
    layer: nn.Module,
    first: nn.Module | None,
    middle: _Norm,
    last: nn.Module | None,
    hidden_states: Tensor,
    **kwargs,
) -> Tensor:
    x = layer.input_layernorm(hidden_states)
    x, _ = layer.self_attn(hidden_states=x, **kwargs)
    x, total = middle.add(x if first is None else first(x), hidden_states)
    x = layer.mlp(x)
    x = x[0] if isinstance(x, tuple) else x  # with what a router says
    return total + (x if last is None else last(x))


def _made_of(module: nn.Module, names: set[str]) -> bool:
    """Tell whether a module has no parts but those named, and dropout, which does nothing here."""
    rest = (m for name, m in module._modules.items() if name not in names)
    return (
        not module._parameters and not module._buffers and all(type(m) is nn.Dropout for m in rest)
    )


# ---- the trial ---------------------------------------------------------------------------------

_KINDS = _norms, _gated, _attentions, _layers  # each is tried on top of those before


@contextlib.contextmanager
def calls_of(model: nn.Module, state: Pass) -> Iterator[dict[nn.Module, tuple]]:
    """Note the arguments with which a pass calls each of a model's modules."""
    calls: dict[nn.Module, tuple] = {}

    def note(module, args, kwargs) -> None:
        if in_pass() is state:  # not another thread's forward
            calls[module] = args, kwargs

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in model.modules()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def tried(model: nn.Module, calls: dict[nn.Module, tuple], state: Pass) -> tuple[Fusion, ...]:
    """Find out which modules of a model may run our forwards.

    Args:
        calls: of a forward over ``TOKENS`` tokens in a pass, by :func:`calls_of`.
        state: that pass, of a cache of the model.

    Returns:
        Those that gave what their modules' own give.
    """
    if any(_compiled(m) for m in model.modules()):
        return ()
    known: dict[nn.Module, Fusion] = {}
    for kind in _KINDS:
        found: dict[object, int | None] = {}  # the candidate of each form that is right
        added = {}
        for module in calls:
            candidates = list(kind(module, known)) if "forward" not in vars(module) else []
            if not candidates:
                continue
            form = _form(module)
            if form not in found:
                trial = _Trial(*calls[module], state, tuple(known.values()))
                found[form] = next((i for i, c in enumerate(candidates) if trial.passes(c)), None)
            if found[form] is not None:
                added[module] = candidates[found[form]]
        known |= added
    return tuple(known.values())


def _compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(
        module.forward, "_torchdynamo_orig_callable"
    )


def _form(module: nn.Module) -> object:
    """Return what modules that compute alike have in common: all but the numbers in tensors."""
    plain = (bool, int, float, str, type(None), FunctionType)
    settings = [
        (name, key, value)
        for name, m in module.named_modules()
        for key, value in vars(m).items()
        if isinstance(value, plain) and key != "layer_idx"
    ]
    tensors = [(n, t.shape, t.dtype, t.device) for n, t in module.named_parameters()]
    return tuple((n, type(m)) for n, m in module.named_modules()), (*settings,), (*tensors,)


@dataclass
class _Trial:
    """Calls forwards of one module with random rows of the shape that a pass gave it."""

    args: tuple
    kwargs: dict
    state: Pass
    fusions: tuple[Fusion, ...]

    def passes(self, candidate: Fusion) -> bool:
        """Tell whether a candidate gives and writes what its module's own forward does."""
        if candidate.kind == "norm":
            candidate = _with_random_weight(candidate)
        try:
            expected, got = self._run(candidate.own), self._run(candidate.forward)
        except Exception:  # it is of another form
            return False
        same = _same_norm if candidate.kind == "norm" else _same
        return len(got) == len(expected) and all(map(same, got, expected))

    def _run(self, forward: Callable) -> list[Tensor]:
        """Return the tensors that a forward gives, and the keys and values that it writes."""
        own = self.state.cache
        cache = type(own)(own.kinds, TOKENS, 1, own.lens.device)
        state = Pass(
            cache,
            [(cache, cache.lens)],
            TOKENS,
            layer_windows=self.state.layer_windows,
            layer_chunks=self.state.layer_chunks,
            fusions=self.fusions,
        )
        draw = torch.Generator().manual_seed(0)
        fresh = True

        def renew(value):
            nonlocal fresh
            if value is own:
                return cache
            if not (fresh and isinstance(value, Tensor) and value.is_floating_point()):
                return value
            fresh = False  # the first is what the module works on
            x = torch.randn(value.shape, generator=draw)
            sizes = torch.logspace(-2, 1, value.shape[1]).view(-1, *[1] * (x.dim() - 2))
            return (x * sizes).to(value)

        args, kwargs = tree_map(renew, (self.args, self.kwargs))
        with running(state), switched({("trial", id(state)): lambda: install(self.fusions)}):
            out = forward(*args, **kwargs)
        written = [t for la in cache.kv_layers for t in (la.keys, la.values)]
        return [t for t in (*tree_leaves(out), *written) if isinstance(t, Tensor)]


def _with_random_weight(fusion: Fusion) -> Fusion:
    """Copy a norm's forwards: with a weight of ones, all variants are the same."""
    weight = fusion.module.weight
    draw = torch.Generator().manual_seed(1)
    module = copy.copy(fusion.module)
    module._parameters = {"weight": torch.randn(weight.shape, generator=draw).to(weight)}
    forward = _Norm(module, fusion.forward.options)
    return Fusion("norm", module, MethodType(type(module).forward, module), forward)


def _same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors have the same bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _same_norm(a: Tensor, b: Tensor) -> bool:
    """Tell whether two norms have the same bits; on a GPU, but for the order of a row's sum."""
    return _same(a, b) or (a.is_cuda and a.dtype == b.dtype and _same_but_for_order(a, b))


def _same_but_for_order(a: Tensor, b: Tensor) -> bool:
    """Tell whether two norms [.., N] may differ by the order in which squares were added up alone.

    That moves their mean by its last bits. A result in fp32 may then be a few numbers away; one in
    another dtype is another only where it was next to a border between two: hardly ever, while to
    round at another point changes every third.
    """
    step = 4 * torch.finfo(a.dtype).eps
    near = ((a.double() - b.double()).abs() <= step * b.double().abs()).all()
    return bool(near) and (a.dtype == torch.float32 or float((a != b).double().mean()) < 1 / 64)
