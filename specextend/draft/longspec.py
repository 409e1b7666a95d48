"""LongSpec's draft: one decoder block that reads the target's last-layer keys and values.

The block (arXiv 2502.17421, section 3.1) takes the target's token embeddings alone. Its own
self-attention sees a window, so its cache has a fixed size; what lies further back it reads by
cross-attention from the target's cache, where it lies. Embedding and head are the target's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from .. import ops
from ..config import SpecConfig
from ..rotary import probe_rotary
from ..target import Target
from ..tree import Tree, grow_tree
from .base import Draft, Source, Tokenizers
from .checkpoint import Checkpoint

WINDOW = 513  # keys that a token sees, itself included: flash attention's (512, 0)
_NEVER = -(1 << 30)  # position of a slot that holds nothing: before every window

# [B, M, Hq, D] queries -> attention output of the same shape.
CrossAttention = Callable[[Tensor], Tensor]
# The same, with the rows' own keys and values [B, M, Hkv, D].
SelfAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a block. All but ``intermediate`` and ``activation`` are the target's."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    activation: str = "silu"
    eps: float = 1e-6

    @staticmethod
    def of_target(model: PreTrainedModel) -> BlockShape:
        """What a new block for ``model`` has."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        eps = [getattr(config, name, None) for name in ("rms_norm_eps", "layer_norm_eps")]
        return BlockShape(
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            activation=getattr(config, "hidden_act", None) or "silu",
            eps=next((e for e in eps if e), 1e-6),
        )


class Rotation:
    """The target's rotary embedding, for queries and keys of any positions.

    Args:
        model: the target. Its last layer's frequencies count: its keys are read.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        kind = rope.get("rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise ValueError(
                f"LongSpec reads the target's keys at any distance, but {kind!r} rotary embeddings "
                f"of {type(model).__name__} change with the length of the context"
            )
        try:
            rotary = probe_rotary(model)
        except ValueError as error:
            raise ValueError(
                "LongSpec needs a target whose keys carry rotary positions, in every layer; those "
                f"of {type(model).__name__} do not, or not in a known way"
            ) from error
        self.inv_freq, self.interleaved = rotary.inv_freq[-1], rotary.interleaved
        scales = [getattr(m, "attention_scaling", None) for m in model.modules()]
        self.scale = next((s for s in scales if isinstance(s, float)), 1.0)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, M, 1, R / 2] fp32 of ``positions`` [B, M]."""
        angle = positions[..., None, None].float() * self.inv_freq
        return angle.cos() * self.scale, angle.sin() * self.scale

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """[B, M, H, D] turned; in the dtype of ``x``."""
        cos, sin = angles
        r = 2 * cos.shape[-1]
        turned = x[..., :r]
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([turned.to(x.dtype), x[..., r:]], -1)


