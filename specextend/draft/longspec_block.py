"""Defines LongSpec's block: sizes, rotation, formula (arXiv 2502.17421, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ..rotary import probe_rotary, turn

# Cross-attention takes queries [B, M, Hq, D] and gives as much.
CrossAttention = Callable[[Tensor], Tensor]
# Self-attention takes the rows' own keys and values [B, M, Hkv, D], too.
SelfAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BlockShape:
    """Holds the sizes of a block; all but ``intermediate`` and ``activation`` are the target's."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    activation: str = "silu"
    eps: float = 1e-6

    @staticmethod
    def of_target(model: PreTrainedModel) -> BlockShape:
        """Return the sizes of a new block for ``model``."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        eps = [getattr(config, name, None) for name in ("rms_norm_eps", "layer_norm_eps")]
        try:
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        except RuntimeError as error:  # it has none for all layers
            raise ValueError(
                "LongSpec reads the target's last keys, and its block is of their size; the layers "
                f"of {type(model).__name__} differ in theirs"
            ) from error
        return BlockShape(
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            activation=getattr(config, "hidden_act", None) or "silu",
            eps=next((e for e in eps if e), 1e-6),
        )


class Rotation:
    """Rotates queries and keys of any positions as the target does.

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
        """Return cosines and sines [B, M, 1, R / 2] fp32 of ``positions`` [B, M]."""
        angle = positions[..., None, None].float() * self.inv_freq
        return angle.cos() * self.scale, angle.sin() * self.scale

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate ``x`` [B, M, H, D] by :meth:`angles`; in the dtype of ``x``, computed in fp32."""
        return turn(x, *angles, self.interleaved)


class LongSpecBlock(nn.Module):
    """Holds the weights, and computes the block's formula with whatever attention it is given.

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
        """Project embeddings [B, M, h] to query [B, M, Hq, D], key and value [B, M, Hkv, D].

        They are not rotated.
        """
        s = self.shape
        qkv = self.self_qkv(self.self_norm(x)).unflatten(-1, (-1, s.head_dim))
        return qkv.split([s.heads, s.kv_heads, s.kv_heads], -2)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project to key and value alone, all that a token but the root leaves behind."""
        s, first = self.shape, self.shape.heads * self.shape.head_dim
        kv = F.linear(self.self_norm(x), self.self_qkv.weight[first:], self.self_qkv.bias[first:])
        return kv.unflatten(-1, (-1, s.head_dim)).split(s.kv_heads, -2)

    def forward(
        self, x: Tensor, self_attention: SelfAttention, cross_attention: CrossAttention
    ) -> Tensor:
        """Turn embeddings [B, M, h] into what the target's head reads, [B, M, h]."""
        x = x + self.self_out(self_attention(*self.self_projections(x)).flatten(2))
        q = self.cross_q(self.cross_norm(x)).unflatten(-1, (-1, self.shape.head_dim))
        x = x + self.cross_out(cross_attention(q).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(self.activation(gate) * up)
