"""Guards the start: wrong logits would be silent, so a model is tried before it is used."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from . import ops  # noqa: F401  registers what a pass calls
from .attention import PatchedModel, check_autocast, evaluating
from .cache import KVCache, Pass
from .compat import layer_kinds
from .longrope import drops_cache, edges, longrope_edge
from .recurrent import cache_class
from .tree import Tree, paths
from .windows import cache_windows

_PREFIX = 5
# A tree: 0 is the root; 1 and 2 are its children, 3 is a child of 1.
_PARENTS, _DEPTHS, _MASKS = (-1, 0, 0, 1), (0, 1, 1, 2), (0b0001, 0b0011, 0b0101, 0b1011)
_ACCEPTED = (0, 1, 3)


class UnsupportedModelError(ValueError):
    """Says why specextend would not reproduce a model exactly."""


def _refuse(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    decoder = _decoder_class(model)
    if decoder is not None:
        why += f". For text alone, load its decoder: {decoder}.from_pretrained"
    return UnsupportedModelError(f"{type(model).__name__} is not supported: {why}")


def _decoder_class(model: PreTrainedModel) -> str | None:
    """Return the name of the class that a model's text part alone has, if it has other parts."""
    text = model.config.get_text_config()
    if text is model.config:
        return None
    for config in (model.config, text):
        found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if found is not None and not isinstance(model, found):
            return found.__name__
    return None


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse what a short trial cannot show.

    Raises:
        UnsupportedModelError: layers that keep something else than keys and values, or a state.
    """
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise _refuse(model, "it is an encoder-decoder; a decoder-only causal LM is wanted")
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise _refuse(model, "it has no language-modelling head; load it with AutoModelForCausalLM")
    strange = sorted({kind for kind in layer_kinds(config) if isinstance(kind, str)})
    index = next((name for name in sorted(vars(config)) if name.startswith("index_")), None)
    if index is not None:
        raise _refuse(
            model,
            f"its attention is sparse by an index ({index}={getattr(config, index)}): which keys a "
            "token sees is chosen by scores of other keys, in a cache of their own, anew for every "
            "token, so also for every token of a tree",
        )
    if strange:
        raise _refuse(
            model,
            f"it keeps what a {strange[0]} holds; known are keys and values of full or sliding "
            "attention, and states of recurrent and convolutional layers",
        )
    # `transformers` before 5.21 loads Gemma 2 this way, unless it is told not to. What that does to
    # the logits is less than the trial allows in bfloat16.
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap and config._attn_implementation == "sdpa":
        raise _refuse(
            model,
            f"its attention has a softcap of {softcap:g}, which torch's SDPA, the implementation "
            "it was loaded with, leaves out, so that its own logits are not those of the model; "
            'load it with attn_implementation="eager", or use transformers >= 5.21',
        )


def position_limit(model: PreTrainedModel) -> int | None:
    """Return the positions that the model was made for, None if it does not say."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def check_length(model: PreTrainedModel, prompt: int, total: int, role: str = "target") -> None:
    """Refuse a context that the model cannot hold, or in which its positions would change meaning.

    Args:
        prompt: tokens of the prompt.
        total: tokens of prompt and output.
        role: for the text of the error.
    """
    limit = position_limit(model)
    if role == "target" and limit is not None and total > limit:
        raise ValueError(
            f"the {role} {type(model).__name__} has {limit} positions, but the prompt's {prompt} "
            f"tokens and {total - prompt} new ones need {total}; shorten the prompt or "
            "max_new_tokens"
        )
    crossed = [("dynamic", e) for e in edges(model, "dynamic") if total > e]
    edge = longrope_edge(model)
    for other in edges(model, "longrope"):
        follows = edge is not None and (role == "draft" or drops_cache(model, edge) is not None)
        if prompt <= other < total and not follows:
            crossed.append(("longrope", other))
    for kind, changes_at in crossed:
        raise ValueError(
            f"the {role}'s {kind} rotary embedding changes at {changes_at} tokens, inside this "
            f"context of {prompt} + {total - prompt}: tokens before and after would not agree"
        )


