"""Reads the files of EAGLE heads in every dialect, and writes the official one."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .. import ops
from ..attention import device_of
from .checkpoint import Checkpoint, rope_of
from .eagle_head import EagleHead, HeadConfig

# The producers' names (official, SpecForge, vLLM, speculators) become those of our modules.
_RENAMED = (
    (r"^ea_layer\.", ""),
    (r"^model\.", ""),
    (r"^midlayer\.", "layers.0."),
    (r"^transformer\.", "layers.0."),
    (r"^fusion_fc\.", "fc."),
    (r"^embedding_layernorm\.", "embed_norm."),
    (r"^pre_lm_head_layernorm\.", "norm."),
    (r"^aux_norm_low\.", "fc_norm.0."),
    (r"^aux_norm_mid\.", "fc_norm.1."),
    (r"^aux_norm_high\.", "fc_norm.2."),
)
# Files may hold these: they are computed here, or are of use in training only.
_IGNORED = re.compile(r"(^|\.)t2d$|rotary_emb\.inv_freq$|^verifier_")


def head_version(checkpoint: Checkpoint) -> int | None:
    """Return 1 or 3 for what may be an EAGLE head, None for anything else."""
    said = checkpoint.config
    names = {name.removeprefix("ea_layer.") for name in checkpoint.files}
    kinds = [str(said.get("speculators_model_type", "")), *(said.get("architectures") or ())]
    kinds = [kind.lower() for kind in kinds]
    fields = ("draft_vocab_size", "eagle_aux_hidden_state_layer_ids", "eagle_config")
    marks = (r"^(model\.)?midlayer\.", r"hidden_norm\.weight$", r"(^|\.)d2t$", r"^aux_norm_")
    if (
        any("eagle3" in kind for kind in kinds)
        or any(field in said for field in fields)
        or any(re.search(mark, name) for mark in marks for name in names)
    ):
        return 3
    fused = any(re.search(r"^(model\.)?(fc|fusion_fc)\.weight$", name) for name in names)
    return 1 if fused or any("eagle" in kind for kind in kinds) else None


def load_head(checkpoint: Checkpoint, target: PreTrainedModel) -> EagleHead:
    """Read a head in any dialect, in the target's dtype and on its device.

    Raises:
        ValueError: tensors are missing, unknown or of another shape, or the head does not fit the
            target.
    """
    try:
        return _load(checkpoint, target)
    except ValueError as error:
        raise ValueError(f"EAGLE head {checkpoint.name!r}: {error}") from error


def _load(checkpoint: Checkpoint, target: PreTrainedModel) -> EagleHead:
    tensors: dict[str, Tensor] = {}
    said_names: dict[str, str] = {}
    for said, tensor in checkpoint.tensors().items():
        if _IGNORED.search(said):
            continue
        name = said
        for pattern, new in _RENAMED:
            name = re.sub(pattern, new, name)
        if name in tensors:
            raise ValueError(f"{said_names[name]} and {said} are the same tensor")
        tensors[name], said_names[name] = tensor, said
    version = head_version(checkpoint)
    config = read_config(checkpoint.config, target.config.get_text_config(), version)
    _check_attention(config)
    doubted, norm = _doubted_norm_output(checkpoint.config), tensors.get("norm.weight")
    if doubted is False and norm is not None and bool((norm == 1).all()):
        config = replace(config, norm_logits=False)  # a norm that nothing went through in training
    with torch.device("meta"):
        head = EagleHead(config, target, frozenset(tensors))
    expected = head.state_dict()
    required = set(expected)
    if checkpoint.config.get("bias") is True and config.version == 1:
        required.add("fc.bias")
    problems = []
    if missing := sorted(required - set(tensors)):
        problems.append(f"missing {', '.join(missing)}")
    if unknown := sorted(said_names[name] for name in set(tensors) - set(expected)):
        problems.append(f"unknown {', '.join(unknown)}")
    problems += [
        f"{said_names[name]} is {list(tensors[name].shape)}, expected {list(wanted.shape)}"
        for name, wanted in expected.items()
        if name in tensors and tensors[name].shape != wanted.shape
    ]
    problems += [
        f"{said_names[name]} is {tensors[name].dtype}, floating point is expected"
        for name, wanted in expected.items()
        if name in tensors and wanted.is_floating_point() > tensors[name].is_floating_point()
    ]
    if problems:
        raise ValueError("; ".join(problems))
    device = device_of(target)
    tensors = {
        name: tensor.to(device, target.dtype if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }
    if "d2t" in tensors:
        _check_d2t(tensors["d2t"], config.vocab_size)
    head.load_state_dict(tensors, assign=True)
    try:
        head.rope(device)
    except Exception as error:  # many types, as fields are missing or of another type
        raise ValueError(f"its rotary embedding {config.rope} is not known: {error!r}") from error
    if doubted:
        warnings.warn(
            f"specextend: norm_output of the EAGLE head {checkpoint.name!r} is read as vLLM and "
            "SGLang do: the normed output goes back in. If SpecForge trained it before its pull "
            "request 879, this is not so: set norm_output to false in its config.json",
            RuntimeWarning,
            stacklevel=6,
        )
    return head.eval().requires_grad_(False)


def _doubted_norm_output(said: dict) -> bool | None:
    """Return ``norm_output`` where SpecForge may have trained the head, None elsewhere.

    For two months of 2026, up to its pull request 879, it took it (true by default) for what the
    logits are made of, while the output went back in as it was. Since then it means what it does
    elsewhere: that the normed output goes back in.
    """
    its_own = said.get("architectures") == ["LlamaForCausalLMEagle3"]
    told = "return_hidden_post_norm" in (said.get("eagle_config") or {})
    return said.get("norm_output") if its_own and not told else None


def _check_attention(config: HeadConfig) -> None:
    """Refuse heads whose sizes no kernel takes, which an attention of one row tells, or whose keys
    would have to be turned anew as the context grows."""
    q, kv = (torch.zeros(1, 1, n, config.head_dim) for n in (config.num_heads, config.num_kv_heads))
    try:
        ops.tree_attention(q, kv, kv, torch.zeros(1, dtype=torch.int32), num_tree_keys=1)
    except RuntimeError as error:
        raise ValueError(f"its attention cannot be computed: {error}") from error
    kind = config.rope["rope_type"]
    if kind in ("dynamic", "longrope"):
        raise ValueError(
            f"its {kind!r} rotary embedding changes with the length of the context, so that keys "
            "of its cache would not agree with those that come later"
        )


def _check_d2t(d2t: Tensor, vocab: int) -> None:
    ids = torch.arange(d2t.shape[0], device=d2t.device) + d2t
    if bool((ids < 0).any() or (ids >= vocab).any()) or ids.unique().numel() < ids.numel():
        raise ValueError(
            "d2t, the offset of the target's id to the draft's, must lead to different ids in "
            f"[0, {vocab}); it leads from {int(ids.min())} to {int(ids.max())}, "
            f"{ids.unique().numel()} different ones of {ids.numel()}"
        )


def read_config(said: dict, target: PretrainedConfig, version: int) -> HeadConfig:
    """Read what a head is from the contents of its config.json, in any dialect.

    Raises:
        ValueError: a field is missing, or the target is another one than the head was made for.
    """
    layer = said.get("transformer_layer_config", {})
    said = {**layer, **{name: value for name, value in said.items() if value is not None}}
    wanted = ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    missing = [name for name in wanted if said.get(name) is None]
    if missing:
        raise ValueError(f"config.json has no {', '.join(missing)}")
    if said["vocab_size"] != target.vocab_size:
        raise ValueError(
            f"it was made for a vocabulary of {said['vocab_size']}, the target has "
            f"{target.vocab_size}"
        )
    hidden, heads = said["hidden_size"], said["num_attention_heads"]
    target_hidden = said.get("target_hidden_size") or hidden
    if target_hidden != target.hidden_size:
        raise ValueError(
            f"it was made for a target of hidden_size {target_hidden}, this one has "
            f"{target.hidden_size}"
        )
    layers = said.get("num_hidden_layers") or 1
    return HeadConfig(
        version=version,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=said.get("num_key_value_heads") or heads,
        head_dim=said.get("head_dim") or hidden // heads,
        intermediate_size=said["intermediate_size"],
        vocab_size=target.vocab_size,
        target_hidden_size=target_hidden,
        draft_vocab_size=said.get("draft_vocab_size") or target.vocab_size,
        feature_layers=_feature_layers(said, target.num_hidden_layers, version),
        rope=rope_of(said),
        windows=_windows(said, layers),
        max_position_embeddings=said.get("max_position_embeddings") or 2048,
        hidden_act=said.get("hidden_act") or "silu",
        rms_norm_eps=said.get("rms_norm_eps") or 1e-6,
        norm_before_residual=bool(said.get("norm_before_residual")),
        norm_output=any(
            where.get(name)
            for where in (said, said.get("eagle_config") or {})
            for name in ("norm_output", "return_hidden_post_norm")
        ),
        tied=bool(said.get("tie_word_embeddings")),
    )


def _feature_layers(said: dict, depth: int, version: int) -> tuple[int, ...]:
    nested = said.get("eagle_config") or {}
    if version == 1 or not nested.get("use_aux_hidden_state", True):
        return (depth,)
    # vLLM and speculators count a layer's input, SGLang, SpecForge and ModelOpt its output.
    ids = said.get("eagle_aux_hidden_state_layer_ids")
    if ids is None:
        ids = [i + 1 for i in nested.get("eagle_aux_hidden_state_layer_ids") or ()]
    ids = tuple(ids) or (2, depth // 2, depth - 3)
    wrong = [i for i in ids if not 0 <= i <= depth]
    if wrong:
        raise ValueError(
            f"it reads the target's hidden states {ids}, but a target of {depth} layers has "
            f"none of index {wrong[0]}"
        )
    return ids


def _windows(said: dict, layers: int) -> tuple[int, ...]:
    window = said.get("sliding_window") or 0
    kinds = said.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if said.get("use_sliding_window") else "full_attention"]
        kinds = kinds * layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds[:layers])


def save_head(head: EagleHead, folder: str | Path) -> None:
    """Write config.json and model.safetensors as the official EAGLE-3 heads have them."""
    config, folder = head.config, Path(folder)
    if config.version != 3:
        raise ValueError(f"EAGLE-3 heads are written, not version {config.version}")
    if not config.norm_logits:
        raise ValueError("heads are written whose logits are made of the normed output")
    said = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size if head.lm_head is not None else None,
        "target_hidden_size": config.target_hidden_size,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": config.rope,
        "rope_theta": config.rope["rope_theta"],
        "sliding_window": max(config.windows) or None,
        "layer_types": ["sliding_attention" if w else "full_attention" for w in config.windows],
        "norm_before_residual": config.norm_before_residual,
        "norm_output": config.norm_output,
        "fc_norm": head.fc_norm is not None,
        # These ids count a layer's output.
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [i - 1 for i in config.feature_layers],
            "return_hidden_post_norm": config.norm_output,  # there is one meaning of this name
        },
    }
    tensors = {
        re.sub(r"^layers\.0\.", "midlayer.", name): tensor.detach().cpu().contiguous()
        for name, tensor in head.state_dict().items()
    }
    if head.d2t is not None:
        tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool)
        tensors["t2d"][head.vocabulary.cpu()] = True
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(said, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
