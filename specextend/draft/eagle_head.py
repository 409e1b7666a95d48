"""The heads of EAGLE: their forward, their files in every dialect, their training form.

EAGLE-1 (arXiv 2401.15077) and EAGLE-2 (2406.16858, the same head): a decoder layer over the joined
embedding of token t + 1 and the target's last hidden state at t, read out by the target's own head.
EAGLE-3 (2503.01840): hidden states of three depths, joined by ``fc``, beside the embedding at the
input of the layer's attention; a head of its own over a smaller vocabulary. EAGLE-3.1 (2605.09992):
a norm per hidden state, and the normed output goes back in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .checkpoint import Checkpoint

# Queries, keys and values [B, M, H, D] of a layer, rotated, to the heads' outputs [B, M, Hq, D].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

# Names in the files of the producers (official, SpecForge, vLLM, speculators) -> names here.
_RENAMED = (
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
# In the files, but computed here or of use in training only.
_IGNORED = re.compile(r"(^|\.)t2d$|rotary_emb\.inv_freq$|^verifier_")


@dataclass(frozen=True)
class HeadConfig:
    """What a head is, whatever dialect said so.

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
    tied: bool = False

    @staticmethod
    def read(said: dict, target: PretrainedConfig, version: int) -> HeadConfig:
        """From the contents of a config.json.

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
        speculators = "speculators_model_type" in said
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
            rope=_rope(said),
            windows=_windows(said, layers),
            max_position_embeddings=said.get("max_position_embeddings") or 2048,
            hidden_act=said.get("hidden_act") or "silu",
            rms_norm_eps=said.get("rms_norm_eps") or 1e-6,
            norm_before_residual=said.get("norm_before_residual", speculators),
            norm_output=bool(said.get("norm_output")),
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


def _rope(said: dict) -> dict:
    """The head's own; a head that does not say has Llama's first, whatever its target has."""
    rope = {**(said.get("rope_scaling") or {}), **(said.get("rope_parameters") or {})}
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", said.get("rope_theta") or 10000.0)
    return rope


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class _Names:
    """Which parameters that only some heads have are there, below a prefix."""

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
        out = attend(_rotated(q, cos, sin), _rotated(k, cos, sin), v)
        return self.o_proj(out.flatten(-2))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, M, H, D] at the positions of cos and sin [B, M, R / 2], pairs as halves of R."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


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
    """A Llama layer; the first one of EAGLE-3 joins embedding and hidden state at its input."""

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
    """A draft head; its parameters have the names of vLLM's files, ``layers.0`` being the first.

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
        # Not registered: the target's parameters are not the head's.
        self._shared = (target.get_input_embeddings(), target.get_output_embeddings())

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
        """[draft vocabulary] int64, the target's id of each of its own; None where they agree."""
        if self.d2t is None:
            return None
        return torch.arange(self.d2t.shape[0], device=self.d2t.device) + self.d2t

    def obstacle(self) -> str | None:
        """Why its forward cannot be captured in CUDA graphs; None if it can."""
        if any(hasattr(module, "_hf_hook") for module in self._shared):
            return "accelerate's hooks move the target's embedding or head on the host's command"
        return None

    def rope(self, device: torch.device) -> LlamaRotaryEmbedding:
        """Angles per position, and the scale of cosines and sines, as `transformers` has them."""
        if self._rope is None or self._rope.inv_freq.device != device:
            config = self.config
            llama = LlamaConfig(
                hidden_size=config.hidden_size,
                num_attention_heads=config.num_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_position_embeddings,
                rope_parameters=dict(config.rope),
            )
            # Not a submodule: it has no parameters, and is never on the meta device.
            object.__setattr__(self, "_rope", LlamaRotaryEmbedding(llama).to(device))
        return self._rope

    def fuse(self, features: Tensor) -> Tensor:
        """Hidden states of the target [B, M, F] as the layers take them, [B, M, H]."""
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
        embeds = (self._shared[0] if self.embed_tokens is None else self.embed_tokens)(tokens)
        if self.embed_norm is not None:
            embeds = self.embed_norm(embeds)
        rope = self.rope(tokens.device)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        angles = positions[..., None].to(wide) * rope.inv_freq.to(wide)
        cos, sin = (
            (f(angles) * rope.attention_scaling).to(hidden.dtype) for f in (torch.cos, torch.sin)
        )
        if self.config.version == 1:
            hidden = self.fc(torch.cat([embeds, hidden], -1))
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, embeds, cos, sin, lambda q, k, v, i=index: attend(i, q, k, v))
        out = hidden if self.norm is None else self.norm(hidden)
        return out, out if self.config.norm_output else hidden

    def logits(self, out: Tensor) -> Tensor:
        """[B, M, draft vocabulary]."""
        if self.lm_head is not None:
            return self.lm_head(out)
        if not self.config.tied:
            return self._shared[1](out)
        embedding = self._shared[0] if self.embed_tokens is None else self.embed_tokens
        return nn.functional.linear(out, embedding.weight)

    def unroll(self, tokens: Tensor, features: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
        """The training form: ``steps`` proposed tokens behind every position, in plain PyTorch.

        EAGLE-3's training-time test. The first step runs over true features; each further one takes
        the output of the one before it for its feature, and sees the true features up to where
        its chain began and the chain itself. Inputs are the text's tokens throughout.

        Args:
            tokens: [B, L] int64.
            features: [B, L, F] of the same positions.
            steps: at most L - 1.

        Returns:
            Per step s = 0 ..: logits [B, L - 1 - s, draft vocabulary] and hidden states [B, .., H].
            Row t predicts token t + 2 + s, having been given features up to t. Differentiable.
        """
        attention = _ChainAttention(self.config.windows)
        hidden, results = self.fuse(features[:, :-1]), []
        for step in range(steps):
            inputs = tokens[:, 1 + step :]
            rows = inputs.shape[1]
            positions = torch.arange(step, step + rows, device=tokens.device)[None]
            out, hidden = self(inputs, hidden[:, :rows], positions, attention)
            results.append((self.logits(out), hidden))
        return results

    # ---- files ---------------------------------------------------------------------------------

    @staticmethod
    def load(checkpoint: Checkpoint, target: PreTrainedModel) -> EagleHead:
        """Read a head in any dialect, in the target's dtype and on its device.

        Raises:
            ValueError: with the tensors that are missing, unknown or of another shape, or with what
                does not fit the target.
        """
        try:
            return _load(checkpoint, target)
        except ValueError as error:
            raise ValueError(f"EAGLE head {checkpoint.name!r}: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors as the official EAGLE-3 heads have them."""
        config, folder = self.config, Path(folder)
        if config.version != 3:
            raise ValueError(f"EAGLE-3 heads are written, not version {config.version}")
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
            "draft_vocab_size": config.draft_vocab_size if self.lm_head is not None else None,
            "target_hidden_size": config.target_hidden_size,
            "tie_word_embeddings": config.tied,
            "max_position_embeddings": config.max_position_embeddings,
            "rope_parameters": config.rope,
            "rope_theta": config.rope["rope_theta"],
            "sliding_window": max(config.windows) or None,
            "layer_types": ["sliding_attention" if w else "full_attention" for w in config.windows],
            "norm_before_residual": config.norm_before_residual,
            "norm_output": config.norm_output,
            "fc_norm": self.fc_norm is not None,
            # Counted by a layer's output.
            "eagle_config": {
                "use_aux_hidden_state": True,
                "eagle_aux_hidden_state_layer_ids": [i - 1 for i in config.feature_layers],
            },
        }
        tensors = {
            re.sub(r"^layers\.0\.", "midlayer.", name): tensor.detach().cpu().contiguous()
            for name, tensor in self.state_dict().items()
        }
        if self.d2t is not None:
            tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool)
            tensors["t2d"][self.vocabulary.cpu()] = True
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(said, indent=2) + "\n")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


