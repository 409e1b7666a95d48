"""Rotary embeddings whose factors depend on the length of a forward: the text is generate's."""

from __future__ import annotations

import threading
from functools import cache

import pytest
import torch
from models import prompt, tiny_model
from tape import Tapes
from transformers import PreTrainedModel

from specextend import SpecExtend
from specextend.guard import check_length
from specextend.longrope import drops_cache, longrope_edge
from specextend.rotary import probe_rotary

EDGE, NEW = 32, 14
LENGTHS = (EDGE - NEW - 2, EDGE - NEW, EDGE - NEW + 1, EDGE - 5, *range(EDGE - 2, EDGE + 4), 70)


@cache
def model_of(family: str, seed: int = 0) -> PreTrainedModel:
    """Make a model with short factors up to EDGE tokens, and long ones beyond."""
    rope = dict(
        rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=EDGE,
        short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[3.0, 5.0, 7.0, 9.0],
    )  # fmt: skip
    if family == "phimoe":
        rope |= dict(short_mscale=1.1, long_mscale=1.4)
    own = dict(original_max_position_embeddings=EDGE) if family == "phi3" else {}
    return tiny_model(family, seed, rope_parameters=rope, **own)


@cache
def theirs(family: str, length: int, padding: int = 0) -> torch.Tensor:
    ids, mask = given(length, padding)
    options = dict(attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    return model_of(family).generate(ids, **options)


def followed(family: str) -> bool:
    """Tell whether a text may grow over the edge: `transformers` 5.17 drops the cache of Phi-3
    there, and reads one token without it."""
    return drops_cache(model_of(family), EDGE) is not None


def given(length: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.cat([torch.zeros(1, padding, dtype=torch.int64), prompt(length)], 1)
    return ids, (torch.arange(padding + length) >= padding).long()[None]


def assert_theirs(spec: SpecExtend, family: str, length: int, padding: int = 0) -> None:
    """Write it behind a short and behind a long forward, which leave factors in buffers."""
    if length <= EDGE < length + NEW and not followed(family):
        with pytest.raises(ValueError, match="longrope rotary embedding changes at 32 tokens"):
            spec.generate(prompt(length), max_new_tokens=NEW, do_sample=False)
        return
    expected = theirs(family, length, padding)
    ids, mask = given(length, padding)
    for left in (4, 80):
        with torch.inference_mode():
            spec.model(prompt(left))
        out = spec.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(out, expected), (length, padding, left)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("chunk", [None, 1, 7, EDGE])
@pytest.mark.parametrize("family", ["phi3", "phimoe", "llama"])
def test_lengths_and_chunks(family, chunk):
    spec = SpecExtend(model_of(family), None, prefill_chunk=chunk)
    for length in LENGTHS:
        assert_theirs(spec, family, length)


DRAFTS = {
    "ngram": ("ngram", {}),
    "itself": ("model", dict(draft_cache="full")),
    "window": ("model", dict(draft_cache="window")),
    "retrieval": ("other", dict(draft_cache="retrieval")),
    "self": ("self", dict(draft_cache="retrieval")),
}
CONFIG = dict(
    gate="off", tree_nodes=8, tree_depth=4, prefill_chunk=7, seed=0, chunk_size=4, budget=16,
    recent_chunks=1, retrieve_every=1, draft_prefill_window=16,
)  # fmt: skip


def drafted(family: str, name: str, **options) -> SpecExtend:
    draft, more = DRAFTS[name]
    models = dict(model=model_of(family), other=model_of(family, seed=1))
    return SpecExtend(model_of(family), models.get(draft, draft), **CONFIG, **more, **options)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_drafts(family, draft):
    spec = drafted(family, draft)
    for length in LENGTHS:
        assert_theirs(spec, family, length)


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_padding(family):
    """Phi-3 reads anew when the padded text passes the edge, which is then too early."""
    spec = drafted(family, "itself")
    for padding in (1, 20):
        for length in LENGTHS[1::2]:
            assert_theirs(spec, family, length, padding)


@pytest.mark.parametrize("way", ["generate", "stream", "custom_generate"])
def test_ways_in(way):
    spec = drafted("phi3", "itself")
    for length in (EDGE - 5, EDGE + 1, 70) if followed("phi3") else (EDGE + 1, 70):
        ids, options = prompt(length), dict(max_new_tokens=NEW, do_sample=False)
        if way == "generate":
            out = spec.generate(ids, **options)[0, length:].tolist()
        elif way == "stream":
            out = [t for step in spec.stream(ids, **options) for t in step.tokens]
        else:
            out = spec.model.generate(ids, custom_generate=spec, **options)[0, length:].tolist()
        assert out == theirs("phi3", length)[0, length:].tolist()


def test_sampling():
    options = dict(max_new_tokens=NEW, do_sample=True, top_k=0)
    plain, spec = (SpecExtend(model_of("phi3"), None, seed=0), drafted("phi3", "itself"))
    for length in LENGTHS if followed("phi3") else (EDGE + 1, 70):
        ids = prompt(length)
        assert torch.equal(spec.generate(ids, **options), plain.generate(ids, **options))


def test_captured_drafts():
    """A tree is not launched ahead over the edge."""
    tapes = Tapes()
    with pytest.warns(RuntimeWarning, match="longrope"):
        spec = SpecExtend(model_of("phi3"), tiny_model("llama", 1), recorder=tapes, **CONFIG)
        for length in LENGTHS[1::2]:
            assert_theirs(spec, "phi3", length)
    assert any(tape.replays for tape in tapes)


@pytest.mark.parametrize("length", [EDGE - NEW, EDGE + 1, 70])
def test_a_draft_sees_the_factors_of_the_text(length):
    """One that is the target proposes what the target writes."""
    spec = drafted("phi3", "itself", tree_shape="fixed", tree_widths=(1, 1, 1, 1))
    spec.generate(prompt(length), max_new_tokens=NEW, do_sample=False)
    assert spec.stats.acceptance_histogram[4] == 2, spec.stats


def test_keys_are_moved_by_the_angles_of_the_text():
    rotary = probe_rotary(model_of("phi3"))
    assert rotary.edge == EDGE
    assert torch.equal(rotary.at(EDGE), rotary.inv_freq)
    ratio = rotary.at(EDGE) / rotary.at(EDGE + 1)
    torch.testing.assert_close(ratio[0], torch.tensor([3.0, 5 / 1.1, 7 / 1.2, 9 / 1.3]))


def test_what_generate_does_at_the_edge():
    assert drops_cache(model_of("llama"), EDGE) is False
    for family in ("phi3", "phimoe"):
        assert drops_cache(model_of(family), EDGE) or not followed(family)
    assert longrope_edge(model_of("phi3")) == EDGE and longrope_edge(tiny_model("llama")) is None


def test_what_cannot_be_followed_is_refused(monkeypatch):
    model = model_of("llama")
    check_length(model, EDGE, EDGE + 1)
    monkeypatch.setattr("specextend.guard.drops_cache", lambda *_: None)
    with pytest.raises(ValueError, match="longrope rotary embedding changes at 32 tokens, inside"):
        check_length(model, EDGE, EDGE + 1)
    check_length(model, EDGE + 1, EDGE + 9)
    check_length(model, EDGE, EDGE + 1, role="draft")


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_short_and_long_beside_each_other(kind):
    """They share the buffers of one model."""
    if kind == "longrope":
        model = model_of("phi3")
    else:
        rope = dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0)
        model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=EDGE)
    spec = SpecExtend(model, None, prefill_chunk=7)
    short, options = prompt(EDGE - 8), dict(max_new_tokens=6, do_sample=False)
    expected, inside, done = spec.generate(short, **options), threading.Event(), threading.Event()
    assert torch.equal(model.generate(short, **options), expected)

    def long():
        with torch.inference_mode():
            while not done.is_set():
                model(prompt(70))
                inside.set()

    thread = threading.Thread(target=long)
    thread.start()
    inside.wait()
    outs = [spec.generate(short, **options) for _ in range(10)]
    done.set()
    thread.join()
    assert all(torch.equal(out, expected) for out in outs)
    rotary = model.model.rotary_emb
    assert "forward" not in vars(rotary)
    left = rotary.inv_freq.clone()
    assert not torch.equal(left, rotary.original_inv_freq)
    spec.generate(short, **options)
    assert torch.equal(left, rotary.inv_freq)  # a pass works on a copy of it
