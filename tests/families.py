"""Builds every family of language models that the installed `transformers` has, in miniature."""

from __future__ import annotations

import copy
import inspect

import torch
from models import VOCAB
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

#: a model type each
FAMILIES = tuple(sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING)))
#: of models that see, too
SEEING = tuple(sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) & set(CONFIG_MAPPING)))

WINDOW = 24  # of sliding windows and chunks of attention: shorter than the tests' prompts
_LENGTH = 512
_MOST_WEIGHTS = 4e6

# What a configuration is given, as far as it knows the name.
_SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=_LENGTH,
    bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.3,
    tie_word_embeddings=False, sliding_window=WINDOW, attention_chunk_size=WINDOW,
    # By other names.
    n_embd=32, n_head=4, n_layer=4, n_positions=_LENGTH, n_inner=48, d_model=32, n_heads=4,
    n_layers=4, num_layers=4, num_heads=4, ffn_dim=48, d_ff=48, d_kv=8, ffn_hidden_size=48,
    word_embed_proj_dim=32, decoder_layers=4, decoder_attention_heads=4, decoder_ffn_dim=48,
    max_seq_len=_LENGTH, rotary_dim=8, window_size=WINDOW, query_pre_attn_scalar=8,
    # Experts.
    moe_intermediate_size=16, shared_expert_intermediate_size=16, shared_intermediate_size=32,
    moe_shared_expert_intermediate_size=16, expert_ffn_hidden_size=16, n_routed_experts=4,
    num_experts=4, num_local_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_topk=2,
    moe_k=2, top_k_experts=2, n_group=1, topk_group=1, n_shared_experts=1, num_shared_experts=1,
    first_k_dense_replace=1, moe_layer_start_index=1, zero_expert_num=2,
    # Latent keys and values.
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
    # Recurrences and convolutions.
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8, mamba_d_state=8, mamba_n_heads=4, mamba_d_head=16, mamba_d_ssm=64,
    mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=8, mamba_num_heads=4, mamba_head_dim=16,
    mamba_dt_rank=4, ssm_state_size=8, state_size=8, n_groups=2, chunk_size=8, expand=2,
    time_step_rank=4, conv_dim=32, block_dim=32, block_ff_dim=48, block_multiple_of=8,
    block_size=8, lru_width=32, attention_window_size=WINDOW,
    # Gemma 3n and 4.
    hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB, num_kv_shared_layers=2,
    global_head_dim=16, laurel_rank=8, altup_num_inputs=2, num_global_key_value_heads=2,
    # What begins at some length begins early.
    index_topk=8, index_topk_blocks=2, index_block_size=8, floor_scale=16,
    # Nothing is dropped.
    attention_dropout=0.0, hidden_dropout=0.0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    dropout=0.0, layerdrop=0.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    activation_dropout=0.0,
)  # fmt: skip

# The same for parts that see, which are not run.
_VISION = dict(
    depth=2, hidden_size=32, num_heads=4, intermediate_size=48, out_hidden_size=32,
    num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
    deepstack_visual_indexes=[0], num_position_embeddings=64, embed_dim=32, mlp_ratio=2,
    projector_input_dim=32, projector_output_dim=32, vision_output_dim=32, head_dim=8,
)  # fmt: skip

_TWO_KINDS = ["linear_attention", "full_attention"] * 2
_GEMMA4 = dict(
    num_hidden_layers=6, layer_types=["sliding_attention", "full_attention"] * 3, global_head_dim=16
)
_SECTIONS = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])
_LEFT_OUT = "left out"

# What families want besides, or instead: layers of all their kinds.
_SPECIAL: dict[str, dict] = {
    "bamba": dict(attn_layer_indices=[1, 3]),
    "bailing_hybrid": dict(layer_group_size=2),
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "granitemoehybrid": dict(layer_types=_TWO_KINDS),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "kimi_linear": dict(layer_types=_TWO_KINDS),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "longcat_flash": dict(head_dim=8),
    "mamba2": dict(num_heads=8, head_dim=8),
    "minimax": dict(layer_types=_TWO_KINDS, sliding_window=None),
    "moshi": dict(audio_vocab_size=50),
    "mpt": dict(attn_pdrop=0),
    "nemotron_h": dict(
        layers_block_type=["mamba", "moe", "attention", "mlp"], num_hidden_layers=_LEFT_OUT
    ),
    "olmo_hybrid": dict(layer_types=_TWO_KINDS),
    "qwen2_5_vl_text": dict(rope_parameters=_SECTIONS),
    "qwen2_vl_text": dict(rope_parameters=_SECTIONS),
    "qwen3_5_moe_text": dict(layer_types=_TWO_KINDS),
    "qwen3_5_text": dict(layer_types=_TWO_KINDS),
    "qwen3_next": dict(layer_types=_TWO_KINDS),
    "zamba": dict(attn_layer_period=2, attn_layer_offset=1, num_key_value_heads=4),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"] * 2, mamba_ngroups=1),
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip


class NotInMiniature(Exception):
    """Says why a family cannot be built by this list of sizes."""


def options(config_class: type[PreTrainedConfig], changes: dict) -> dict:
    """Choose the sizes that a configuration knows, its parts' too."""
    names = set(inspect.signature(config_class.__init__).parameters)
    names |= set(getattr(config_class, "__dataclass_fields__", {}))
    if "Vision" in config_class.__name__:
        return {k: v for k, v in _VISION.items() if k in names}
    alias = config_class.attribute_map
    chosen = {k: v for k, v in _SMALL.items() if k in names or k in alias}
    for other, own in alias.items():  # one name for each thing
        if other in chosen:
            chosen.pop(own, None)
    if "qk_rope_head_dim" in names:  # heads of latent attention have other sizes
        chosen.pop("head_dim", None)
        chosen["num_key_value_heads"] = 4
    for name, part in config_class.sub_configs.items():
        if part.__name__ == "AutoConfig":  # of any class: that which it is unless others are named
            part = type(getattr(config_class(), name))
            if part is type(None):
                continue
            chosen[name] = {"model_type": part.model_type}
        elif part is config_class:
            continue
        chosen.setdefault(name, {}).update(options(part, _SPECIAL.get(part.model_type, {})))
    chosen.update(changes)
    return {k: v for k, v in chosen.items() if not (isinstance(v, str) and v == _LEFT_OUT)}


def miniature(
    family: str, seed: int = 0, auto: type = AutoModelForCausalLM, **changes
) -> PreTrainedModel:
    """Make a random model of a family, in fp32 and evaluation mode, the same for the same seed.

    Args:
        auto: the class of `transformers` that chooses the model's.
        changes: options of its configuration.

    Raises:
        NotInMiniature: with the reason.
    """
    config_class = CONFIG_MAPPING[family]
    try:
        config = config_class(**options(config_class, {**_SPECIAL.get(family, {}), **changes}))
        with torch.device("meta"):
            model = auto.from_config(copy.deepcopy(config))
        size = sum(p.numel() for p in model.parameters())
        if size > _MOST_WEIGHTS:
            raise NotInMiniature(f"{size / 1e6:.0f} million weights")
        torch.manual_seed(seed)
        model = auto.from_config(config).float().eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    except NotInMiniature:
        raise
    except Exception as error:
        raise NotInMiniature(f"{type(error).__name__}: {error}") from error
    return model