def self_check(patched: PatchedModel) -> None:
    """Compare trees on our cache and kernel with the model's own attention: one of four nodes, and
    where layers keep a state a second one behind a path of the first.

    Counts the attention calls, one per layer that keeps keys. A few forwards over a dozen tokens.

    Raises:
        UnsupportedModelError: with what differed.
    """
    model = patched.model
    check_architecture(model)
    check_autocast(patched.device)
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    count = _PREFIX + 2 * len(_PARENTS)
    draw = torch.randint(0, config.vocab_size, (1, count), generator=generator).to(patched.device)
    try:
        _check_windows(patched)
        patched.find_fusions()
        ours = _tree_logits(patched, draw)
        own = _path_logits(patched, draw, len(ours))
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise _refuse(model, f"a trial forward failed: {error}") from error
    reference = own.double()
    if not torch.isfinite(reference).any():
        return  # a model of NaNs is found out when it is used
    error = (ours.double() - reference).norm() / reference.norm().clamp_min(1e-30)
    low_precision = torch.finfo(ours.dtype).bits < 32
    if not error <= (0.05 if low_precision else 1e-4):
        found = f"logits of a small tree differ from the model's own by {float(error):.1e}"
        own = _own_noise(patched, draw[:, : _PREFIX + len(_PARENTS)])
        why = (
            f"its attention{' or a state' if patched.keeps_states else ''} is probably expressed "
            "in a way that specextend does not see, or not honoured by the implementation it was "
            'loaded with (try attn_implementation="eager")'
            if own < error / 10
            else f"its own move by {float(own):.1e} with the last bits of its embeddings or the "
            "number of tokens in a forward, as where activations are quantised or products are of "
            "fewer bits than its dtype: no two ways of computing them agree. In bfloat16 it is "
            "served with that dtype's reservations"
        )
        raise _refuse(model, f"{found} (relative); {why}")


def _own_noise(patched: PatchedModel, tokens: Tensor) -> Tensor:
    """Return how far a model's own logits move, relatively, with what should not matter: the last
    bits of its embeddings, and the number of tokens in a forward."""
    whole = _own_logits(patched, tokens).double()
    alone = [_own_logits(patched, tokens[:, :n])[-1] for n in range(1, tokens.shape[1] + 1)]

    def last_bits(module, args, output):
        return output * (1 + 2e-6 * torch.sign(torch.sin(1e4 * output)))

    handle = patched.model.get_input_embeddings().register_forward_hook(last_bits)
    try:
        moved = _own_logits(patched, tokens)
    finally:
        handle.remove()
    others = torch.stack([torch.stack(alone), moved]).double()
    return (others - whole).flatten(1).norm(dim=1).max() / whole.norm().clamp_min(1e-30)


def _check_windows(patched: PatchedModel) -> None:
    """Refuse a model whose cache forgets what its masks show, or keeps what they hide."""
    model = patched.model
    shows = {**patched.find_windows(), **patched.chunks}
    if any(shows.values()) and cache_class(type(model)) is not KVCache:
        raise _refuse(
            model,
            f"it has a sliding window of {max(shows.values())}, of which its own class of caches "
            "does not know: its text depends on whether it has one",
        )
    for layer, kept in cache_windows(model).items():
        if kept == 1:
            raise _refuse(model, "its sliding_window is 1, with which generate's cache keeps all")
        shown = shows.get(layer, kept)  # a layer that has not asked is refused for that
        if shown == 0 or shown > kept:
            raise _refuse(
                model,
                f"its layer {layer} sees {shown or 'all'} tokens, but generate keeps the last "
                f"{kept} of them in its cache (sliding_window or attention_chunk_size), so that a "
                "text depends on the forwards it was read in; set that to None if all are to be "
                "seen",
            )


