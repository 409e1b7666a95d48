"""Makes small EAGLE heads in every dialect, and has their forward in plain PyTorch.

Names of tensors and of configuration fields are those of published checkpoints and of the loaders
of SGLang, vLLM and speculators.
"""

from __future__ import annotations

import json
from collections.abc import Callable
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
    """Holds one head.

    Attributes:
        tensors: by their names in the file.
        config: what config.json holds.
        names: from names in the file to plain ones, ``l0.`` being the first layer.
        version, features, norm_before_residual, norm_output, norm_logits, theta: what the
            reference needs.
        binary: whether its file is pytorch_model.bin instead of model.safetensors.
    """

    tensors: dict[str, Tensor]
    config: dict
    names: dict[str, str]
    version: int
    features: tuple[int, ...]
    norm_before_residual: bool = False
    norm_output: bool = False
    norm_logits: bool = True
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
    "eagle3.1-legacy", "eagle3.1-specforge", "eagle3.1-specforge-unnormed", "eagle3.1-modelopt",
    "eagle3.1-speculators", "eagle3-ea-layer", "eagle1-ea-layer", "eagle3-norm-before-fc",
    "eagle3-shared-head", "eagle3-tied", "eagle3-last-hidden",
)  # fmt: skip


def make(dialect: str, hidden: int = 32, vocab: int = VOCAB, seed: int = 0) -> Head:
    """Draw a random head for a target of width ``hidden`` and ``LAYERS`` layers."""
    maker = Maker(dialect, hidden, vocab, seed)
    maker.add_layers()
    maker.add_ends()
    if change := CHANGES.get(dialect):
        change(maker)
    if maker.version == 3 and "vllm" not in dialect and "speculators" not in dialect:
        for name in maker.tensors:
            if name.startswith("layers.0."):
                maker.names.setdefault(name, name.replace("layers.0.", "midlayer."))
    return Head(
        {maker.names.get(name, name): tensor for name, tensor in maker.tensors.items()},
        maker.config, {there: name for name, there in maker.names.items()},
        maker.version, maker.features, **maker.extra,
    )  # fmt: skip


