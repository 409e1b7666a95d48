"""Reads and writes LongSpec blocks, in the two layouts of the code that made the published ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..attention import device_of
from .checkpoint import Checkpoint, rope_of
from .longspec_block import BlockShape, LongSpecBlock

_PREFIX = "draft_model."
_DEAD = {f"cross_attn.{p}_proj.{w}" for p in "kv" for w in ("weight", "bias")}
_SINGLE = {
    "input_layernorm.weight": "self_norm.weight",
    "self_attn.o_proj.weight": "self_out.weight",
    "post_self_attention_layernorm.weight": "cross_norm.weight",
    "cross_attn.q_proj.weight": "cross_q.weight",
    "cross_attn.q_proj.bias": "cross_q.bias",
    "cross_attn.o_proj.weight": "cross_out.weight",
    "post_cross_attention_layernorm.weight": "mlp_norm.weight",
    "mlp.down_proj.weight": "down.weight",
}
_FUSED = {
    "self_qkv.weight": [f"self_attn.{p}_proj.weight" for p in "qkv"],
    "self_qkv.bias": [f"self_attn.{p}_proj.bias" for p in "qkv"],
    "gate_up.weight": [f"mlp.{p}_proj.weight" for p in ("gate", "up")],
}


def published_shapes(shape: BlockShape) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the 20 tensors of a published checkpoint."""
    h, i = shape.hidden, shape.intermediate
    rows = {
        "q": shape.heads * shape.head_dim,
        "k": shape.kv_heads * shape.head_dim,
        "v": shape.kv_heads * shape.head_dim,
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for attention in ("self_attn", "cross_attn"):
        for p, n in rows.items():
            shapes[f"{attention}.{p}_proj.weight"] = (n, h)
            shapes[f"{attention}.{p}_proj.bias"] = (n,)
        shapes[f"{attention}.o_proj.weight"] = (h, rows["q"])
    for norm in ("input", "post_self_attention", "post_cross_attention"):
        shapes[f"{norm}_layernorm.weight"] = (h,)
    shapes["mlp.gate_proj.weight"] = shapes["mlp.up_proj.weight"] = (i, h)
    shapes["mlp.down_proj.weight"] = (h, i)
    return shapes


def is_block(checkpoint: Checkpoint) -> bool:
    """Return whether it is LongSpec's: no other kind has these names."""
    names = {name.removeprefix(_PREFIX) for name in checkpoint.files}
    return "post_cross_attention_layernorm.weight" in names


def load_block(checkpoint: Checkpoint | str | Path, model: PreTrainedModel) -> LongSpecBlock:
    """Load a LongSpec checkpoint for ``model``, in its dtype, on its device.

    Two layouts, of longspec's test/ and train/ folders: a folder with ``config.json`` and weights;
    or a ``.pth`` file of tensors, whose names may begin with ``draft_model.``. The projections to
    keys and values of the cross-attention, which nothing uses, are dropped.

    Raises:
        ValueError: it is not for this target, or tensors are missing, unknown or of another shape.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.open(checkpoint)
    config, path = checkpoint.config, checkpoint.name
    shape = BlockShape.of_target(model)
    if config:
        _check_config(path, config, model)
        shape = replace(
            shape,
            intermediate=config.get("intermediate_size", shape.intermediate),
            activation=config.get("hidden_act", shape.activation),
            eps=config.get("rms_norm_eps", shape.eps),
        )
    state = {name.removeprefix(_PREFIX): t for name, t in checkpoint.tensors().items()}
    down = state.get("mlp.down_proj.weight")
    if not config and down is not None and down.dim() == 2:  # nothing else says it
        shape = replace(shape, intermediate=down.shape[1])
    wanted = {n: s for n, s in published_shapes(shape).items() if n not in _DEAD}
    missing = sorted(set(wanted) - set(state))
    unknown = sorted(set(state) - set(wanted) - _DEAD)
    if missing or unknown:
        what = f"has no {missing[0]}" if missing else f"has {unknown[0]}, which is unknown"
        raise ValueError(f"{path!r} is not a LongSpec checkpoint: it {what}")
    for name, size in wanted.items():
        if tuple(state[name].shape) != size:
            raise ValueError(
                f"{path!r} does not fit {type(model).__name__}: {name} must be {list(size)}, got "
                f"{list(state[name].shape)}"
            )
    with torch.device("meta"):
        block = LongSpecBlock(shape)
    ours = {own: state[name] for name, own in _SINGLE.items()}
    ours |= {own: torch.cat([state[n] for n in names]) for own, names in _FUSED.items()}
    ours = {name: t.to(device_of(model), model.dtype) for name, t in ours.items()}
    block.load_state_dict(ours, assign=True)
    return block.requires_grad_(False)


def save_block(
    block: LongSpecBlock,
    model: PreTrainedModel,
    path: str | Path,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a checkpoint as :func:`load_block` and the reference code read it.

    All 20 tensors are written, zeros for those that nothing uses: other loaders ask for them.

    Args:
        block: the weights.
        model: its target.
        path: a folder, or a file with the suffix ``.pth`` for the layout of the training code.
        dtype: of the file.
    """
    path, own = Path(path), block.state_dict()
    shapes = published_shapes(block.shape)
    state = {name: torch.zeros(shapes[name]) for name in _DEAD}
    state |= {name: own[key] for name, key in _SINGLE.items()}
    for key, names in _FUSED.items():
        parts = own[key].split([shapes[name][0] for name in names])
        state |= dict(zip(names, parts, strict=True))
    state = {name: state[name].to("cpu", dtype).contiguous() for name in shapes}
    if path.suffix == ".pth":
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
        return
    path.mkdir(parents=True, exist_ok=True)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    s, config = block.shape, model.config.get_text_config()
    qwen = config.model_type == "qwen2"
    rope = rope_of(config.to_dict())
    written = {
        "architectures": ["Qwen2GlideDecoderLayer" if qwen else "LlamaGlideDecoderLayer"],
        "model_type": "qwen2" if qwen else "llama",
        "hidden_size": s.hidden,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "intermediate_size": s.intermediate,
        "hidden_act": s.activation,
        "rms_norm_eps": s.eps,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_hidden_layers,
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
        "rope_theta": float(rope.pop("rope_theta")),
        "rope_scaling": rope if rope["rope_type"] != "default" else None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (path / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _check_config(path: str, config: dict, model: PreTrainedModel) -> None:
    """Refuse a checkpoint that says it is for another target."""
    target = model.config.get_text_config()
    ours = BlockShape.of_target(model)
    wanted = {
        "hidden_size": ours.hidden,
        "num_attention_heads": ours.heads,
        "num_key_value_heads": ours.kv_heads,
        "vocab_size": target.vocab_size,
    }
    got = {**config, "num_key_value_heads": config.get("num_key_value_heads", ours.heads)}
    wrong = [(n, w, got.get(n)) for n, w in wanted.items() if got.get(n) != w]
    theirs, own = rope_of(config), rope_of(target.to_dict())
    wrong += [
        (n, own.get(n), theirs.get(n))
        for n in ("rope_type", "rope_theta", "factor")
        if theirs.get(n) != own.get(n)
    ]
    if wrong:
        name, want, have = wrong[0]
        raise ValueError(
            f"{path!r} is for another target than this {type(model).__name__}: {name} must be "
            f"{want}, got {have}"
        )
