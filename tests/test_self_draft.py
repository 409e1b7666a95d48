"""Tests the target as its own draft: losslessness, full depth, its working cache."""

from __future__ import annotations

import pytest
import torch
from generations import scripted
from models import prompt, tiny_model
from tape import Tapes

from specextend import SpecConfig, SpecExtend
from specextend.draft.working_cache import WorkingCache

SMALL = SpecConfig(
    chunk_size=8, budget=32, sink_chunks=1, recent_chunks=1, retrieve_every=2, prefill_chunk=40,
    gate="off", tree_nodes=6, tree_depth=3, tree_width=2, tree_top_k=2, tree_threshold=0.0, seed=7,
)  # fmt: skip


@pytest.fixture(scope="module")
def target():
    return tiny_model("llama")


def greedy(model, ids, n=40, **kwargs):
    return model.generate(ids, max_new_tokens=n, do_sample=False, **kwargs)


class TestLossless:
    @pytest.mark.sweep(5)
    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi", "gpt_oss", "glm4"])
    def test_greedy_families(self, family):
        model, ids = tiny_model(family), prompt(90)
        expected = greedy(model, ids, 20)
        for draft_cache in ("retrieval", "window"):
            spec = SpecExtend(model, "self", SMALL, draft_cache=draft_cache)
            assert torch.equal(spec.generate(ids, max_new_tokens=20, do_sample=False), expected)
            assert spec.stats.num_draft_tokens > 0

    @pytest.mark.parametrize("length", [1, 2, 33, 200])
    @pytest.mark.parametrize("shape", ["opt", "fixed"])
    def test_lengths(self, target, length, shape):
        ids = prompt(length)
        spec = SpecExtend(target, "self", SMALL, tree_shape=shape, tree_widths=(2, 2))
        assert torch.equal(
            spec.generate(ids, max_new_tokens=24, do_sample=False), greedy(target, ids, 24)
        )

    def test_sampled(self, target):
        ids = prompt(90)
        options = dict(max_new_tokens=20, do_sample=True, temperature=0.7, top_p=0.9)
        plain = SpecExtend(target, None, SMALL).generate(ids, **options)
        for draft_cache in ("retrieval", "window"):
            spec = SpecExtend(target, "self", SMALL, draft_cache=draft_cache)
            assert torch.equal(spec.generate(ids, **options), plain)

    def test_gate(self, target):
        """Rests of the gate: many tokens that the working cache has not seen."""
        depths = [2] * 3 + [0] * 50 + [2] * 3 + [0] * 3 + [2] * 500
        spec = SpecExtend(target, "self", SMALL, generation=scripted(depths))
        ids = prompt(60)
        out = spec.generate(ids, max_new_tokens=150, do_sample=False)
        assert torch.equal(out, greedy(target, ids, 150))
        assert spec.stats.num_plain_rounds > 50


@pytest.mark.parametrize("draft_cache", ["retrieval", "window"])
def test_a_cache_that_holds_everything_accepts_to_full_depth(target, draft_cache):
    config = SMALL.replace(
        draft_cache=draft_cache, budget=160, tree_shape="top_k", tree_nodes=4, tree_depth=4,
        tree_width=1, tree_top_k=1,
    )  # fmt: skip
    spec = SpecExtend(target, "self", config)
    spec.generate(prompt(60), max_new_tokens=41, do_sample=False)
    assert spec.stats.acceptance_histogram == {4: 8}


