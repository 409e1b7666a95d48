"""Guards the start: wrong logits would be silent, so a model is tried before it is used."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import ops  # noqa: F401  registers what a pass calls
from .attention import PatchedModel, check_autocast, evaluating
from .cache import KVCache, Pass
from .longrope import drops_cache, edges, longrope_edge
from .tree import Tree
from .windows import cache_windows

_PREFIX = 5


class UnsupportedModelError(ValueError):
    """Says why specextend would not reproduce a model exactly."""


def _refuse(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(model).__name__} is not supported: {why}")


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse what a short trial cannot show.

    Raises:
        UnsupportedModelError: layers that are not causal attention over keys and values.
    """
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise _refuse(model, "it is an encoder-decoder; a decoder-only causal LM is wanted")
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise _refuse(model, "it has no language-modelling head; load it with AutoModelForCausalLM")
    known = {"full_attention", "sliding_attention"}
    other = sorted(set(getattr(config, "layer_types", None) or ()) - known)
    if other:
        raise _refuse(model, f"it has layers of type {other[0]!r}; known are {sorted(known)}")
    if getattr(config, "attention_chunk_size", None):
        raise _refuse(model, "its attention is chunked, which only its own masks express")
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
    """Compare a four-node tree on our cache and kernel with the model's own attention.

    Counts the attention calls, one per layer. A few forwards over nine tokens.

    Raises:
        UnsupportedModelError: with what differed.
    """
    model = patched.model
    check_architecture(model)
    check_autocast(patched.device)
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(0, config.vocab_size, (1, _PREFIX + 4), generator=generator)
    prefix, nodes = draw.to(patched.device).split([_PREFIX, 4], 1)
    # 0 is the root; 1 and 2 are its children, 3 is a child of 1.
    parents, depths = (-1, 0, 0, 1), (0, 1, 1, 2)
    masks = (0b0001, 0b0011, 0b0101, 0b1011)
    to = dict(device=patched.device)
    tree = Tree(
        nodes,
        torch.tensor([parents], dtype=torch.int32, **to),
        torch.tensor([depths], dtype=torch.int32, **to),
        torch.tensor([masks], **to)[..., None],
        None,
        2,
    )
    try:
        _check_windows(model, patched.find_windows())
        patched.find_fusions()
        ours = _tree_logits(patched, prefix, tree, config.num_hidden_layers)
        paths = [(0, 1, 3), (0, 2)]
        own = {}
        for path in paths:
            logits = _own_logits(patched, torch.cat([prefix, nodes[:, list(path)]], 1))
            own.update({node: logits[_PREFIX + i] for i, node in enumerate(path)})
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise _refuse(model, f"a trial forward failed: {error}") from error
    reference = torch.stack([own[i] for i in range(4)]).double()
    if not torch.isfinite(reference).any():
        return  # a model of NaNs is found out when it is used
    error = (ours.double() - reference).norm() / reference.norm().clamp_min(1e-30)
    low_precision = torch.finfo(ours.dtype).bits < 32
    if not error <= (0.05 if low_precision else 1e-4):
        found = f"logits of a small tree differ from the model's own by {float(error):.1e}"
        own = _own_noise(patched, torch.cat([prefix, nodes], 1))
        why = (
            "its attention is probably expressed in a way that specextend does not see, or not "
            'honoured by the implementation it was loaded with (try attn_implementation="eager")'
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


def _check_windows(model: PreTrainedModel, windows: dict[int, int]) -> None:
    """Refuse a model whose cache forgets what its masks show, or keeps what they hide.

    Args:
        windows: keys that each layer sees; 0: all.
    """
    for layer, kept in cache_windows(model).items():
        if kept == 1:
            raise _refuse(model, "its sliding_window is 1, with which generate's cache keeps all")
        shown = windows.get(layer, kept)  # a layer that has not asked is refused for that
        if shown == 0 or shown > kept:
            raise _refuse(
                model,
                f"its layer {layer} sees {shown or 'all'} tokens, but generate keeps the last "
                f"{kept} of them in its cache (sliding_window), so that a text depends on the "
                "forwards it was read in; set sliding_window=None if all are to be seen",
            )


@torch.inference_mode()
def _tree_logits(patched: PatchedModel, prefix: Tensor, tree: Tree, num_layers: int) -> Tensor:
    device = prefix.device
    cache = KVCache(num_layers, _PREFIX + 4, 1, device)
    positions = torch.arange(_PREFIX, device=device)[None]
    state = Pass(cache, [(cache, cache.lens)], _PREFIX)
    patched.read(prefix, positions, state)
    _check_calls(patched.model, state, num_layers)
    cache.advance(_PREFIX)
    state = Pass(
        cache, [(cache, cache.lens)], 4, mask=tree.mask, q_depths=tree.depths, k_depths=tree.depths
    )
    return patched.forward(tree.tokens, _PREFIX + tree.depths.long(), state)[0]


def _check_calls(model: PreTrainedModel, state: Pass, num_layers: int) -> None:
    if sorted(state.calls) != list(range(num_layers)):
        raise _refuse(
            model,
            f"it asked for attention {len(state.calls)} times in a forward of {num_layers} layers; "
            "every layer must go through transformers' AttentionInterface once",
        )


@torch.inference_mode()
def _own_logits(patched: PatchedModel, tokens: Tensor) -> Tensor:
    """Return logits [M, V] of the model as it came, without a cache."""
    with evaluating(patched.model):
        return patched.model(input_ids=tokens, use_cache=False).logits[0]
