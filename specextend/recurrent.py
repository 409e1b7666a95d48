"""Runs layers that keep a state in a verify pass, so that it follows what is decided.

A recurrent or convolutional layer of `transformers` takes in the tokens it is given, and its state
cannot go back. Here such a layer is run twice in a forward over a tree: over what is decided, the
nodes that the last round accepted and the root, which its state keeps; then over the nodes below,
path by path in one batch, on copies that are dropped. Which of them are accepted is known after the
forward: what the layer was given for them waits for the next one (:mod:`.cache_layers`).

A draft takes in what is decided, and then grows its tree level by level: there a node has a copy of
the state behind its parent.

The layers' own code does all computing. Whose code that is, is found by watching a forward.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .cache import AllStored, KVCache, Pass, in_pass
from .cache_layers import StateLayer
from .switches import Undo


@contextlib.contextmanager
def keepers_of(model: nn.Module, state: Pass) -> Iterator[dict[int, nn.Module]]:
    """Note which of a model's modules keeps the state of each layer, in a forward of a pass.

    Yields:
        By layer, the innermost module that has a ``layer_idx`` and changed the layer's state.
    """
    found: dict[int, nn.Module] = {}
    running: list[nn.Module] = []

    def begin(module, args) -> None:
        if in_pass() is state:  # not another thread's forward
            running.append(module)

    def end(module, args, output) -> None:
        if in_pass() is state:
            running.pop()

    def note(index: int) -> None:
        found[index] = running[-1]

    hooks = []
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            hooks += module.register_forward_pre_hook(begin), module.register_forward_hook(end)
    for index, layer in enumerate(state.cache.layers):
        if isinstance(layer, StateLayer):
            layer.on_update = lambda index=index: note(index)
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class _OneState(KVCache):
    """Answers what MiniMax asks its own cache for, the one state of each of its layers."""

    def __len__(self) -> int:
        return len(self.layers)

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        return next(iter(self.layers[layer_idx].states), None)

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        self.layers[layer_idx].update_recurrent_state(linear_cache)


@cache
def cache_class(model_class: type[PreTrainedModel]) -> type[KVCache]:
    """Return the class of caches that a class of models takes: it may want one of its own."""
    own = [
        c
        for c in vars(sys.modules[model_class.__module__]).values()
        if isinstance(c, type) and issubclass(c, Cache) and c.__module__ == model_class.__module__
    ]
    if len(own) == 1 and hasattr(own[0], "get_linear_cache"):
        return type(own[0].__name__, (_OneState, *own), {})
    return KVCache


def install(keepers: Iterable[Keeper]) -> Undo:
    """Have modules that keep a state run by ours in passes, around the forward that each has."""
    before = [(keeper.module, vars(keeper.module).get("forward")) for keeper in keepers]
    for keeper in keepers:
        keeper.own = keeper.module.forward
        vars(keeper.module)["forward"] = keeper

    def undo() -> None:
        for module, forward in before:
            if forward is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward

    return undo


@dataclass(eq=False)
class Keeper:
    """Stands in for the forward of a module that keeps a state.

    Attributes:
        module: whose it is.
        own: the forward that it had when ours was put there.
        reads_state: whether a forward of it over several tokens goes on from a state; None: that
            has not been tried.
    """

    module: nn.Module
    own: Callable | None = None
    reads_state: bool | None = None

    def __call__(self, *args, **kwargs):
        state = in_pass()
        if state is None or not state.keepers:
            return self.own(*args, **kwargs)
        layer = state.cache.layers[self.module.layer_idx]
        name, hidden = _rows_of(args, kwargs)

        def run(rows: Tensor):
            """Run the module's own forward over rows [B, n, H]."""
            if name is None:
                return self.own(rows, *args[1:], **kwargs)
            return self.own(*args, **{**kwargs, name: rows})

        if state.level is not None:
            layer.grow(state.level)
            out, form = _opened(run(hidden.transpose(0, 1)))
            return form(out.transpose(0, 1))
        count = hidden.shape[1] if state.paths is None else 1
        decided = hidden[:, :count]
        if layer.pending is not None:
            decided = torch.cat([layer.pending, decided], 1)
            layer.pending = None
        calls = len(state.calls)
        out, form = _opened(self._advance(layer, decided, run))
        if len(state.calls) != calls:
            raise ValueError(f"{type(self.module).__name__} attends where it keeps its state")
        if state.keys_only and state.last == self.module.layer_idx:
            raise AllStored
        out = out[:, -count:]
        if state.paths is not None:
            layer.proposed = hidden
            rows, places = state.paths
            with layer.branched(len(rows)):
                beyond, _ = _opened(self._advance(layer, hidden[0][rows], run))
            out = torch.cat([out, beyond.flatten(0, 1)[places][None]], 1)
        return form(out)

    def _advance(self, layer: StateLayer, rows: Tensor, run: Callable):
        """Run over rows [B, n, H] behind a state, all at once where the module can do that."""
        if rows.shape[1] == 1 or not layer.states:
            return run(rows)
        if self.reads_state is None:
            self.reads_state = _reads_state(layer, rows, run)
        if self.reads_state:
            return run(rows)
        parts = [_opened(run(row)) for row in rows.split(1, 1)]
        return parts[-1][1](torch.cat([out for out, _ in parts], 1))


def _reads_state(layer: StateLayer, rows: Tensor, run: Callable) -> bool:
    """Tell whether a forward over several rows goes on from a state, whichever tensor of it
    changes: some begin anew."""

    def outcome(changed: int | None) -> Tensor:
        with layer.branched(rows.shape[0]):
            if changed is not None:
                layer.states[changed].add_(1)
            return _opened(run(rows))[0]

    own = outcome(None)
    return all(not torch.equal(own, outcome(i)) for i in range(len(layer.states)))


def _rows_of(args: tuple, kwargs: dict) -> tuple[str | None, Tensor]:
    """Return what a module works on, the first tensor, and its name if it came by one."""
    if args:
        return None, args[0]
    return next((k, v) for k, v in kwargs.items() if isinstance(v, Tensor))


def _opened(result) -> tuple[Tensor, Callable]:
    """Return the rows of what a module gives, and what puts others in their place."""
    if isinstance(result, Tensor):
        return result, lambda rows: rows
    return result[0], lambda rows: (rows, *result[1:])