def test_working_cache_has_the_targets_keys(target, monkeypatch):
    """Behind every gather and every copy: the target's values, and its keys where they stay."""
    config = SMALL.replace(retrieve_every=3)
    spec = SpecExtend(target, "self", config)
    refill, grow = WorkingCache.refill, WorkingCache.grow
    state = {"rows": [], "checks": 0}

    def refilling(self, scores=None):
        ids = refill(self, scores)
        chosen = [i for i in ids[0].tolist() if i >= 0]
        rows = [r for i in chosen for r in range(8 * i, min(8 * i + 8, self.full.length))]
        state.update(rows=rows, length=self.full.length)
        return ids

    def growing(self, level, mask, num_keys):
        if level == 0:
            full, work = self.full, self.work
            rows = state["rows"] + list(range(state.get("length", 0), full.length))
            assert len(rows) + 1 == int(work.lens)  # and the root
            recent = [j for j, row in enumerate(rows) if full.length - row == len(rows) - j]
            for ours, theirs in zip(work.layers, full.layers, strict=True):
                n = len(rows)
                assert torch.equal(ours.values[:, :, :n], theirs.values[:, :, rows])
                at = [rows[j] for j in recent]
                assert torch.equal(ours.keys[:, :, recent], theirs.keys[:, :, at])
            state["checks"] += 1
        return grow(self, level, mask, num_keys)

    monkeypatch.setattr(WorkingCache, "refill", refilling)
    monkeypatch.setattr(WorkingCache, "grow", growing)
    spec.generate(prompt(100), max_new_tokens=40, do_sample=False)
    assert state["checks"] > 20 and spec.stats.num_retrievals > 3  # trees of one level do not grow


def test_generations_do_not_know_each_other(target):
    spec = SpecExtend(target, "self", SMALL)

    def steps(spec, ids):
        return [
            (s.tokens, s.num_accepted) for s in spec.stream(ids, max_new_tokens=14, do_sample=False)
        ]

    first = steps(spec, prompt(200))
    short = steps(spec, prompt(20))
    assert steps(spec, prompt(200)) == first
    assert steps(SpecExtend(target, "self", SMALL), prompt(20)) == short


def test_other_options_on_the_same_weights(target):
    draft = SpecExtend(target, "self", SMALL).draft
    other = draft.with_config(SMALL.replace(draft_cache="window"))
    assert type(other) is type(draft) and other.config.draft_cache == "window"
    assert other.rotary is draft.rotary and other.cache_kinds == ("window", "retrieval")
    spec, ids = SpecExtend(target, other, SMALL), prompt(60)
    out = spec.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(out, greedy(target, ids, 12)) and spec.stats.num_retrievals == 0


def test_what_it_needs(target):
    with pytest.raises(ValueError, match='draft="self" needs draft_cache="retrieval" or "window"'):
        SpecExtend(target, "self", SMALL, draft_cache="full")
    with pytest.raises(ValueError, match="rotary"):
        SpecExtend(tiny_model("gpt2"), "self", SMALL)


def test_captured_to_full_depth(target):
    config = SMALL.replace(
        budget=160, tree_shape="top_k", tree_nodes=4, tree_depth=4, tree_width=1, tree_top_k=1
    )
    tapes = Tapes()
    spec = SpecExtend(target, "self", config, recorder=tapes)
    spec.generate(prompt(60), max_new_tokens=61, do_sample=False)
    assert spec.stats.acceptance_histogram == {4: 12}
    assert len(tapes) == 2 and all(recorder.replays > 5 for recorder in tapes)


@pytest.mark.parametrize("draft_cache", ["retrieval", "window"])
def test_captured(target, draft_cache):
    """The draft's work is recorded once and replayed, with counts that only the device knows."""
    config = SMALL.replace(draft_cache=draft_cache, tree_shape="top_k", gate="auto")
    ids, texts, tapes = prompt(70), [], Tapes()
    for recorder in (tapes, None):
        generation = scripted([3, 3, 3, 0, 0, 3, 3, 0, 3, 3, 3, 2] * 20)
        spec = SpecExtend(target, "self", config, recorder=recorder, generation=generation)
        text = []
        for step in spec.stream(ids, max_new_tokens=70, do_sample=False):
            text += step.tokens
            work = spec.draft.caches.work
            assert int(work.lens) + 1 + config.tree_keys <= work.capacity
        texts.append(text)
        assert spec.stats.num_accepted_tokens > 3
    assert texts[0] == texts[1] == greedy(target, ids, 70)[0, 70:].tolist()
    assert len(tapes) == 2 and all(recorder.replays > 5 for recorder in tapes)
