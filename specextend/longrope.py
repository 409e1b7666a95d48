"""Knows rotary embeddings whose factors depend on the length of a forward.

`transformers` chooses the factors of LongRoPE (arXiv 2402.13753) by the last position of each
forward, one set up to an edge and one beyond it, and keeps what it chose in buffers that all
forwards of a model share. Here a text is read in pieces, perhaps beside other forwards of the same
model; each piece has to be turned as in one forward over the text that it is a part of.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from .cache import in_pass
from .compat import CACHE
from .switches import Undo

_KINDS = ("dynamic", "longrope")


def changing_modules(model: nn.Module) -> list[nn.Module]:
    """Return the rotary embeddings of a model whose factors depend on the length of a forward."""
    return [m for m in model.modules() if not set(_KINDS).isdisjoint(_kinds(m))]


def _kinds(module: nn.Module) -> set[str]:
    kinds = getattr(module, "rope_type", None)
    return set(kinds.values()) if isinstance(kinds, dict) else {kinds}


def edges(model: PreTrainedModel, kind: str) -> set[int]:
    """Return the lengths beyond which the factors of a model's rotary embeddings change.

    Args:
        kind: "dynamic" or "longrope".
    """
    config = model.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    found = set()
    for rope in (ropes, *(v for v in ropes.values() if isinstance(v, dict))):
        if rope.get("rope_type", rope.get("type")) == kind:
            limit = getattr(config, "max_position_embeddings", None)
            found.add(rope.get("original_max_position_embeddings") or limit)
    return found - {None}


def longrope_edge(model: PreTrainedModel) -> int | None:
    """Return the one length beyond which a model has long factors; None if there is none, or more
    than one, or the model is not built as those of `transformers`."""
    found = edges(model, "longrope")
    return found.pop() if len(found) == 1 and changing_modules(model) else None


def factors(model: PreTrainedModel, length: int) -> tuple:
    """Return what the factors of a model's rotary embeddings depend on in a text of ``length``
    tokens: where it is the same for two lengths, keys are turned alike."""
    if not changing_modules(model):
        return ()
    long, dynamic = edges(model, "longrope"), edges(model, "dynamic")
    if not long | dynamic:  # not built as those of `transformers`
        return (length,)
    return *(length > edge for edge in sorted(long)), *(max(length, edge) for edge in dynamic)


def drops_cache(model: PreTrainedModel, edge: int) -> bool | None:
    """Tell whether ``generate`` reads a text anew when it grows beyond ``edge``, with an empty
    cache, as Phi-3 does; False: the keys of all tokens before stay as they are; None: it does
    something else, or cannot be asked."""
    ids, rows = torch.zeros(1, edge + 1, dtype=torch.int64), torch.zeros(1, 1, edge, 1)
    cache = DynamicCache()
    cache.update(rows, rows, 0)
    try:
        prepared = model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=1,
            position_ids=torch.arange(edge + 1)[None],
            attention_mask=torch.ones_like(ids),
            use_cache=True,
            **{CACHE: cache},
        )
    except Exception:  # of another version, or of remote code
        return None
    outcome = prepared.get(CACHE) is None, prepared["input_ids"].shape[1]
    return {(True, edge + 1): True, (False, 1): False}.get(outcome)


def redirect(module: nn.Module) -> Undo:
    """Have a rotary embedding work for passes on a copy of its own, by the length of their text;
    other forwards keep theirs."""
    own, of_instance = module.forward, "forward" in vars(module)

    def forward(x: Tensor, position_ids: Tensor, *args, **kwargs):
        state = in_pass()
        if state is None:
            return own(x, position_ids, *args, **kwargs)
        turn = partial(type(module).forward, _fresh(module), x)
        length = state.cache.rotary_length
        if not length:
            return turn(position_ids, *args, **kwargs)
        # One more position, the text's last one: the factors are chosen by the largest.
        last = position_ids.new_full((*position_ids.shape[:-1], 1), length - 1)
        cos, sin = turn(torch.cat([position_ids, last], -1), *args, **kwargs)
        return cos[..., :-1, :], sin[..., :-1, :]

    module.forward = forward

    def undo() -> None:
        if of_instance:
            module.forward = own
        else:
            del module.forward

    return undo


def _fresh(module: nn.Module) -> nn.Module:
    """Copy a rotary embedding, without what other forwards may have left in it."""
    fresh = copy.copy(module)
    fresh._buffers = {name: buffer.clone() for name, buffer in module._buffers.items()}
    for name, buffer in fresh._buffers.items():
        original = getattr(module, name.replace("inv_freq", "original_inv_freq"), None)
        if name.endswith("inv_freq") and original is not None:
            fresh._buffers[name] = original.to(buffer).clone()
    fresh.max_seq_len_cached = module.original_max_seq_len
    return fresh


def frequencies(model: PreTrainedModel, length: int) -> list[Tensor]:
    """Return the frequencies [R / 2] fp32 of a model's rotary embeddings, in a text of ``length``
    tokens; none if it has none."""
    found, changing = [], changing_modules(model)
    for module in model.modules():
        if module in changing:
            module = _fresh(module)
            kinds = module.rope_type if isinstance(module.rope_type, dict) else {}
            x = next(iter(module._buffers.values()))
            last = torch.tensor([[length - 1]], device=x.device)
            for layer_type in [(name,) for name in kinds] or [()]:
                type(module).forward(module, x, last, *layer_type)
        found += [
            buffer.float()
            for name, buffer in module._buffers.items()
            if name.endswith("inv_freq") and buffer.dim() == 1
        ]
    return found
