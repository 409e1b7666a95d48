"""Small EAGLE heads in every dialect, and their forward in plain PyTorch.

Names of tensors and of configuration fields are those of published checkpoints and of the loaders
of SGLang, vLLM and speculators.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from models import VOCAB
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

DRAFT_VOCAB = 40
LAYERS = 5  # of the target; EAGLE-3 reads hidden states 2, 2 and 2 by default


@dataclass
class Head:
    """One head.

    Attributes:
        tensors: as in the file.
        config: as in config.json.
        names: from names in the file to plain ones, ``l0.`` being the first layer.
        version, features, norm_before_residual, norm_output, theta: what the reference needs.
        binary: pytorch_model.bin instead of model.safetensors.
    """

    tensors: dict[str, Tensor]
    config: dict
    names: dict[str, str]
    version: int
    features: tuple[int, ...]
    norm_before_residual: bool = False
    norm_output: bool = False
    theta: float = 10000.0
    binary: bool = False
    plain: dict[str, Tensor] = field(init=False)

    def __post_init__(self):
        self.plain = {self.names.get(name, name): t for name, t in self.tensors.items()}

    def write(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        if self.binary:
            torch.save(self.tensors, folder / "pytorch_model.bin")
        else:
            save_file(self.tensors, folder / "model.safetensors")
        return folder


DIALECTS = (
    "eagle1", "eagle1-own-embedding", "eagle1-qwen2", "eagle1-two-layers", "eagle1-speculators",
    "eagle3", "eagle3-other-width", "eagle3-specforge", "eagle3-vllm", "eagle3-vllm-two-layers",
    "eagle3-sglang-two-layers", "eagle3-speculators", "eagle3-speculators-qwen3", "eagle3.1",
    "eagle3.1-legacy", "eagle3-norm-before-fc", "eagle3-shared-head", "eagle3-tied",
    "eagle3-last-hidden",
)  # fmt: skip


def make(dialect: str, hidden: int = 32, vocab: int = VOCAB, seed: int = 0) -> Head:
    """A random head for a target of width ``hidden`` and ``LAYERS`` layers."""
    g = torch.Generator().manual_seed(seed)
    version = 1 if dialect.startswith("eagle1") else 3
    size = 24 if dialect == "eagle3-other-width" else hidden
    heads, kv, dim, mlp = 4, 2, 8, 40
    layers = 2 if "two-layers" in dialect else 1
    features = (LAYERS,) if version == 1 or dialect == "eagle3-last-hidden" else (2, 2, 2)

    def weight(*shape):
        return torch.randn(*shape, generator=g) / shape[-1] ** 0.5

    def norm(n):
        return 1 + 0.2 * torch.randn(n, generator=g)

    t: dict[str, Tensor] = {}
    for i in range(layers):
        inputs = 2 * size if version == 3 and i == 0 else size
        for name, rows, cols in (
            ("self_attn.q_proj", heads * dim, inputs), ("self_attn.k_proj", kv * dim, inputs),
            ("self_attn.v_proj", kv * dim, inputs), ("self_attn.o_proj", size, heads * dim),
            ("mlp.gate_proj", mlp, size), ("mlp.up_proj", mlp, size), ("mlp.down_proj", size, mlp),
        ):  # fmt: skip
            t[f"layers.{i}.{name}.weight"] = weight(rows, cols)
        t[f"layers.{i}.post_attention_layernorm.weight"] = norm(size)
        if version == 3 and i == 0 or "sglang" in dialect:
            t[f"layers.{i}.hidden_norm.weight"] = norm(size)
        if version == 3 and i == 0 or i > 0 and "sglang" not in dialect:
            t[f"layers.{i}.input_layernorm.weight"] = norm(size)
    config = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=size,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=mlp, vocab_size=vocab, hidden_act="silu", rms_norm_eps=1e-5,
        max_position_embeddings=2048, head_dim=dim,
    )  # fmt: skip
    names: dict[str, str] = {}
    extra: dict = {}
    if version == 1:
        t["fc.weight"] = weight(size, 2 * size)
    else:
        t["norm.weight"] = norm(size)
        if dialect != "eagle3-last-hidden":
            t["fc.weight"] = weight(size, len(features) * hidden)
        if dialect not in ("eagle3-shared-head", "eagle3-tied", "eagle3-vllm"):
            ids = torch.randperm(vocab, generator=g)[:DRAFT_VOCAB].sort().values
            t["d2t"] = ids - torch.arange(DRAFT_VOCAB)
            t["t2d"] = torch.zeros(vocab, dtype=torch.bool).scatter(0, ids, True)
            t["lm_head.weight"] = weight(DRAFT_VOCAB, size)
            config["draft_vocab_size"] = DRAFT_VOCAB

    if dialect in ("eagle1", "eagle1-own-embedding"):
        t["fc.bias"] = weight(size)
        config["bias"] = True
        extra["binary"] = True
        if dialect == "eagle1-own-embedding":
            t["embed_tokens.weight"] = weight(vocab, size)
    elif dialect == "eagle1-qwen2":
        for name, rows in (("q", heads * dim), ("k", kv * dim), ("v", kv * dim)):
            t[f"layers.0.self_attn.{name}_proj.bias"] = weight(rows)
        config.update(bias=False, rope_theta=500.0)
        extra["theta"] = 500.0
    elif dialect == "eagle1-speculators":
        t["layers.0.input_layernorm.weight"] = norm(size)
        t["embed_norm.weight"], t["norm.weight"] = norm(size), norm(size)
        t["fc.bias"] = weight(size)
        names = {
            k: k.replace("layers.0.", "transformer.").replace("fc.", "fusion_fc.")
            .replace("embed_norm", "embedding_layernorm")
            for k in t
        }  # fmt: skip
        names["norm.weight"] = "pre_lm_head_layernorm.weight"
        config = dict(
            speculators_model_type="eagle", architectures=["EagleSpeculator"], layernorms=True,
            fusion_bias=True, transformer_layer_config=config,
        )  # fmt: skip
    elif dialect == "eagle3-vllm":
        t["lm_head.weight"] = weight(vocab, size)
        names = {k: f"model.{k}" for k in t if k != "lm_head.weight"}
        config["eagle_aux_hidden_state_layer_ids"] = [1, 3, 5]
        features = (1, 3, 5)
    elif dialect == "eagle3-other-width":
        t["embed_tokens.weight"] = weight(vocab, size)
        config["target_hidden_size"] = hidden
    elif dialect == "eagle3-specforge":
        config.update(
            architectures=["LlamaForCausalLMEagle3"],
            eagle_config=dict(
                eagle_aux_hidden_state_layer_ids=[0, 2, 3], use_aux_hidden_state=True
            ),
            rope_theta=300.0, rope_scaling=None,
        )  # fmt: skip
        features = (1, 3, 4)
        extra["theta"] = 300.0
    elif dialect.startswith("eagle3-speculators"):
        t["embed_tokens.weight"] = weight(vocab, size)
        if dialect.endswith("qwen3"):
            t["layers.0.self_attn.q_norm.weight"] = norm(dim)
            t["layers.0.self_attn.k_norm.weight"] = norm(dim)
        else:
            extra["norm_before_residual"] = True  # the default
        config = dict(
            speculators_model_type="eagle3", architectures=["Eagle3Speculator"],
            draft_vocab_size=config.pop("draft_vocab_size"), target_hidden_size=None,
            eagle_aux_hidden_state_layer_ids=[0, 3, 4], transformer_layer_config=config,
            speculators_config=dict(algorithm="eagle3", verifier=dict(name_or_path="target"),
                                    proposal_methods=[dict(speculative_tokens=3)]),
        )  # fmt: skip
        config["transformer_layer_config"]["rope_parameters"] = dict(
            rope_type="default", rope_theta=700.0
        )
        if dialect.endswith("qwen3"):
            config["norm_before_residual"] = False
        features = (0, 3, 4)
        extra["theta"] = 700.0
    elif dialect.startswith("eagle3.1"):
        for i in range(3):
            t[f"fc_norm.{i}.weight"] = norm(hidden)
        config.update(fc_norm=True, norm_output=True)
        extra["norm_output"] = True
        if dialect.endswith("legacy"):
            for i, place in enumerate(("low", "mid", "high")):
                names[f"fc_norm.{i}.weight"] = f"aux_norm_{place}.weight"
    elif dialect == "eagle3-norm-before-fc":
        t["input_norm.weight"] = norm(3 * hidden)
        config["norm_before_fc"] = True
    elif dialect == "eagle3-shared-head":
        config["draft_vocab_size"] = None
    elif dialect == "eagle3-tied":
        t["embed_tokens.weight"] = weight(vocab, size)
        config["tie_word_embeddings"] = True
    elif dialect == "eagle3-last-hidden":
        config["eagle_config"] = dict(use_aux_hidden_state=False)
    if version == 3 and not names and "vllm" not in dialect and "speculators" not in dialect:
        names = {}
    if version == 3 and ("vllm" not in dialect and "speculators" not in dialect):
        for k in t:
            if k.startswith("layers.0."):
                names[k] = k.replace("layers.0.", "midlayer.")
    if dialect == "eagle3":
        extra["binary"] = True
    return Head(
        {names.get(k, k): v for k, v in t.items()}, config,
        {v: k for k, v in names.items()}, version, features, **extra,
    )  # fmt: skip


def rms(x: Tensor, weight: Tensor | None, eps: float = 1e-5) -> Tensor:
    return x if weight is None else x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def reference(head: Head, target, tokens: Tensor, features: Tensor, steps: int):
    """What the head proposes behind every position, from the papers' equations, in fp64.

    Chain by chain, every one with a causal forward of its own over all that it sees.

    Args:
        tokens: [L]. features: [L, F].

    Returns:
        by (t, step): logits over the draft's vocabulary and the next hidden state, where row t
        knows features up to t and tokens up to t + 1 + step.
    """
    w = {k: v.double() if v.is_floating_point() else v for k, v in head.plain.items()}
    embedding = w.get("embed_tokens.weight", target.get_input_embeddings().weight.double())
    if head.config.get("tie_word_embeddings"):
        readout = embedding
    else:
        readout = w.get("lm_head.weight", target.get_output_embeddings().weight.double())
    features = features.double()
    if head.version == 3:
        parts = features.chunk(len(head.features), -1)
        parts = [rms(p, w.get(f"fc_norm.{i}.weight")) for i, p in enumerate(parts)]
        features = rms(torch.cat(parts, -1), w.get("input_norm.weight"))
        if "fc.weight" in w:
            features = features @ w["fc.weight"].T
    found = {}
    for t in range(len(tokens) - 1):
        hidden = [features[i] for i in range(t + 1)]
        for step in range(steps):
            if t + 1 + step >= len(tokens):
                break
            out, state = causal_forward(
                head, w, embedding[tokens[1 : t + 2 + step]], torch.stack(hidden)
            )
            found[t, step] = (readout @ out, state)
            hidden.append(state)
    return found


def causal_forward(head: Head, w, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Output and hidden state of the last row of [n, H] inputs."""
    embeds = rms(embeds, w.get("embed_norm.weight"))
    x = hidden
    if head.version == 1:
        x = torch.cat([embeds, hidden], -1) @ w["fc.weight"].T + w.get("fc.bias", 0)
    layer = 0
    while f"layers.{layer}.mlp.up_proj.weight" in w:
        p = {k[len(f"layers.{layer}.") :]: v for k, v in w.items() if k[7:9] == f"{layer}."}
        p = {k: v for k, v in p.items() if f"layers.{layer}.{k}" in w}
        if head.version == 3 and layer == 0:
            normed = rms(x, p["hidden_norm.weight"])
            inputs = torch.cat([rms(embeds, p["input_layernorm.weight"]), normed], -1)
            x = normed if head.norm_before_residual else x
        else:
            inputs = rms(x, p.get("input_layernorm.weight", p.get("hidden_norm.weight")))
        x = x + attention(head, p, inputs)
        h = rms(x, p["post_attention_layernorm.weight"])
        h = F.silu(h @ p["mlp.gate_proj.weight"].T) * (h @ p["mlp.up_proj.weight"].T)
        x = x + h @ p["mlp.down_proj.weight"].T
        layer += 1
    out = rms(x, w.get("norm.weight"))
    return out[-1], out[-1] if head.norm_output else x[-1]


def attention(head: Head, p, inputs: Tensor) -> Tensor:
    n, dim = len(inputs), 8
    q, k, v = (
        (inputs @ p[f"self_attn.{i}_proj.weight"].T + p.get(f"self_attn.{i}_proj.bias", 0))
        .view(n, -1, dim)
        for i in "qkv"
    )  # fmt: skip
    q, k = rms(q, p.get("self_attn.q_norm.weight")), rms(k, p.get("self_attn.k_norm.weight"))
    frequency = 1 / head.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = torch.arange(n)[:, None] * frequency.double()  # rounded to fp32, as everywhere
    spin = torch.polar(torch.ones_like(angle), angle)[:, None]

    def rotated(x):
        z = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * spin
        return torch.cat([z.real, z.imag], -1)

    q, k = rotated(q), rotated(k).repeat_interleave(q.shape[1] // k.shape[1], 1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    scores = torch.einsum("thd,shd->hts", q, k) / dim**0.5
    scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    out = torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1)
    return out @ p["self_attn.o_proj.weight"].T
