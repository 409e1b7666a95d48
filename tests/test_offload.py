"""Models whose weights accelerate keeps elsewhere, and autocast around a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from eagle_heads import make
from models import prompt, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from specextend import SpecExtend
from specextend.attention import device_of

accelerate = pytest.importorskip("accelerate")

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
CPU, HOW = torch.device("cpu"), dict(max_new_tokens=12, do_sample=False)


def on_disk(*parts: str) -> Callable[[PreTrainedModel, Path], PreTrainedModel]:
    """Keep these parts of a model on the disk."""
    places = {part: "disk" if part in parts else "cpu" for part in (*PARTS, "model.rotary_emb")}

    def move(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        return accelerate.dispatch_model(
            model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
        )

    return move


def loaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Load a checkpoint onto the disk."""
    model.save_pretrained(folder / "checkpoint")
    places = dict.fromkeys(PARTS, "disk") | {"model.layers.0": "cpu", "model.rotary_emb": "cpu"}
    return AutoModelForCausalLM.from_pretrained(
        folder / "checkpoint", device_map=places, offload_folder=folder / "weights"
    )


PLACES = {
    "a layer": on_disk("model.layers.1"),
    "the embedding": on_disk("model.embed_tokens"),
    "the head": on_disk("lm_head"),
    "nearly all": on_disk(*PARTS[1:]),
    "all": lambda m, folder: accelerate.disk_offload(m, str(folder), execution_device=CPU),
    "buffers, too": lambda m, folder: accelerate.disk_offload(
        m, str(folder), execution_device=CPU, offload_buffers=True
    ),
    "memory": lambda m, folder: accelerate.cpu_offload(m, execution_device=CPU),
    "loaded": loaded,
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("draft", [None, "ngram", "self", "model"])
def test_offloaded_targets(place, draft, tmp_path):
    ids, expected = prompt(40), tiny_model().generate(prompt(40), **HOW)
    model = PLACES[place](tiny_model(), tmp_path)
    model.generation_config.eos_token_id = None
    assert device_of(model) == CPU
    source = tiny_model(seed=1) if draft == "model" else draft
    spec = SpecExtend(model, source, seed=0, gate="off", prefill_chunk=16)
    assert torch.equal(spec.generate(ids, **HOW), expected)
    assert torch.equal(model.generate(ids, custom_generate=spec, **HOW), expected)
    assert torch.equal(model.generate(ids, **HOW), expected)


def test_offloaded_drafts(tmp_path):
    target, draft = tiny_model(), PLACES["all"](tiny_model(seed=1), tmp_path)
    spec = SpecExtend(target, draft, seed=0, gate="off")
    assert torch.equal(spec.generate(prompt(40), **HOW), target.generate(prompt(40), **HOW))


@pytest.mark.parametrize("dialect", ["eagle3", "eagle1"])
def test_heads_of_an_offloaded_target(dialect, tmp_path):
    size = dict(num_hidden_layers=5)
    expected = tiny_model(**size).generate(prompt(40), **HOW)
    model = accelerate.disk_offload(tiny_model(**size), str(tmp_path), execution_device=CPU)
    folder = make(dialect).write(tmp_path / "head")
    spec = SpecExtend(model, folder, seed=0, gate="off")
    assert torch.equal(spec.generate(prompt(40), **HOW), expected)


def test_offloaded_longrope(tmp_path):
    """Its buffers come from the disk for every forward."""
    rope = dict(
        rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=32,
        short_factor=[1.0] * 4, long_factor=[4.0] * 4,
    )  # fmt: skip
    made = [tiny_model("phi3", rope_parameters=rope) for _ in range(2)]
    model = PLACES["buffers, too"](made[1], tmp_path)
    spec = SpecExtend(model, None, prefill_chunk=16)
    assert torch.equal(spec.generate(prompt(40), **HOW), made[0].generate(prompt(40), **HOW))


class TestAutocast:
    """An error that names it, before anything is written."""

    def test_around_the_constructor(self):
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises(RuntimeError, match="torch.autocast computes in torch.bfloat16"):
                SpecExtend(tiny_model())

    @pytest.mark.parametrize("draft", [None, "ngram", "self"])
    def test_around_a_generation(self, draft):
        spec = SpecExtend(tiny_model(), draft, seed=0)
        ids, expected = prompt(40), spec.generate(prompt(40), **HOW)
        for way in (lambda: spec.generate(ids, **HOW), lambda: next(spec.stream(ids, **HOW))):
            with torch.autocast("cpu", torch.bfloat16):
                with pytest.raises(RuntimeError, match="leave its block, or load the model in"):
                    way()
            assert torch.equal(spec.generate(ids, **HOW), expected)

    def test_in_the_middle_of_a_stream(self):
        """It can go on behind the block."""
        spec = SpecExtend(tiny_model(), None)
        steps, tokens = spec.stream(prompt(40), **HOW), []
        tokens += next(steps).tokens
        with torch.autocast("cpu", enabled=False):
            tokens += next(steps).tokens
        tokens += [t for step in steps for t in step.tokens]
        assert tokens == spec.generate(prompt(40), **HOW)[0, 40:].tolist()