class LongSpecBlock(nn.Module):
    """The weights, and the block's formula for whatever attention it is given.

        x += SelfAttn(norm(x));  x += CrossAttn(norm(x));  x += MLP(norm(x))

    There is no norm behind it: its output goes to the target's head as it is. Query, key and value
    projections are one matrix, as are the gate's and the input's of the MLP.
    """

    def __init__(self, shape: BlockShape):
        super().__init__()
        self.shape = s = shape
        rows, kv_rows = s.heads * s.head_dim, s.kv_heads * s.head_dim
        self.self_norm = nn.RMSNorm(s.hidden, s.eps)
        self.self_qkv = nn.Linear(s.hidden, rows + 2 * kv_rows)
        self.self_out = nn.Linear(rows, s.hidden, bias=False)
        self.cross_norm = nn.RMSNorm(s.hidden, s.eps)
        self.cross_q = nn.Linear(s.hidden, rows)
        self.cross_out = nn.Linear(rows, s.hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(s.hidden, s.eps)
        self.gate_up = nn.Linear(s.hidden, 2 * s.intermediate, bias=False)
        self.down = nn.Linear(s.intermediate, s.hidden, bias=False)
        self.activation = ACT2FN[s.activation]

    def self_projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, M, Hq, D], key and value [B, M, Hkv, D] of embeddings [B, M, h], not turned."""
        s = self.shape
        qkv = self.self_qkv(self.self_norm(x)).unflatten(-1, (-1, s.head_dim))
        return qkv.split([s.heads, s.kv_heads, s.kv_heads], -2)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value alone: all that a token leaves behind which is not the root."""
        s, first = self.shape, self.shape.heads * self.shape.head_dim
        kv = F.linear(self.self_norm(x), self.self_qkv.weight[first:], self.self_qkv.bias[first:])
        return kv.unflatten(-1, (-1, s.head_dim)).split(s.kv_heads, -2)

    def forward(
        self, x: Tensor, self_attention: SelfAttention, cross_attention: CrossAttention
    ) -> Tensor:
        """[B, M, h] embeddings to [B, M, h] what the target's head reads."""
        x = x + self.self_out(self_attention(*self.self_projections(x)).flatten(2))
        q = self.cross_q(self.cross_norm(x)).unflatten(-1, (-1, self.shape.head_dim))
        x = x + self.cross_out(cross_attention(q).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(self.activation(gate) * up)


class RingCache:
    """The block's own keys and values: a ring of ``window`` slots behind rows for a tree.

    A token's slot is its position modulo ``window``; nothing is ever moved, and the size does not
    depend on the context. Attention takes all rows as tree keys, whose positions are data: to a
    softmax the order of keys does not matter, and the sliding window, measured in positions, hides
    what a row may not see any more as well as slots that are still empty.

    Args:
        shape: of the block.
        window: keys that a token sees, itself included.
        tree_keys: rows for a tree; rounded up to whole words of a mask.
        dtype, device: of keys and values.
    """

    def __init__(self, shape: BlockShape, window: int, tree_keys: int, dtype: torch.dtype, device):
        self.window, self.tree_words = window, -(-tree_keys // 64)
        self._first = 64 * self.tree_words  # the ring's first row
        rows = self._first + window
        size = (1, shape.kv_heads, rows, shape.head_dim)
        self.k = torch.zeros(size, dtype=dtype, device=device).transpose(1, 2)
        self.v = torch.zeros(size, dtype=dtype, device=device).transpose(1, 2)
        to = dict(dtype=torch.int32, device=device)
        self._positions = torch.full((1, rows), _NEVER, **to)
        self._no_prefix = torch.zeros(1, **to)
        self._all = torch.full((1, 1, -(-window // 64)), -1, dtype=torch.int64, device=device)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return 2 * self.k.numel() * self.k.element_size()

    def slots(self, positions: Tensor) -> Tensor:
        """Rows [M] of the decided tokens at ``positions`` [1, M]."""
        return self._first + positions[0] % self.window

    def write(self, slots: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Put keys and values [1, M, Hkv, D] of ``positions`` [1, M] into the rows ``slots`` [M],
        all different."""
        self.k[:, slots], self.v[:, slots] = k, v
        self._positions[:, slots] = positions.int()

    def attend(self, q: Tensor, positions: Tensor, tree: Tensor) -> Tensor:
        """Attention of ``q`` [1, M, Hq, D] to the window and to what ``tree`` shows of the tree.

        Args:
            positions: [1, M] int64.
            tree: [1, M, words] int64, packed mask of tree rows; words beyond it are empty.
        """
        tree = F.pad(tree, (0, self.tree_words - tree.shape[-1]))
        return ops.tree_attention(
            q,
            self.k,
            self.v,
            self._no_prefix,
            torch.cat([tree, self._all.expand(-1, q.shape[1], -1)], -1),
            num_tree_keys=self.k.shape[1],
            window=self.window,
            q_depths=positions.int(),
            k_depths=self._positions,
        )[0]


class LongSpecDraft(Draft):
    """A LongSpec block as a draft.

    A token's key and value depend on its embedding alone. So of all tokens but the root these are
    all that is computed, and of a prompt only for its last ``window`` tokens. Cross-attention reads
    the target's cache in place: every row sees the committed tokens, which end before the root.

    Args:
        block: the weights, in the target's dtype and on its device.
        model: the target.
        config: the shape of the tree.
        window: keys that self-attention sees, the token itself included.
    """

    kind = "longspec"
    cache_kinds = ("full",)  # a cache of its own kind

    def __init__(
        self,
        block: LongSpecBlock,
        model: PreTrainedModel,
        config: SpecConfig,
        window: int = WINDOW,
    ):
        self.block, self.config, self.window = block, config, window
        self._model = model
        self.rotation = Rotation(model)
        self.embedding, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.device = model.device
        self._vocab = model.config.get_text_config().vocab_size
        fixed = config.tree_shape == "fixed"
        self._widths = config.tree_widths if fixed else (config.tree_width,) * config.tree_depth

    @classmethod
    def recognises(cls, source: Source) -> bool:
        """Tell whether it is LongSpec's: no other kind has these names."""
        files = source.files if isinstance(source, Checkpoint) else ()
        names = {name.removeprefix(_PREFIX) for name in files}
        return "post_cross_attention_layernorm.weight" in names

    @classmethod
    def load(
        cls, source: Source, target: Target, config: SpecConfig, tokenizers: Tokenizers
    ) -> LongSpecDraft:
        return cls(load_block(source, target.model), target.model, config)

    def with_config(self, config: SpecConfig) -> LongSpecDraft:
        return LongSpecDraft(self.block, self._model, config, self.window)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.block.parameters())

    def begin(self, prompt, max_length, cache, graphs) -> None:
        self._target = cache
        # The last level is proposed, but never run.
        self.ring = RingCache(
            self.block.shape,
            self.window,
            sum(self._widths[:-1]),
            self.block.self_qkv.weight.dtype,
            self.device,
        )
        self._taken = 0  # tokens so far
        self._pending = torch.zeros(1, 0, dtype=torch.int64, device=self.device)

    def end(self) -> None:
        self._target = self.ring = self._pending = None

    def prefill(self, decided) -> None:
        self._take(decided.tokens)

    def _take(self, tokens: Tensor) -> None:
        """Remember tokens; those that no later token will see are forgotten at once."""
        self._pending = torch.cat([self._pending, tokens], 1)[:, -self.window :]
        self._taken += tokens.shape[1]

    def propose(self, decided, depth) -> Tree:
        self._take(decided.tokens)
        new, self._pending = self._pending, self._pending[:, :0]
        positions = torch.arange(self._taken - new.shape[1], self._taken, device=self.device)[None]
        slots = self.ring.slots(positions)
        if new.shape[1] > 1:
            k, v = self.block.keys_values(self.embedding(new[:, :-1]))
            k = self.rotation(k, self.rotation.angles(positions[:, :-1]))
            self.ring.write(slots[:-1], positions[:, :-1], k, v)
        root = new[:, -1:]
        logits = self.logits(root, positions[:, -1:], slots[-1:], root.new_zeros(1, 1, 0))
        return grow_tree(root, logits, self.step, self.config, min(depth, len(self._widths)))

    def step(
        self, tokens: Tensor, level: int, mask: Tensor, num_keys: int, parents: Tensor
    ) -> Tensor:
        positions = torch.full_like(tokens, self._taken + level)
        slots = torch.arange(num_keys - tokens.shape[1], num_keys, device=self.device)
        return self.logits(tokens, positions, slots, mask)

    def logits(self, tokens: Tensor, positions: Tensor, slots: Tensor, tree: Tensor) -> Tensor:
        """Return logits [1, M, V] of ``tokens`` [1, M], whose keys go to the rows ``slots`` [M];
        ``tree`` is the mask of the tree rows that each sees."""
        angles = self.rotation.angles(positions)

        def self_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.ring.write(slots, positions, self.rotation(k, angles), v)
            return self.ring.attend(self.rotation(q, angles), positions, tree)

        def cross_attention(q: Tensor) -> Tensor:
            last, lens = self._target.layers[-1], self._target.lens
            q = self.rotation(q, angles)
            return ops.tree_attention(q, last.k, last.v, lens, num_tree_keys=0)[0]

        hidden = self.block(self.embedding(tokens), self_attention, cross_attention)
        return self.head(hidden)[..., : self._vocab]


# ---- checkpoints ---------------------------------------------------------------------------------

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
    """Name and shape of the 20 tensors of a published checkpoint."""
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
    ours = {name: t.to(model.device, model.dtype) for name, t in ours.items()}
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
    rope = _rope(config.to_dict())
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
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": rope if rope["rope_type"] != "default" else None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (path / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _rope(config: dict) -> dict:
    """Type, base and options of a rotary embedding, as older and newer configurations say it."""
    found = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    found["rope_type"] = found.pop("type", None) or found.get("rope_type") or "default"
    theta = found.get("rope_theta") or config.get("rope_theta") or 10000.0
    return {**found, "rope_theta": float(theta)}


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
    theirs, own = _rope(config), _rope(target.to_dict())
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
