"""Every family of `transformers` writes its own text, or is refused for a true reason."""

from __future__ import annotations

import pytest
import torch
from drafts import KINDS, SMALL, WAYS, Oracle, draft, write
from families import FAMILIES, WINDOW, NotInMiniature, miniature
from models import prompt
from transformers import AutoModelForImageTextToText

from specextend import SpecExtend, UnsupportedModelError
from specextend.guard import position_limit
from tools import models_page

NEW = 24
#: Families of today, and one of each kind of layer; all of them are served.
SERVED = (
    "bamba", "deepseek_v2", "deepseek_v3", "falcon_h1", "falcon_mamba", "gemma3n_text", "gemma4",
    "gemma4_text", "glm4_moe_lite", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "llama4",
    "llama4_text", "mamba2", "minicpm3", "minimax", "nemotron_h", "olmo_hybrid", "phimoe",
    "qwen3_5", "qwen3_5_moe", "qwen3_next", "zamba",
)  # fmt: skip
#: why a family may be refused
REASONS = (
    "asked for attention", "is sparse by an index", "a trial forward failed", "a small tree differ",
    "whose states do not go through its cache", "but generate keeps the last", "it keeps what a",
    "of which its own class of caches does not know",
)  # fmt: skip


def own_text(model, ids: torch.Tensor, count: int = NEW) -> list[int]:
    return model.generate(ids, max_new_tokens=count, do_sample=False)[0].tolist()


def assert_same_text(model, length: int, **options) -> None:
    """Compare plain decoding, and decoding with trees that are right to some node."""
    ids = prompt(length)
    want = own_text(model, ids)
    for proposes in (None, Oracle(want, SMALL)):
        spec = SpecExtend(model, proposes, SMALL, **options)
        out = spec.generate(ids, max_new_tokens=NEW, do_sample=False)
        assert out[0].tolist() == want, (length, options)
    assert spec.stats.mean_acceptance_length > 1.5


@pytest.mark.sweep(2)
@pytest.mark.parametrize("family", SERVED)
def test_text(family):
    """Prompts of one token, up to a border and over it; any size of chunks of the prompt."""
    model = miniature(family)
    for length, chunk in ((1, None), (2, 1), (WINDOW - 1, 5), (WINDOW, None), (61, 13), (61, 60)):
        assert_same_text(model, length, prefill_chunk=chunk)


@pytest.mark.long
@pytest.mark.parametrize("family", SERVED)
def test_text_at_every_length(family):
    """Contexts of 1 to 1,000 tokens, begun anywhere."""
    model = miniature(family, max_position_embeddings=2048)
    lengths = [*range(1, 60), 127, 128, 129, 255, 256, 500, 973]
    limit = position_limit(model) or 1000  # of a model with parts the option does not reach it
    for length in (x for x in lengths if x + NEW <= limit):
        assert_same_text(model, length, prefill_chunk=(None, 1, 2, 3, 7, 16, 64)[length % 7])


@pytest.mark.sweep(3)
@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("by", ["ngram", "oracle"])
def test_sampled_text(family, by):
    """It is that without a draft, token by token; by every way in."""
    model, ids = miniature(family), prompt(30)
    how = dict(max_new_tokens=NEW, do_sample=True, temperature=0.8, top_k=20)
    want = SpecExtend(model, None, SMALL).generate(ids, **how)[0].tolist()
    for way in WAYS:
        spec = SpecExtend(model, "ngram" if by == "ngram" else Oracle(want, SMALL), SMALL)
        assert write(spec, way, ids, **how) == want[30:]


#: one of each kind of layer, and drafts that do not serve it, with a part of the reason
_MOVED = "does not carry positions as rotary embeddings that could be moved"
_STATES = "have no part of their state to leave out"
DRAFTS = {
    "deepseek_v3": {"self": _MOVED, "longspec": "needs a target whose keys carry rotary"},
    "gemma4_text": {"self": _MOVED, "longspec": "differ in theirs"},
    "llama4_text": {"self": _MOVED, "longspec": "needs a target whose keys carry rotary"},
    "phimoe": {},
    "qwen3_next": {"self": _STATES},
    "falcon_h1": {"self": _STATES},
    "lfm2": {"self": _STATES},
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
@pytest.mark.parametrize("family", DRAFTS)
def test_drafts_of_every_kind(family, kind, tmp_path):
    """Greedy and sampled text is that without a draft; or the draft is refused with a reason."""
    model, ids = miniature(family), prompt(61)
    how = dict(max_new_tokens=NEW, do_sample=True, temperature=0.8)
    want = SpecExtend(model, None, SMALL).generate(ids, **how)[0].tolist()
    refused = DRAFTS[family].get(kind)
    if refused is not None:
        with pytest.raises(ValueError, match=refused):
            SpecExtend(model, draft(kind, SMALL, tmp_path, model), SMALL)
        return
    spec = SpecExtend(model, draft(kind, SMALL, tmp_path, model), SMALL)
    assert spec.generate(ids, **how)[0].tolist() == want
    greedy = spec.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert greedy[0].tolist() == own_text(model, ids)


SEEING = ("gemma3", "gemma4", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")


@pytest.mark.sweep(3)
@pytest.mark.parametrize("family", SEEING)
def test_text_alone_of_models_that_see(family):
    assert_same_text(miniature(family, auto=AutoModelForImageTextToText), 61)


def test_a_model_that_sees_is_refused_with_the_class_to_load():
    """Llama 4's own forward needs images in some versions; in others it is served."""
    model = miniature("llama4", auto=AutoModelForImageTextToText)
    try:
        own_text(model, prompt(3), 2)
    except AttributeError:
        with pytest.raises(UnsupportedModelError, match=r"Llama4ForCausalLM\.from_pretrained"):
            SpecExtend(model, None, SMALL)
    else:
        assert_same_text(model, 61)


def test_the_page_has_the_table_of_the_records():
    text = models_page.PAGE.read_text()
    assert models_page.page(text) == text
    for family in SERVED:
        assert f"| {family} |" in text


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    try:
        model = miniature(family)
        own_text(model, prompt(3), 2)
    except NotInMiniature as reason:
        pytest.skip(str(reason))
    except Exception as error:
        pytest.skip(f"generate itself fails: {error!r}")
    try:
        for length in (1, 6, 90):
            assert_same_text(model, length)
    except UnsupportedModelError as refusal:
        assert any(reason in str(refusal) for reason in REASONS), refusal