class _ChainAttention:
    """Attention of :meth:`EagleHead.unroll`: the first step's keys under a causal mask, and of each
    further step the key of the same row."""

    def __init__(self, windows: tuple[int, ...]):
        self.windows = windows
        self.keys: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group, rows = q.shape[2] // k.shape[2], q.shape[1]
        k, v = (x.repeat_interleave(group, 2) for x in (k, v))
        steps = self.keys.setdefault(index, [])
        steps.append((k, v))
        q = q / q.shape[-1] ** 0.5
        first = torch.einsum("bthd,bshd->bhts", q, steps[0][0])
        # Row t of step s is at position t + s, which is what windows are measured in.
        step, window = len(steps) - 1, self.windows[index] or first.shape[-1] + len(steps)
        seen = torch.ones(first.shape[-2:], dtype=torch.bool, device=q.device).tril()
        seen = seen.triu(step + 1 - window)
        logits = [first.masked_fill(~seen, -torch.inf)]
        for i, (later, _) in enumerate(steps[1:], 1):
            own = torch.einsum("bthd,bthd->bht", q, later[:, :rows])[..., None]
            logits.append(own if step - i < window else torch.full_like(own, -torch.inf))
        weights = torch.cat(logits, -1).softmax(-1)
        count = first.shape[-1]
        out = torch.einsum("bhts,bshd->bthd", weights[..., :count], steps[0][1])
        for i, (_, later) in enumerate(steps[1:]):
            out = out + weights[..., count + i].transpose(1, 2)[..., None] * later[:, :rows]
        return out


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
    config = HeadConfig.read(checkpoint.config, target.config.get_text_config(), version)
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
    tensors = {
        name: tensor.to(target.device, target.dtype if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }
    if "d2t" in tensors:
        _check_d2t(tensors["d2t"], config.vocab_size)
    head.load_state_dict(tensors, assign=True)
    try:
        head.rope(target.device)
    except Exception as error:  # of many types, as fields are missing or of another type
        raise ValueError(f"its rotary embedding {config.rope} is not known: {error!r}") from error
    return head.eval().requires_grad_(False)


def head_version(checkpoint: Checkpoint) -> int | None:
    """1 or 3 for what may be an EAGLE head, None for anything else."""
    said, names = checkpoint.config, checkpoint.files
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


def _check_d2t(d2t: Tensor, vocab: int) -> None:
    ids = torch.arange(d2t.shape[0], device=d2t.device) + d2t
    if bool((ids < 0).any() or (ids >= vocab).any()) or ids.unique().numel() < ids.numel():
        raise ValueError(
            "d2t, the offset of the target's id to the draft's, must lead to different ids in "
            f"[0, {vocab}); it leads from {int(ids.min())} to {int(ids.max())}, "
            f"{ids.unique().numel()} different ones of {ids.numel()}"
        )
