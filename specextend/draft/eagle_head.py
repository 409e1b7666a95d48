"""Defines the heads of EAGLE as modules of torch.

EAGLE-1 (arXiv 2401.15077) and EAGLE-2 (2406.16858, the same head): a decoder layer over the joined
embedding of token t + 1 and the target's last hidden state at t, read out by the target's own head.
EAGLE-3 (2503.01840): hidden states of three depths, joined by ``fc``, beside the embedding at the
input of the layer's attention; a head of its own over a smaller vocabulary. EAGLE-3.1 (2605.09992):
a norm per hidden state, and the normed output goes back in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..rotary import turn

# Attention takes a layer's index, rotated queries and keys, and values, all [B, M, H, D], and gives
# [B, M, Hq, D].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HeadConfig:
    """Says what a head is, whatever dialect its file has.

    Attributes:
        version: 1 (EAGLE-1 and 2) or 3.
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size: of its
            layers.
        vocab_size, target_hidden_size: of the target.
        draft_vocab_size: entries of its own head.
        feature_layers: hidden states of the target that it reads, as `transformers` counts them.
        rope: ``rope_parameters`` of `transformers`.
        max_position_embeddings: which some kinds of ``rope`` ask for.
        hidden_act, rms_norm_eps: as in Llama.
        norm_before_residual: the first layer's residual is the normed hidden state.
        windows: per layer, the positions that a row sees (its own counts); 0: all.
        norm_output: the output goes back in behind the last norm, not before it.
        norm_logits: logits are made of the output behind the last norm, not before it.
        tied: the head is the embedding.
    """

    version: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    target_hidden_size: int
    draft_vocab_size: int
    feature_layers: tuple[int, ...]
    rope: dict
    windows: tuple[int, ...] = (0,)
    max_position_embeddings: int = 2048
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    norm_before_residual: bool = False
    norm_output: bool = False
    norm_logits: bool = True
    tied: bool = False


class RMSNorm(nn.Module):
    """Norms rows by their root mean square, in fp32, as Llama does."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class _Names:
    """Knows which of the parameters that only some heads have are there, below a prefix."""

    def __init__(self, names: frozenset[str], prefix: str = ""):
        self.names, self.prefix = names, prefix

    def below(self, part: str) -> _Names:
        return _Names(self.names, f"{self.prefix}{part}.")

    def __contains__(self, name: str) -> bool:
        return f"{self.prefix}{name}" in self.names

    def linear(self, name: str, inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=f"{name}.bias" in self)

    def norm(self, name: str, size: int, eps: float) -> RMSNorm | None:
        return RMSNorm(size, eps) if f"{name}.weight" in self else None