def _small_tree(tokens: Tensor) -> Tree:
    """Make a tree of the shape of ``_PARENTS`` with tokens [1, 4]."""
    to = dict(device=tokens.device)
    return Tree(
        tokens,
        torch.tensor([_PARENTS], dtype=torch.int32, **to),
        torch.tensor([_DEPTHS], dtype=torch.int32, **to),
        torch.tensor([_MASKS], **to)[..., None],
        None,
        2,
    )


@torch.inference_mode()
def _tree_logits(patched: PatchedModel, draw: Tensor) -> Tensor:
    """Return logits [4 or 8, V] at the nodes of a tree behind a prefix, and of a second one behind
    ``_ACCEPTED`` of the first.

    Args:
        draw: [1, prefix and both trees' tokens].
    """
    prefix, first, second = draw.split([_PREFIX, len(_PARENTS), len(_PARENTS)], 1)
    cache = patched.make_cache(draw.shape[1])
    # A state has to be taken up again, too.
    for part in prefix.split(_PREFIX - 2 if patched.keeps_states else _PREFIX, 1):
        positions = torch.arange(cache.length, cache.length + part.shape[1], device=draw.device)
        state = Pass(cache, [(cache, cache.lens)], part.shape[1])
        patched.read(part, positions[None], state)
        _check_calls(patched, state)
        cache.advance(part.shape[1])
    logits = [_forward(patched, cache, _small_tree(first))]
    if patched.keeps_states:
        accepted = torch.tensor([_ACCEPTED], dtype=torch.int32, device=draw.device)
        cache.compact(accepted, torch.tensor([len(_ACCEPTED) - 1], dtype=torch.int32).to(accepted))
        cache.advance(len(_ACCEPTED))
        cache.follow(_ACCEPTED)
        logits.append(_forward(patched, cache, _small_tree(second)))
    return torch.cat(logits)


def _forward(patched: PatchedModel, cache: KVCache, tree: Tree) -> Tensor:
    state = Pass(
        cache,
        [(cache, cache.lens)],
        tree.num_nodes,
        mask=tree.mask,
        q_depths=tree.depths,
        k_depths=tree.depths,
        paths=paths(tree.parents) if patched.keeps_states else None,
    )
    return patched.forward(tree.tokens, cache.length + tree.depths.long(), state)[0]


def _path_logits(patched: PatchedModel, draw: Tensor, count: int) -> Tensor:
    """Return the same logits by the model's own forwards over whole paths."""
    prefix, first, second = draw.split([_PREFIX, len(_PARENTS), len(_PARENTS)], 1)
    before, found = prefix, []
    for nodes in (first, second)[: count // len(_PARENTS)]:
        own = {}
        for path in ((0, 1, 3), (0, 2)):
            logits = _own_logits(patched, torch.cat([before, nodes[:, list(path)]], 1))
            own.update({node: logits[before.shape[1] + i] for i, node in enumerate(path)})
        found += [own[node] for node in range(len(_PARENTS))]
        before = torch.cat([before, nodes[:, list(_ACCEPTED)]], 1)
    return torch.stack(found)


def _check_calls(patched: PatchedModel, state: Pass) -> None:
    """Refuse a model that attends in its own way.

    Layers that keep nothing may attend, to what others keep.
    """
    wanted = [i for i, kind in enumerate(patched.kinds) if kind.rows]
    if sorted(state.calls) != wanted:
        raise _refuse(
            patched.model,
            f"it asked for attention {len(state.calls)} times in a forward of "
            f"{patched.num_layers} layers, {len(wanted)} of which keep keys and values; every one "
            "of these must go through transformers' AttentionInterface once",
        )
    states = {i for i, kind in enumerate(patched.kinds) if kind.states}
    if states != {keeper.module.layer_idx for keeper in state.keepers}:
        raise _refuse(patched.model, "it has layers whose states do not go through its cache")


@torch.inference_mode()
def _own_logits(patched: PatchedModel, tokens: Tensor) -> Tensor:
    """Return logits [M, V] of the model as it came, without a cache."""
    with evaluating(patched.model):
        return patched.model(input_ids=tokens, use_cache=False).logits[0]
