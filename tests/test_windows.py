"""How far a layer sees is what its model's masks say, whether its attention is told or not."""

from __future__ import annotations

import pytest
import torch
from models import _BASE, FAMILIES, VOCAB, prompt, tiny_model
from transformers import AutoModelForCausalLM, MoshiConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from specextend import SpecExtend, UnsupportedModelError
from specextend.attention import PatchedModel
from specextend.windows import cache_windows

NEW = 20


def assert_same_text(model: PreTrainedModel, lengths: tuple[int, ...], **options) -> None:
    for draft in (None, "ngram"):
        spec = SpecExtend(model, draft, seed=0, gate="off", prefill_chunk=16, **options)
        for length in lengths:
            ids, how = prompt(length), dict(max_new_tokens=NEW, do_sample=False)
            assert torch.equal(spec.generate(ids, **how), model.generate(ids, **how)), length


@pytest.mark.sweep(3)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 2, 7, 8, 9, 10, 24, 64, 512, 4096])
def test_windows_of_masks_alone(window, attention):
    """Smaller than the tokens of the trial, as large, larger; the context inside and beyond."""
    model = tiny_model("phimoe", sliding_window=window, attn_implementation=attention)
    assert PatchedModel(model).find_windows() == dict.fromkeys((0, 1), (window or 0) % 512 % 4096)
    assert_same_text(model, (3, 60))


@pytest.mark.sweep(4)
@pytest.mark.parametrize("window", [2, 9, 24, 512, 4096])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss"])
def test_windows_that_attention_is_told(family, window):
    model = tiny_model(family, sliding_window=window)
    found = PatchedModel(model).find_windows()
    told = window if window < 512 else 0
    assert found[0] == told and found[1] == (told if family == "mistral" else 0)
    assert_same_text(model, (30,))


def moshi(window: int) -> PreTrainedModel:
    """Make one whose masks know no window, whereas its cache does."""
    config = MoshiConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        ffn_dim=64, max_position_embeddings=512, sliding_window=window, initializer_range=0.3,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


def test_a_cache_that_forgets_what_masks_show():
    with pytest.raises(UnsupportedModelError, match=r"layer 0 sees all tokens, .* the last 64 of"):
        SpecExtend(moshi(64))
    assert_same_text(moshi(512), (60,))


def test_flash_attention_has_the_window_that_it_is_told():
    """Its masks hide padding alone."""
    for family, told in (("phimoe", 0), ("mistral", 24)):
        model = tiny_model(family, sliding_window=24)
        model.config._attn_implementation_internal = "flash_attention_2"
        assert PatchedModel(model).find_windows() == {0: told, 1: told}
        if not told:
            with pytest.raises(UnsupportedModelError, match="sees all tokens, but generate"):
                SpecExtend(model)


def test_a_window_of_one_token():
    with pytest.raises(UnsupportedModelError, match="its sliding_window is 1, with which"):
        SpecExtend(tiny_model("mistral", sliding_window=1))


def test_a_window_is_looked_up_whenever_a_model_is_tried():
    model = tiny_model("phimoe", sliding_window=None)
    assert_same_text(model, (40,))
    model.config.sliding_window = 9
    assert_same_text(model, (40,))


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_all_families_say_what_attention_is_told(family):
    """They are found without a difference to what was served before."""
    model = tiny_model(family)
    patched = PatchedModel(model)
    found, told = patched.find_windows(), {}
    assert sorted(found) == [0, 1]
    for layer, kept in cache_windows(model).items():
        told[layer] = kept
    assert {layer: window for layer, window in found.items() if window} == told


# Sizes by all the names that families have for them.
_SIZES = dict(
    head_dim=8, tie_word_embeddings=False, n_embd=32, n_head=4, n_layer=2, n_positions=512,
    n_inner=48, ffn_dim=48, num_experts=4, num_local_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, d_model=32, n_heads=4, n_layers=2, decoder_layers=2,
    decoder_attention_heads=4, decoder_ffn_dim=48, word_embed_proj_dim=32,
)  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("family", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_family(family, window):
    """Its text is the model's own, or it is refused."""
    sliding = dict(sliding_window=window, use_sliding_window=True, max_window_layers=1)
    try:
        config = CONFIG_MAPPING[family](**_BASE, **_SIZES, **(sliding if window else {}))
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config).num_parameters()
    except Exception as error:
        pytest.skip(f"not of these sizes: {error!r}")
    if size > 3e6:
        pytest.skip("too large")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    try:
        assert_same_text(model, (6, 60))
    except UnsupportedModelError as refusal:
        assert str(refusal)
    except ValueError as refusal:
        assert "is not available with specextend" in str(refusal)