class _Attention(nn.Module):
    def __init__(self, config: HeadConfig, inputs: int, names: _Names):
        super().__init__()
        self.head_dim = dim = config.head_dim
        self.q_proj = names.linear("q_proj", inputs, config.num_heads * dim)
        self.k_proj = names.linear("k_proj", inputs, config.num_kv_heads * dim)
        self.v_proj = names.linear("v_proj", inputs, config.num_kv_heads * dim)
        self.o_proj = names.linear("o_proj", config.num_heads * dim, config.hidden_size)
        self.q_norm = names.norm("q_norm", dim, config.rms_norm_eps)
        self.k_norm = names.norm("k_norm", dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        out = attend(turn(q, cos, sin), turn(k, cos, sin), v)
        return self.o_proj(out.flatten(-2))


class _MLP(nn.Module):
    def __init__(self, config: HeadConfig, names: _Names):
        super().__init__()
        self.gate_proj = names.linear("gate_proj", config.hidden_size, config.intermediate_size)
        self.up_proj = names.linear("up_proj", config.hidden_size, config.intermediate_size)
        self.down_proj = names.linear("down_proj", config.intermediate_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    """Runs a Llama layer; EAGLE-3's first one joins embedding and hidden state at its input."""

    def __init__(self, config: HeadConfig, index: int, names: _Names):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.joins = config.version == 3 and index == 0
        self.norm_before_residual = config.norm_before_residual
        self.self_attn = _Attention(config, (1 + self.joins) * size, names.below("self_attn"))
        self.mlp = _MLP(config, names.below("mlp"))
        self.post_attention_layernorm = RMSNorm(size, eps)
        if self.joins:
            self.hidden_norm = RMSNorm(size, eps)
            self.input_layernorm = RMSNorm(size, eps)
        elif config.version == 3:
            # vLLM and speculators train a further layer's input norm, SGLang names it hidden_norm;
            # files may hold both.
            self.hidden_norm = names.norm("hidden_norm", size, eps)
            plain = "input_layernorm.weight" in names or self.hidden_norm is None
            self.input_layernorm = RMSNorm(size, eps) if plain else None
        else:  # the first layer of official EAGLE-1 heads has none
            plain = index > 0 or "input_layernorm.weight" in names
            self.input_layernorm = RMSNorm(size, eps) if plain else None

    def forward(self, hidden: Tensor, embeds: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor:
        if self.joins:
            normed = self.hidden_norm(hidden)
            residual = normed if self.norm_before_residual else hidden
            x = torch.cat([self.input_layernorm(embeds), normed], -1)
        else:
            residual = x = hidden
            if self.input_layernorm is not None:
                x = self.input_layernorm(x)
            elif hasattr(self, "hidden_norm"):
                x = self.hidden_norm(x)
        hidden = residual + self.self_attn(x, cos, sin, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class EagleHead(nn.Module):
    """Proposes tokens from the target's hidden states.

    Parameters have the names of vLLM's files, ``layers.0`` being the first layer.

    Args:
        config: what it is.
        target: whose embedding and head it uses where it has none of its own.
        names: parameters that only some heads have and this one has: biases, ``embed_tokens``,
            ``lm_head``, ``fc_norm``, ``input_norm``, ``embed_norm``, EAGLE-1's norms, ``d2t``.
    """

    def __init__(
        self, config: HeadConfig, target: PreTrainedModel, names: frozenset[str] = frozenset()
    ):
        super().__init__()
        self.config = config
        size, eps = config.hidden_size, config.rms_norm_eps
        has = _Names(names)
        own_embedding = "embed_tokens.weight" in has
        own_head = "lm_head.weight" in has
        needs_target = [] if own_embedding else ["embed_tokens.weight"]
        needs_target += [] if own_head or config.tied else ["lm_head.weight"]
        if needs_target and size != config.target_hidden_size:
            raise ValueError(
                f"it has no {needs_target[0]}, and the target's does not serve: the head's "
                f"hidden_size is {size}, the target's {config.target_hidden_size}"
            )
        if needs_target[-1:] == ["lm_head.weight"] and config.draft_vocab_size != config.vocab_size:
            raise ValueError(
                f"it has no lm_head.weight for its draft_vocab_size {config.draft_vocab_size}; the "
                f"target's has {config.vocab_size} entries"
            )
        self.embed_tokens = nn.Embedding(config.vocab_size, size) if own_embedding else None
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False) if own_head else None
        # A tuple registers nothing: the target's parameters are not the head's.
        self.shared = (target.get_input_embeddings(), target.get_output_embeddings())

        self.embed_norm = has.norm("embed_norm", size, eps)
        count = len(config.feature_layers)
        if config.version == 1:
            self.fc = has.linear("fc", 2 * size, size)
            self.norm = has.norm("norm", size, eps)
        else:
            joined = count * config.target_hidden_size
            raw = count == 1 and "fc.weight" not in has and joined == size
            self.fc = None if raw else has.linear("fc", joined, size)
            self.norm = RMSNorm(size, eps)
            self.input_norm = has.norm("input_norm", joined, eps)
            self.fc_norm = None
            if any(f"fc_norm.{i}.weight" in has for i in range(count)):
                self.fc_norm = nn.ModuleList(
                    RMSNorm(config.target_hidden_size, eps) for _ in range(count)
                )
        self.layers = nn.ModuleList(
            _Layer(config, i, has.below(f"layers.{i}")) for i in range(config.num_layers)
        )
        if "d2t" in has or config.draft_vocab_size != config.vocab_size:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        else:
            self.d2t = None
        self._rope: LlamaRotaryEmbedding | None = None

    @property
    def vocabulary(self) -> Tensor | None:
        """Return the target's ids of the head's own, [draft vocabulary] int64; None: the same."""
        if self.d2t is None:
            return None
        return torch.arange(self.d2t.shape[0], device=self.d2t.device) + self.d2t

    def obstacle(self) -> str | None:
        """Say why its forward cannot be captured in CUDA graphs; None if it can."""
        if any(hasattr(module, "_hf_hook") for module in self.shared):
            return "accelerate's hooks move the target's embedding or head on the host's command"
        return None

    def rope(self, device: torch.device) -> LlamaRotaryEmbedding:
        """Return angles per position and the scale of cosines and sines, as `transformers` does."""
        if self._rope is None or self._rope.inv_freq.device != device:
            config = self.config
            llama = LlamaConfig(
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_position_embeddings,
                rope_parameters=dict(config.rope),
            )
            # It is no submodule: it has no parameters, and is never on the meta device.
            object.__setattr__(self, "_rope", LlamaRotaryEmbedding(llama).to(device))
        return self._rope

    def fuse(self, features: Tensor) -> Tensor:
        """Turn hidden states of the target [B, M, F] into what the layers take, [B, M, H]."""
        if self.config.version == 1:
            return features
        if self.fc_norm is not None:
            parts = features.chunk(len(self.fc_norm), -1)
            features = torch.cat([f(x) for f, x in zip(self.fc_norm, parts, strict=True)], -1)
        if self.input_norm is not None:
            features = self.input_norm(features)
        return features if self.fc is None else self.fc(features)

    def forward(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """Run the layers.

        Args:
            tokens: [B, M] int64, each the one behind the token of its hidden state.
            hidden: [B, M, H], from :meth:`fuse`, or what this returned for the row before.
            positions: [B, M] int64.
            attend: attention of one layer.

        Returns:
            What :meth:`logits` takes, and the next rows' ``hidden``, both [B, M, H].
        """
        embeds = (self.shared[0] if self.embed_tokens is None else self.embed_tokens)(tokens)
        if self.embed_norm is not None:
            embeds = self.embed_norm(embeds)
        rope = self.rope(tokens.device)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        angles = positions[..., None, None].to(wide) * rope.inv_freq.to(wide)
        cos, sin = (
            (f(angles) * rope.attention_scaling).to(hidden.dtype) for f in (torch.cos, torch.sin)
        )
        if self.config.version == 1:
            hidden = self.fc(torch.cat([embeds, hidden], -1))
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, embeds, cos, sin, lambda q, k, v, i=index: attend(i, q, k, v))
        normed = hidden if self.norm is None else self.norm(hidden)
        out = normed if self.config.norm_logits else hidden
        return out, normed if self.config.norm_output else hidden

    def logits(self, out: Tensor) -> Tensor:
        """Return logits [B, M, draft vocabulary] of what :meth:`forward` gave, [B, M, H]."""
        if self.lm_head is not None:
            return self.lm_head(out)
        if not self.config.tied:
            return self.shared[1](out)
        embedding = self.shared[0] if self.embed_tokens is None else self.embed_tokens
        return nn.functional.linear(out, embedding.weight)