class Maker:
    """Draws the tensors that all dialects have; a function of CHANGES then adds what one has.

    Attributes:
        tensors: by their plain names.
        config: what config.json will hold.
        names: from plain names to those in the file, where they differ.
        extra: arguments of ``Head`` besides.
    """

    heads, kv, dim, mlp = 4, 2, 8, 40

    def __init__(self, dialect: str, hidden: int, vocab: int, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.dialect, self.hidden, self.vocab = dialect, hidden, vocab
        self.version = 1 if dialect.startswith("eagle1") else 3
        self.size = 24 if dialect == "eagle3-other-width" else hidden
        self.layers = 2 if "two-layers" in dialect else 1
        last_alone = self.version == 1 or dialect == "eagle3-last-hidden"
        self.features = (LAYERS,) if last_alone else (2, 2, 2)
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[str, str] = {}
        self.extra: dict = {}
        self.config = dict(
            model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=self.size,
            num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.kv, intermediate_size=self.mlp, vocab_size=vocab,
            hidden_act="silu", rms_norm_eps=1e-5, max_position_embeddings=2048, head_dim=self.dim,
        )  # fmt: skip

    def weight(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator) / shape[-1] ** 0.5

    def norm(self, n: int) -> Tensor:
        return 1 + 0.2 * torch.randn(n, generator=self.generator)

    def add_layers(self) -> None:
        t, size, sglang = self.tensors, self.size, "sglang" in self.dialect
        queries, keys = self.heads * self.dim, self.kv * self.dim
        for i in range(self.layers):
            takes_both = self.version == 3 and i == 0  # embeddings and features, side by side
            inputs = 2 * size if takes_both else size
            for name, rows, columns in (
                ("self_attn.q_proj", queries, inputs), ("self_attn.k_proj", keys, inputs),
                ("self_attn.v_proj", keys, inputs), ("self_attn.o_proj", size, queries),
                ("mlp.gate_proj", self.mlp, size), ("mlp.up_proj", self.mlp, size),
                ("mlp.down_proj", size, self.mlp),
            ):  # fmt: skip
                t[f"layers.{i}.{name}.weight"] = self.weight(rows, columns)
            t[f"layers.{i}.post_attention_layernorm.weight"] = self.norm(size)
            if takes_both or sglang:
                t[f"layers.{i}.hidden_norm.weight"] = self.norm(size)
            if takes_both or i > 0 and not sglang:
                t[f"layers.{i}.input_layernorm.weight"] = self.norm(size)

    def add_ends(self) -> None:
        """Add what stands before the layers and behind them."""
        t, size, vocab = self.tensors, self.size, self.vocab
        if self.version == 1:
            t["fc.weight"] = self.weight(size, 2 * size)
            return
        t["norm.weight"] = self.norm(size)
        if self.dialect != "eagle3-last-hidden":
            t["fc.weight"] = self.weight(size, len(self.features) * self.hidden)
        if self.dialect not in ("eagle3-shared-head", "eagle3-tied", "eagle3-vllm"):
            ids = torch.randperm(vocab, generator=self.generator)[:DRAFT_VOCAB].sort().values
            t["d2t"] = ids - torch.arange(DRAFT_VOCAB)
            t["t2d"] = torch.zeros(vocab, dtype=torch.bool).scatter(0, ids, True)
            t["lm_head.weight"] = self.weight(DRAFT_VOCAB, size)
            self.config["draft_vocab_size"] = DRAFT_VOCAB


def _eagle1(m: Maker) -> None:
    m.tensors["fc.bias"] = m.weight(m.size)
    m.config["bias"] = True
    m.extra["binary"] = True


def _eagle1_own_embedding(m: Maker) -> None:
    _eagle1(m)
    _own_embedding(m)


def _own_embedding(m: Maker) -> None:
    m.tensors["embed_tokens.weight"] = m.weight(m.vocab, m.size)


def _eagle1_qwen2(m: Maker) -> None:
    for name, rows in (("q", m.heads * m.dim), ("k", m.kv * m.dim), ("v", m.kv * m.dim)):
        m.tensors[f"layers.0.self_attn.{name}_proj.bias"] = m.weight(rows)
    m.config.update(bias=False, rope_theta=500.0)
    m.extra["theta"] = 500.0


def _eagle1_speculators(m: Maker) -> None:
    t = m.tensors
    t["layers.0.input_layernorm.weight"] = m.norm(m.size)
    t["embed_norm.weight"], t["norm.weight"] = m.norm(m.size), m.norm(m.size)
    t["fc.bias"] = m.weight(m.size)
    m.names = {
        name: name.replace("layers.0.", "transformer.").replace("fc.", "fusion_fc.")
        .replace("embed_norm", "embedding_layernorm")
        for name in t
    }  # fmt: skip
    m.names["norm.weight"] = "pre_lm_head_layernorm.weight"
    m.config = dict(
        speculators_model_type="eagle", architectures=["EagleSpeculator"], layernorms=True,
        fusion_bias=True, transformer_layer_config=m.config,
    )  # fmt: skip


def _eagle3(m: Maker) -> None:
    m.extra["binary"] = True


def _eagle3_vllm(m: Maker) -> None:
    m.tensors["lm_head.weight"] = m.weight(m.vocab, m.size)
    m.names = {name: f"model.{name}" for name in m.tensors if name != "lm_head.weight"}
    m.config["eagle_aux_hidden_state_layer_ids"] = [1, 3, 5]
    m.features = (1, 3, 5)


def _eagle3_other_width(m: Maker) -> None:
    _own_embedding(m)
    m.config["target_hidden_size"] = m.hidden


def _eagle3_specforge(m: Maker) -> None:
    m.config.update(
        architectures=["LlamaForCausalLMEagle3"],
        eagle_config=dict(eagle_aux_hidden_state_layer_ids=[0, 2, 3], use_aux_hidden_state=True),
        rope_theta=300.0, rope_scaling=None,
    )  # fmt: skip
    m.features = (1, 3, 4)
    m.extra["theta"] = 300.0


def _eagle3_speculators(m: Maker) -> None:
    _own_embedding(m)
    m.config = dict(
        speculators_model_type="eagle3", architectures=["Eagle3Speculator"],
        draft_vocab_size=m.config.pop("draft_vocab_size"), target_hidden_size=None,
        eagle_aux_hidden_state_layer_ids=[0, 3, 4], transformer_layer_config=m.config,
        speculators_config=dict(algorithm="eagle3", verifier=dict(name_or_path="target"),
                                proposal_methods=[dict(speculative_tokens=3)]),
    )  # fmt: skip
    m.config["transformer_layer_config"]["rope_parameters"] = dict(
        rope_type="default", rope_theta=700.0
    )
    m.features = (0, 3, 4)
    m.extra["theta"] = 700.0
    if m.dialect.endswith("qwen3"):
        m.tensors["layers.0.self_attn.q_norm.weight"] = m.norm(m.dim)
        m.tensors["layers.0.self_attn.k_norm.weight"] = m.norm(m.dim)
    else:  # without, the hidden state before the norm is the residual
        m.config["norm_before_residual"] = m.extra["norm_before_residual"] = True


def _eagle3_1(m: Maker) -> None:
    for i, place in enumerate(("low", "mid", "high")):
        m.tensors[f"fc_norm.{i}.weight"] = m.norm(m.hidden)
        if m.dialect.endswith("legacy"):
            m.names[f"fc_norm.{i}.weight"] = f"aux_norm_{place}.weight"
    m.config.update(fc_norm=True, norm_output=True)
    m.extra["norm_output"] = True


def _eagle3_1_specforge(m: Maker) -> None:
    _eagle3_1(m)
    m.config["architectures"] = ["LlamaForCausalLMEagle3"]


def _eagle3_1_specforge_unnormed(m: Maker) -> None:
    """Its class read the output before the norm, which so was never trained."""
    _eagle3_1_specforge(m)
    m.config["norm_output"] = False
    m.tensors["norm.weight"] = torch.ones(m.size)
    m.extra.update(norm_output=False, norm_logits=False)


def _eagle3_1_modelopt(m: Maker) -> None:
    m.config.update(
        architectures=["LlamaForCausalLMEagle3"],
        eagle_config=dict(
            eagle_aux_hidden_state_layer_ids=[0, 2, 3], use_aux_hidden_state=True,
            return_hidden_post_norm=True,
        ),
    )  # fmt: skip
    m.features = (1, 3, 4)
    m.extra["norm_output"] = True


def _eagle3_1_speculators(m: Maker) -> None:
    for i in range(3):
        m.tensors[f"fc_norm.{i}.weight"] = m.norm(m.hidden)
    _eagle3_speculators(m)
    m.config.update(fc_norm=True, norm_output=True)
    m.extra["norm_output"] = True


def _ea_layer(m: Maker) -> None:
    for name in list(m.tensors):
        there = name.replace("layers.0.", "midlayer.") if m.version == 3 else name
        m.names[name] = f"ea_layer.{there}"


def _eagle3_norm_before_fc(m: Maker) -> None:
    m.tensors["input_norm.weight"] = m.norm(3 * m.hidden)
    m.config["norm_before_fc"] = True


def _eagle3_shared_head(m: Maker) -> None:
    m.config["draft_vocab_size"] = None


def _eagle3_tied(m: Maker) -> None:
    _own_embedding(m)
    m.config["tie_word_embeddings"] = True


def _eagle3_last_hidden(m: Maker) -> None:
    m.config["eagle_config"] = dict(use_aux_hidden_state=False)


CHANGES: dict[str, Callable[[Maker], None]] = {
    "eagle1": _eagle1,
    "eagle1-own-embedding": _eagle1_own_embedding,
    "eagle1-qwen2": _eagle1_qwen2,
    "eagle1-speculators": _eagle1_speculators,
    "eagle3": _eagle3,
    "eagle3-other-width": _eagle3_other_width,
    "eagle3-specforge": _eagle3_specforge,
    "eagle3-vllm": _eagle3_vllm,
    "eagle3-speculators": _eagle3_speculators,
    "eagle3-speculators-qwen3": _eagle3_speculators,
    "eagle3.1": _eagle3_1,
    "eagle3.1-legacy": _eagle3_1,
    "eagle3.1-specforge": _eagle3_1_specforge,
    "eagle3.1-specforge-unnormed": _eagle3_1_specforge_unnormed,
    "eagle3.1-modelopt": _eagle3_1_modelopt,
    "eagle3.1-speculators": _eagle3_1_speculators,
    "eagle3-ea-layer": _ea_layer,
    "eagle1-ea-layer": _ea_layer,
    "eagle3-norm-before-fc": _eagle3_norm_before_fc,
    "eagle3-shared-head": _eagle3_shared_head,
    "eagle3-tied": _eagle3_tied,
    "eagle3-last-hidden": _eagle3_last_hidden,
}


def rms(x: Tensor, weight: Tensor | None, eps: float = 1e-5) -> Tensor:
    return x if weight is None else x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def reference(head: Head, target, tokens: Tensor, features: Tensor, steps: int):
    """Return what the head proposes behind every position, from the papers' equations, in fp64.

    Chains are computed one by one, each with a causal forward of its own over all that it sees.

    Args:
        tokens: [L]. features: [L, F].

    Returns:
        A dict by (t, step) of logits over the draft's vocabulary and the next hidden state, where
        row t knows features up to t and tokens up to t + 1 + step.
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
    """Return output and hidden state of the last row of [n, H] inputs."""
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
    return (out if head.norm_logits else x)[-1], (out if head.norm_output else x)[-1]


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
