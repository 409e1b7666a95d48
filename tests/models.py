"""Makes tiny random models of many families, for tests of the loop."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 97

_BASE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
    initializer_range=0.3,  # peaked enough that greedy decoding does not hang on near-ties
)
# Tied, some random models repeat their last token for ever.
_UNTIED = dict(tie_word_embeddings=False)
_WINDOW = 24  # that models with sliding layers see: shorter than the tests' prompts
_MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)

# Each family lists what differs from _BASE. head_dim must be a multiple of 8.
FAMILIES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": dict(head_dim=16),
    "mistral": dict(sliding_window=_WINDOW),
    "gemma": dict(head_dim=16, **_UNTIED),
    "gemma2": dict(
        head_dim=16, sliding_window=_WINDOW, query_pre_attn_scalar=16, **_UNTIED,
        attn_implementation="eager",  # the default of transformers < 5.21 leaves its softcap out
    ),
    "gemma3_text": dict(
        head_dim=16, sliding_window=_WINDOW, query_pre_attn_scalar=16, **_UNTIED,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi": dict(partial_rotary_factor=0.5, initializer_range=0.5),
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": dict(
        sliding_window=_WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "granite": {},
    "gpt_neox": dict(num_key_value_heads=None),
    "gpt_oss": dict(
        head_dim=16, sliding_window=_WINDOW, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "cohere": {},
    "cohere2": dict(
        sliding_window=_WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "glm4": dict(head_dim=8),
    "starcoder2": dict(sliding_window=None),
    "stablelm": {},
    "smollm3": {},
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(head_dim=16, initializer_range=1.0, **_MOE),
    "gpt2": dict(
        n_embd=32, n_head=4, n_layer=2, n_positions=512, n_inner=48,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_UNTIED,
    ),
    "phimoe": dict(num_local_experts=4, num_experts_per_tok=2, **_UNTIED),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
}  # fmt: skip


def tiny_model(
    family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes
) -> PreTrainedModel:
    """Make a random model of ``family``, in evaluation mode, the same for the same seed."""
    kwargs = {**_BASE, **FAMILIES[family], **changes}
    if family == "gpt2":
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_key_value_heads",
        ):
            kwargs.pop(name, None)
        for name in ("num_attention_heads", "max_position_embeddings"):
            kwargs.pop(name, None)
    kwargs = {
        k: v for k, v in kwargs.items() if v is not None or k in ("eos_token_id", "sliding_window")
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**kwargs))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    """Draw [1, length] random token ids, none of them special."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(3, VOCAB, (1, length), generator=generator)
