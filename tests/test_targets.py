"""Targets as users have them: with adapters, quantised, compiled, spread over devices."""

from __future__ import annotations

import copy

import pytest
import torch
from drafts import SMALL, WAYS, draft
from models import prompt, tiny_model

from specextend import SpecExtend

GREEDY = dict(max_new_tokens=20, do_sample=False)
KINDS = ("none", "ngram", "self", "model")

# Of libraries that call what transformers has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def assert_same_text(model, kinds=KINDS, ways=("generate",), config=SMALL):
    """Compare with the model's own ``generate``, by every way in."""
    ids = prompt(50)
    expected = model.generate(input_ids=ids, **GREEDY)
    for kind in kinds:
        spec = SpecExtend(model, draft(kind), config)
        for way in ways:
            if way == "custom_generate":
                out = model.generate(input_ids=ids, custom_generate=spec, **GREEDY)
            elif way == "stream":
                steps = spec.stream(ids, **GREEDY)
                out = torch.cat([ids, torch.tensor([[t for s in steps for t in s.tokens]])], 1)
            else:
                out = spec.generate(ids, **GREEDY)
            assert torch.equal(out, expected), (kind, way)
    return expected


# ---- adapters ------------------------------------------------------------------------------------


def lora(name="default", seed=0, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options
    )
    return peft, config, name


@pytest.mark.parametrize("options", [{}, dict(use_dora=True)], ids=["lora", "dora"])
def test_adapters(options):
    """Active, disabled, switched between two calls of one SpecExtend, merged."""
    peft, config, _ = lora(**options)
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    base = tiny_model("llama").generate(prompt(50), **GREEDY)
    first = assert_same_text(model, ways=WAYS)
    assert not torch.equal(first, base)
    torch.manual_seed(9)
    model.add_adapter("other", copy.deepcopy(config))
    specs = [SpecExtend(model, draft(kind), SMALL) for kind in KINDS]
    model.set_adapter("other")
    second = assert_same_text(model)
    assert not torch.equal(second, first)
    for spec in specs:
        assert torch.equal(spec.generate(prompt(50), **GREEDY), second)
        with model.disable_adapter():
            assert torch.equal(spec.generate(prompt(50), **GREEDY), base)
        model.set_adapter("default")
        assert torch.equal(spec.generate(prompt(50), **GREEDY), first)
        model.set_adapter("other")
    assert_same_text(model.merge_and_unload())


def test_adapters_of_transformers_own():
    """``model.add_adapter`` puts them into the model itself."""
    _, config, _ = lora()
    model = tiny_model("llama")
    base = model.generate(prompt(50), **GREEDY)
    try:
        model.add_adapter(config)
    except ValueError as error:  # each wants a version of the other
        pytest.skip(str(error))
    assert not torch.equal(assert_same_text(model, ways=WAYS), base)
    model.disable_adapters()
    assert torch.equal(assert_same_text(model), base)


def test_adapters_of_a_draft():
    peft, config, _ = lora()
    other = peft.get_peft_model(tiny_model("llama"), config).eval()
    spec = SpecExtend(tiny_model("llama"), other, SMALL, draft_cache="full")
    out = spec.generate(prompt(50), **GREEDY)
    assert torch.equal(out, tiny_model("llama").generate(prompt(50), **GREEDY))
    with other.disable_adapter():
        spec.generate(prompt(50), **GREEDY)
        assert spec.stats.mean_acceptance_length > 2


def test_adapters_before_the_prompt_are_refused():
    peft = pytest.importorskip("peft")
    for config in (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ):
        model = peft.get_peft_model(tiny_model("llama"), config).eval()
        with pytest.raises(ValueError, match="'default' .*before the prompt"):
            SpecExtend(model, None, SMALL)


def test_adapters_that_begin_in_the_middle_are_refused():
    """Also where one is added behind the constructor."""
    peft, config, _ = lora()
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    spec = SpecExtend(model, None, SMALL)
    later = copy.deepcopy(config)
    later.alora_invocation_tokens = [5, 6]
    model.peft_config["later"] = later
    for act in (lambda: SpecExtend(model, None), lambda: spec.generate(prompt(9), **GREEDY)):
        with pytest.raises(ValueError, match=r"'later' \(aLoRA\) begins"):
            act()


# ---- compiled ------------------------------------------------------------------------------------


def test_a_compiled_wrapper():
    """``generate`` of it runs the model inside, and so does this."""
    model = torch.compile(tiny_model("llama"))
    ids, spec = prompt(50), SpecExtend(model, draft("model"), SMALL)
    expected = tiny_model("llama").generate(ids, **GREEDY)
    assert torch.equal(spec.generate(ids, **GREEDY), expected)


@pytest.mark.long
def test_compiled_in_place():
    model = tiny_model("llama")
    model.compile()
    assert_same_text(model)


# ---- quantised -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchao_weight_only(dtype):
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model("llama", dtype=dtype)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    if dtype == torch.float32:
        assert_same_text(model, ways=WAYS)
    else:  # other kernels round otherwise than generate's; without a draft they are the same
        plain = SpecExtend(model, None, SMALL).generate(prompt(50), **GREEDY)
        assert plain.shape == (1, 70)


class ByCall(torch.nn.Linear):
    """Rounds its input to 8 bits by the largest element of a call, whatever rows it has."""

    def forward(self, x):
        scale = x.abs().amax() / 127
        return super().forward((x / scale).round() * scale)


def test_rounding_inside_is_the_reason():
    model = tiny_model("llama")
    for module in list(model.modules()):
        if type(module) is torch.nn.Linear:
            module.__class__ = ByCall
    with pytest.raises(ValueError, match="its own move by .* no two ways of computing them agree"):
        SpecExtend(model, None, SMALL)
    assert not model.get_input_embeddings()._forward_hooks


def test_something_else_is_refused():
    with pytest.raises(TypeError, match="model must be a transformers model, got Linear"):
        SpecExtend(torch.nn.Linear(2, 2))
