"""Models that would give wrong logits are refused, by name and reason."""

from __future__ import annotations

import pytest
import torch
from families import NotInMiniature, miniature
from models import FAMILIES, prompt, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig, T5Config

from specextend import SpecExtend, UnsupportedModelError
from specextend.attention import PatchedModel
from specextend.guard import check_architecture, check_length, self_check
from specextend.rotary import probe_rotary, rotate


@pytest.mark.sweep(9)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_pass(family):
    for dtype in (torch.float32, torch.bfloat16):
        self_check(PatchedModel(tiny_model(family, dtype=dtype)))


def refused(model, text):
    with pytest.raises(UnsupportedModelError, match=text):
        SpecExtend(model, None)


def test_chunks_that_only_the_cache_has():
    model = tiny_model("llama")
    model.config.attention_chunk_size = 64
    refused(model, "its layer 0 sees all tokens, but generate keeps the last 64 of them")


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "minimax_m3_vl_text"])
def test_sparse_attention_by_an_index(family):
    """Refused by its configuration: short texts are attended to as a whole."""
    try:
        model = miniature(family, index_topk=2048, index_topk_blocks=16)
    except NotInMiniature as reason:
        pytest.skip(str(reason))
    refused(model, "its attention is sparse by an index")


def test_a_bias_of_its_own():
    """It would be left out without a word; here it is so small that no trial shows it."""
    model = tiny_model("llama")
    own = model.model.layers[1].self_attn.forward

    def biased(*args, **kwargs):
        return own(*args, position_bias=torch.full((1,), 1e-9), **kwargs)

    model.model.layers[1].self_attn.forward = biased
    refused(model, "brings a position_bias of its own")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softcap_that_its_own_attention_leaves_out(dtype):
    """Refused by name: in bfloat16 the difference is within what a trial can tell."""
    model = tiny_model("gemma2", dtype=dtype)
    model.config._attn_implementation_internal = "sdpa"  # as transformers < 5.21 loads it
    refused(model, r'softcap of 50, .* attn_implementation="eager", or use transformers >= 5\.21')
    model.config.attn_logit_softcapping = None  # Gemma 2 without a softcap is fine with SDPA
    check_architecture(model)


def test_encoder_decoder_and_headless():
    t5 = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    refused(AutoModel.from_config(t5), "encoder-decoder")
    refused(tiny_model("llama").model, "no language-modelling head")
    bert = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    refused(AutoModel.from_config(bert), "no language-modelling head")


def test_attention_that_goes_elsewhere():
    """A layer that does not ask through the interface is found by counting."""
    model = tiny_model("llama")

    def own_attention(hidden_states, **kwargs):
        return torch.zeros_like(hidden_states), None

    model.model.layers[1].self_attn.forward = own_attention
    refused(model, "asked for attention 1 times in a forward of 2 layers")


def test_attention_that_means_something_else():
    """Logits that differ from the model's own are found by comparing them."""
    model = tiny_model("llama")
    eager = model.model.layers[0].self_attn.forward

    def doubled_elsewhere(hidden_states, **kwargs):
        out, weights = eager(hidden_states=hidden_states, **kwargs)
        scale = 1.0 if model.config._attn_implementation == "specextend" else 2.0
        return out * scale, weights

    model.model.layers[0].self_attn.forward = doubled_elsewhere
    refused(model, "differ from the model's own")


def test_own_mask():
    model = tiny_model("llama")
    forward = model.model.layers[0].self_attn.forward

    def with_mask(hidden_states, **kwargs):
        kwargs["attention_mask"] = torch.ones(1, 1, 1, 1)
        return forward(hidden_states=hidden_states, **kwargs)

    model.model.layers[0].self_attn.forward = with_mask
    refused(model, "brings an attention mask of its own")


def test_model_is_untouched_by_a_failed_check():
    model = tiny_model("llama")
    before = model.config._attn_implementation
    model.config.attention_chunk_size = 8
    with pytest.raises(UnsupportedModelError):
        SpecExtend(model)
    assert model.config._attn_implementation == before
    model(prompt(5))


def test_rope_that_changes_inside_the_context():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=128,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    check_architecture(model)
    check_length(model, 60, 128)
    with pytest.raises(ValueError, match="dynamic rotary embedding changes at 128 tokens"):
        check_length(model, 60, 129, role="draft")


class TestRotary:
    @pytest.mark.parametrize(
        "family, interleaved",
        [("llama", False), ("qwen3", False), ("gpt_neox", False), ("phi", False), ("cohere", True),
         ("glm4", True), ("gemma3_text", False), ("stablelm", False)],
    )  # fmt: skip
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_layout_is_found(self, family, interleaved, dtype):
        rotary = probe_rotary(tiny_model(family, dtype=dtype))
        assert rotary.interleaved == interleaved
        assert rotary.inv_freq.shape[0] == 2 and rotary.inv_freq.dtype == torch.float32

    def test_layers_with_different_frequencies(self):
        """Gemma 3: local and global layers."""
        rotary = probe_rotary(tiny_model("gemma3_text"))
        assert not torch.equal(rotary.inv_freq[0], rotary.inv_freq[1])

    def test_partial_rotation(self):
        assert probe_rotary(tiny_model("phi")).inv_freq.shape == (2, 2)  # 4 of 8 dimensions

    @pytest.mark.parametrize("family", ["gpt2", "opt"])
    def test_learned_positions_are_refused(self, family):
        with pytest.raises(ValueError, match='use draft_cache="full"'):
            probe_rotary(tiny_model(family))

    def test_rotation_composes(self):
        keys, f = torch.randn(3, 2, 16), torch.rand(6)
        twice = rotate(rotate(keys, 5, f, True), -3, f, True)
        torch.testing.assert_close(twice, rotate(keys, 2, f, True))
        torch.testing.assert_close(rotate(keys, 7, f, False)[..., 12:], keys[..., 12:].double())
