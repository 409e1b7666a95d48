"""Tests what a user may name as a draft, and what is said where it is none or does not fit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from eagle_heads import DIALECTS, LAYERS, make
from models import VOCAB, prompt, tiny_model
from safetensors.torch import save_file

from specextend import SpecConfig, SpecExtend, UnsupportedModelError
from specextend.draft import (
    CausalLMDraft,
    EagleDraft,
    NGramDraft,
    SelfDraft,
    checkpoint,
    load_draft,
)
from specextend.draft.eagle_checkpoint import save_head
from specextend.target import Target

# What one of the dialects leaves open; test_what_norm_output_means looks at it.
pytestmark = pytest.mark.filterwarnings("ignore:specextend. norm_output:RuntimeWarning")

CONFIG = SpecConfig(chunk_size=8, budget=32, recent_chunks=1, gate="off", seed=7)


@pytest.fixture(scope="module")
def target():
    return tiny_model("llama", num_hidden_layers=LAYERS)


def load(target, draft, **config):
    return load_draft(draft, Target(target), CONFIG.replace(**config))


class TestKinds:
    def test_words(self, target):
        assert isinstance(load(target, "ngram"), NGramDraft)
        assert type(load(target, "self")) is SelfDraft
        assert load(target, None) is None
        draft = load(target, "ngram")
        assert load(target, draft) is draft

    def test_a_causal_lm_by_folder(self, target, tmp_path):
        small = tiny_model("llama", seed=1)
        for folder, safe in ((tmp_path / "safe", True), (str(tmp_path / "bin"), False)):
            small.save_pretrained(folder)
            if not safe:
                (Path(folder) / "model.safetensors").unlink()
                torch.save(small.state_dict(), Path(folder) / "pytorch_model.bin")
            draft = load(target, folder)
            assert type(draft) is CausalLMDraft and draft.causal_lm.dtype == torch.float32
            ids = prompt(60)
            expected = SpecExtend(target, small, CONFIG)
            spec = SpecExtend(target, folder, CONFIG)
            runs = [
                [s.tokens for s in e.stream(ids, max_new_tokens=12, do_sample=False)]
                for e in (spec, expected)
            ]
            assert runs[0] == runs[1]

    @pytest.mark.parametrize("dialect", DIALECTS)
    def test_eagle_heads_by_folder(self, target, dialect, tmp_path):
        draft = load(target, make(dialect).write(tmp_path))
        assert isinstance(draft, EagleDraft)
        assert draft.head.config.version == (1 if dialect.startswith("eagle1") else 3)
        weights = [p for p in draft.head.parameters()]
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in weights)

    def test_what_norm_output_means(self, target, tmp_path, recwarn):
        """SpecForge has had two meanings: said where it matters, and only there."""
        for dialect in DIALECTS:
            made = make(dialect)
            load(target, made.write(tmp_path / dialect))
            told = [str(w.message) for w in recwarn if w.category is RuntimeWarning]
            assert len(told) == (dialect == "eagle3.1-specforge")
            recwarn.clear()
        unnormed = load(target, tmp_path / "eagle3.1-specforge-unnormed").head
        with pytest.raises(ValueError, match="whose logits are made of the normed output"):
            unnormed_again = tmp_path / "again"
            save_head(unnormed, unnormed_again)
        assert not unnormed_again.exists()
        made = make("eagle3.1-specforge")
        made.config["norm_output"] = False  # what the warning advises, for older heads
        config = load(target, made.write(tmp_path / "older")).head.config
        assert not config.norm_output and config.norm_logits and not recwarn.list

    def test_in_the_targets_dtype(self, tmp_path):
        target = tiny_model("llama", num_hidden_layers=LAYERS, dtype=torch.bfloat16)
        spec = SpecExtend(target, make("eagle3").write(tmp_path), CONFIG)
        head = spec.draft.head
        assert head.lm_head.weight.dtype == torch.bfloat16 and head.d2t.dtype == torch.int64
        spec.generate(prompt(60), max_new_tokens=10, do_sample=False)
        assert spec.stats.num_draft_tokens > 0

    def test_shards(self, target, tmp_path):
        made = make("eagle3-specforge")
        (tmp_path / "config.json").write_text(json.dumps(made.config))
        names = sorted(made.tensors)
        parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
        for file, part in parts.items():
            save_file({n: made.tensors[n] for n in part}, tmp_path / file)
        index = {n: file for file, part in parts.items() for n in part}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        assert isinstance(load(target, tmp_path), EagleDraft)

    def test_from_the_hub(self, target, tmp_path, monkeypatch):
        """Safetensors if there are any, else pickles; never other files."""
        folder, asked = tmp_path / "snapshot", []

        def download(name, allow_patterns):
            asked.append((name, allow_patterns))
            if len(asked) == 1:  # nothing but the configuration matches
                folder.mkdir()
                (folder / "config.json").write_text(json.dumps(make("eagle3").config))
            else:
                make("eagle3").write(folder)
            return str(folder)

        monkeypatch.setattr(checkpoint, "snapshot_download", download)
        assert isinstance(load(target, "someone/EAGLE3-head"), EagleDraft)
        assert asked == [
            ("someone/EAGLE3-head", ["*.json", "*.safetensors"]),
            ("someone/EAGLE3-head", ["*.json", "*.bin"]),
        ]

    def test_not_on_the_hub(self, target, monkeypatch):
        def download(name, allow_patterns):
            raise OSError("no network")

        monkeypatch.setattr(checkpoint, "snapshot_download", download)
        with pytest.raises(ValueError, match="'ngrams' is neither a folder, nor .* no network"):
            load(target, "ngrams")


class TestNoDraft:
    def test_no_configuration(self, target, tmp_path):
        (tmp_path / "readme.txt").write_text("")
        with pytest.raises(ValueError, match="config.json cannot be read .*readme.txt"):
            load(target, tmp_path)
        for text in ("{", "[1]", "\x00"):
            (tmp_path / "config.json").write_text(text)
            with pytest.raises(ValueError, match="config.json cannot be read"):
                load(target, tmp_path)

    def test_no_weights(self, target, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ValueError, match=r"no weights, .* the folder has \['config.json'\]"):
            load(target, tmp_path)
        index = tmp_path / "model.safetensors.index.json"
        for text in ("{", "{}", "[]"):
            index.write_text(text)
            with pytest.raises(ValueError, match="model.safetensors.index.json cannot be read"):
                load(target, tmp_path)
        index.write_text('{"weight_map": {"fc.weight": "gone.safetensors"}}')
        with pytest.raises(ValueError, match="gone.safetensors cannot be read"):
            load(target, tmp_path)

    def test_broken_weights(self, target, tmp_path):
        made = make("eagle3-specforge")
        made.write(tmp_path)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
        with pytest.raises(ValueError, match="model.safetensors cannot be read"):
            load(target, tmp_path)
        weights.unlink()
        (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle")
        with pytest.raises(ValueError, match="pytorch_model.bin cannot be read"):
            load(target, tmp_path)

    def test_pickles_run_no_code(self, target, tmp_path):
        class Harm:
            def __reduce__(self):
                return (open, (str(tmp_path / "harm"), "w"))

        (tmp_path / "config.json").write_text(json.dumps(make("eagle1").config))
        torch.save({"fc.weight": Harm()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match="pytorch_model.bin cannot be read"):
            load(target, tmp_path)
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"fc.weight": Harm()}))
        with pytest.raises(ValueError, match="pytorch_model.bin cannot be read"):
            load(target, tmp_path)
        assert not (tmp_path / "harm").exists()

    def test_of_no_known_kind(self, target, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(dict(architectures=["Medusa"])))
        save_file({f"medusa.{i}.weight": torch.zeros(1) for i in range(12)},
                  tmp_path / "model.safetensors")  # fmt: skip
        with pytest.raises(
            ValueError, match=r"no draft of a known kind .*Medusa.*medusa\.0\.weight.* and 4 more"
        ):
            load(target, tmp_path)

    def test_of_another_type(self, target):
        with pytest.raises(TypeError, match="draft must be .* got float"):
            load(target, 0.5)

    @pytest.mark.parametrize("dialect", ["eagle1", "eagle1-qwen2"])
    def test_a_causal_lm_that_lacks_weights(self, target, dialect, tmp_path):
        """As an EAGLE-1 head without fc looks like one; random ones would not do."""
        made = make(dialect)
        del made.tensors["fc.weight"]
        made.tensors.pop("fc.bias", None)
        with pytest.raises(ValueError, match=r"no causal LM in .*missing .*lm_head.weight"):
            load(target, made.write(tmp_path))

    def test_a_causal_lm_of_another_vocabulary(self, target, tmp_path):
        tiny_model("llama", vocab_size=VOCAB + 5).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="vocabulary has 97 entries, the draft's 102"):
            load(target, tmp_path)


class TestBrokenHeads:
    """Every dialect, broken in every way: the error names what is wrong."""

    @pytest.mark.parametrize("dialect", DIALECTS)
    def test_missing_unknown_and_misshapen_tensors(self, target, dialect, tmp_path):
        made = make(dialect)
        gone = next(n for n in made.tensors if n.endswith("mlp.up_proj.weight"))
        wrong = next(n for n in made.tensors if n.endswith("self_attn.o_proj.weight"))
        shape = list(made.tensors[wrong].shape)
        made.tensors["medusa_head.weight"] = made.tensors.pop(gone)
        made.tensors[wrong] = torch.zeros(3, 5)
        with pytest.raises(ValueError) as error:
            load(target, made.write(tmp_path))
        text = str(error.value)
        assert str(tmp_path) in text and "unknown medusa_head.weight" in text
        assert f"missing {made.names.get(gone, gone).removeprefix('model.')}" in text
        assert f"{wrong} is [3, 5], expected {shape}" in text

    @pytest.mark.sweep(14)
    @pytest.mark.parametrize("dialect", DIALECTS)
    def test_every_tensor_is_needed(self, target, dialect, tmp_path):
        """But for what only training reads, what the target's may stand in for, and switches."""
        made = make(dialect)
        free = ("t2d", "embed_tokens.weight", ".bias", "q_norm.weight", "k_norm.weight",
                "input_norm.weight", "embed_norm.weight", "pre_lm_head_layernorm.weight",
                "embedding_layernorm.weight", "transformer.input_layernorm.weight")  # fmt: skip
        for i, name in enumerate(made.tensors):
            if name.endswith(free) and not (dialect == "eagle1" and name == "fc.bias"):
                continue
            if dialect == "eagle3-vllm" and name == "lm_head.weight":
                continue
            if dialect.startswith("eagle1") and name.endswith("fc.weight"):
                continue  # nothing tells of EAGLE then
            if dialect == "eagle3-sglang-two-layers" and name == "layers.1.hidden_norm.weight":
                continue
            broken = make(dialect)
            del broken.tensors[name]
            plain = made.names.get(name, name).removeprefix("model.")
            with pytest.raises(ValueError, match=f"(missing|no) .*{plain}|no fc"):
                load(target, broken.write(tmp_path / str(i)))

    @pytest.mark.parametrize("dialect", DIALECTS)
    def test_a_target_of_another_width(self, dialect, tmp_path):
        other = tiny_model("llama", num_hidden_layers=LAYERS, hidden_size=48)
        with pytest.raises(ValueError, match="target of hidden_size 32, this one has 48"):
            load(other, make(dialect).write(tmp_path))

    @pytest.mark.parametrize("dialect", DIALECTS)
    def test_a_target_of_another_vocabulary(self, dialect, tmp_path):
        other = tiny_model("llama", num_hidden_layers=LAYERS, vocab_size=VOCAB + 1)
        with pytest.raises(ValueError, match="made for a vocabulary of 97, the target has 98"):
            load(other, make(dialect).write(tmp_path))

    @pytest.mark.parametrize(
        "dialect", ["eagle3", "eagle3-specforge", "eagle3-vllm", "eagle3-speculators"]
    )
    def test_a_target_of_another_depth(self, dialect, tmp_path):
        other = tiny_model("llama", num_hidden_layers=2)
        with pytest.raises(ValueError, match="a target of 2 layers has none of index"):
            load(other, make(dialect).write(tmp_path))

    @pytest.mark.parametrize("dialect", DIALECTS)
    @pytest.mark.parametrize("change", [dict(head_dim=12), dict(head_dim=520),
                                        dict(num_key_value_heads=3)], ids=str)  # fmt: skip
    def test_attention_that_no_kernel_takes(self, target, dialect, change, tmp_path):
        """Refused when it is loaded, not in the first generation."""
        made = make(dialect)
        made.config.get("transformer_layer_config", made.config).update(change)
        heads, kv, dim = 4, change.get("num_key_value_heads", 2), change.get("head_dim", 8)
        for name, tensor in made.tensors.items():
            shape = list(tensor.shape)
            if "q_proj" in name:
                shape[0] = heads * dim
            elif "k_proj" in name or "v_proj" in name:
                shape[0] = kv * dim
            elif "o_proj" in name:
                shape[1] = heads * dim
            elif "q_norm" in name or "k_norm" in name:
                shape[0] = dim
            made.tensors[name] = torch.ones(shape, dtype=tensor.dtype)
        with pytest.raises(ValueError, match="EAGLE head .* attention cannot be computed: .* head"):
            load(target, made.write(tmp_path))

    @pytest.mark.parametrize("dim", [12, 520])
    def test_models_that_no_kernel_takes(self, target, dim):
        small = tiny_model("llama", head_dim=dim)
        for models in ((small, None), (small, "self"), (target, small)):
            with pytest.raises(UnsupportedModelError, match=f"multiple of 8 in .* got {dim}"):
                SpecExtend(*models)

    @pytest.mark.parametrize("dialect", DIALECTS)
    def test_a_configuration_without_its_fields(self, target, dialect, tmp_path):
        made = make(dialect)
        fields = made.config.get("transformer_layer_config", made.config)
        del fields["hidden_size"], fields["vocab_size"]
        with pytest.raises(ValueError, match="config.json has no hidden_size, vocab_size"):
            load(target, made.write(tmp_path))

    def test_vocabulary_tables(self, target, tmp_path):
        made = make("eagle3")
        made.tensors["d2t"][-1] += 97
        with pytest.raises(ValueError, match=r"d2t.* different ids in \[0, 97\)"):
            load(target, made.write(tmp_path))
        made.tensors["d2t"] = -torch.arange(40)
        with pytest.raises(ValueError, match="1 different ones of 40"):
            load(target, made.write(tmp_path))
        del made.tensors["d2t"]
        with pytest.raises(ValueError, match="missing d2t"):
            load(target, made.write(tmp_path))

    def test_no_embedding_for_another_width(self, target, tmp_path):
        made = make("eagle3-other-width")
        del made.tensors["embed_tokens.weight"]
        with pytest.raises(ValueError, match="no embed_tokens.weight, and the target's does not"):
            load(target, made.write(tmp_path))

    @pytest.mark.parametrize("dialect", ["eagle1", "eagle3", "eagle3-speculators"])
    def test_quantised_tensors(self, target, dialect, tmp_path):
        made = make(dialect)
        name = next(n for n in made.tensors if n.endswith("q_proj.weight"))
        made.tensors[name] = made.tensors[name].to(torch.int8)
        with pytest.raises(ValueError, match="q_proj.weight is torch.int8, floating point"):
            load(target, made.write(tmp_path))

    def test_unknown_rotary_embedding(self, target, tmp_path):
        for rope in (dict(rope_type="spiral"), dict(rope_type="yarn")):
            made = make("eagle3")
            made.config["rope_scaling"] = rope
            with pytest.raises(ValueError, match="EAGLE head .* rotary embedding .* is not known"):
                load(target, made.write(tmp_path))

    @pytest.mark.parametrize("dialect", DIALECTS)
    def test_rotary_embeddings_that_change_with_the_length(self, target, dialect, tmp_path):
        factors = dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4)
        for rope in (
            dict(type="dynamic", factor=2.0),
            dict(rope_type="longrope", original_max_position_embeddings=64, **factors),
        ):
            made = make(dialect)
            made.config.get("transformer_layer_config", made.config)["rope_parameters"] = rope
            with pytest.raises(ValueError, match="EAGLE head .*'(dynamic|longrope)' .* changes"):
                load(target, made.write(tmp_path))

    def test_the_same_tensor_twice(self, target, tmp_path):
        made = make("eagle3-specforge")
        made.tensors["layers.0.hidden_norm.weight"] = torch.ones(32)
        with pytest.raises(ValueError, match="midlayer.hidden_norm.weight .*are the same tensor"):
            load(target, made.write(tmp_path))
