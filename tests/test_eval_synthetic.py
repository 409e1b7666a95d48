"""Synthetic acceptance: as often as was asked for, by the same work as ever."""

import math

import models
import pytest
import torch

from specextend import SpecExtend
from specextend.assets import target_path
from specextend.eval.synthetic import (
    SyntheticSpecExtend,
    label,
    one_layer,
    random_model,
    random_pair,
    sharpen,
)

CHAIN = dict(tree_shape="fixed", tree_widths=(2, 2, 2, 2), gate="off", seed=5)
RETRIEVAL = dict(draft_cache="retrieval", chunk_size=8, budget=48, sink_chunks=1, recent_chunks=2)


@pytest.fixture(scope="module")
def pair():
    return models.tiny_model(seed=0), models.tiny_model(seed=1, num_hidden_layers=1)


def generate(spec, seed=0, tokens=200, **kwargs):
    prompt = models.prompt(100, seed)
    out = spec.generate(prompt, max_new_tokens=tokens, **kwargs)
    assert out.shape == (1, 100 + tokens)
    assert ((out >= 0) & (out < models.VOCAB)).all()
    return spec.stats


def test_acceptance_is_what_was_set(pair):
    """A position is tried if the ones before it were accepted. Accepted tries are binomial: four
    standard deviations, which one correct run of 16,000 exceeds; the seed is fixed."""
    rates = (0.9, 0.8, 0.4)  # the last serves the fourth position, too
    stats = generate(SyntheticSpecExtend(*pair, acceptance=rates, **CHAIN), tokens=300)
    tried, accepted = [0] * 4, [0] * 4
    for length, rounds in stats.acceptance_histogram.items():
        for position in range(min(length + 1, 4)):
            tried[position] += rounds
            accepted[position] += rounds * (position < length)
    assert min(tried) >= 20
    for n, k, rate in zip(tried, accepted, (*rates, rates[-1]), strict=True):
        assert abs(k / n - rate) <= 4 * math.sqrt(rate * (1 - rate) / n), (n, k, rate)


@pytest.mark.parametrize("do_sample", [False, True])
def test_none_and_all(pair, do_sample):
    none = SyntheticSpecExtend(*pair, acceptance=0, **CHAIN)
    assert generate(none, tokens=12, do_sample=do_sample).num_accepted_tokens == 0
    stats = generate(
        SyntheticSpecExtend(*pair, acceptance=1, **CHAIN), tokens=31, do_sample=do_sample
    )
    assert stats.acceptance_histogram == {4: 6}  # and the first token, which has no tree


@pytest.mark.parametrize(
    "options",
    [CHAIN, dict(tree_shape="top_k", tree_depth=3, gate="off", seed=5, **RETRIEVAL)],
    ids=["fixed", "top_k"],
)
def test_work_is_that_of_a_normal_run(pair, options, monkeypatch):
    """Rows that target and draft compute per round, and retrievals on the same schedule."""
    # What a draft reads late depends on scores, which the drafted tokens that are refused shape.
    monkeypatch.setattr("specextend.draft.causal_lm.follows", lambda *_: False)

    def work(spec):
        rows = []
        for owner in (spec.target, spec.draft.patched):
            own, forward = [], owner.forward

            def counted(tokens, *args, own=own, forward=forward, **kwargs):
                own.append(tokens.shape[1])
                return forward(tokens, *args, **kwargs)

            monkeypatch.setattr(owner, "forward", counted)
            rows.append(own)
        stats = generate(spec, seed=1, tokens=24)
        assert stats.num_accepted_tokens == 0
        return *rows, stats.num_draft_tokens, stats.num_retrievals

    normal = work(SpecExtend(*pair, **options))
    assert (normal[3] > 0) == (options is not CHAIN)  # retrievals
    assert work(SyntheticSpecExtend(*pair, acceptance=0.0, **options)) == normal


def test_same_prompt_and_seed_give_the_same(pair):
    spec = SyntheticSpecExtend(*pair, acceptance=0.5, **CHAIN)
    histograms = [generate(spec, seed, tokens=30).acceptance_histogram for seed in (0, 0, 1)]
    assert histograms[0] == histograms[1] != histograms[2]


def test_models_are_handed_back_as_they_came(pair):
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in pair]
    settings = [m.config.to_dict() for m in pair]
    ids = models.prompt(40)
    plain = pair[0].generate(ids, max_new_tokens=8, do_sample=False)
    generate(SyntheticSpecExtend(*pair, acceptance=0.7, **CHAIN), tokens=20)
    for model, state, config in zip(pair, before, settings, strict=True):
        assert model.config.to_dict() == config
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(pair[0].generate(ids, max_new_tokens=8, do_sample=False), plain)
    spec = SpecExtend(*pair, **CHAIN)  # nothing of the drawn choice is left behind
    assert torch.equal(spec.generate(ids, max_new_tokens=8, do_sample=False), plain)


def test_random_pair_has_one_vocabulary_and_a_draft_that_believes_in_itself():
    torch.manual_seed(0)
    small = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    target = random_model("small", 300, **small)
    assert target.config.max_position_embeddings >= 300
    assert target.generation_config.eos_token_id is None
    draft = random_model("small", 300, **small)
    for probability in (0.3, 0.7):
        sharpen(draft, probability)
        ids = torch.randint(8192, (1, 200))
        with torch.inference_mode():
            confidence = draft(ids).logits.softmax(-1).amax(-1).mean()
        assert abs(confidence - probability) < 0.12
    target, draft = random_pair(target_path(), "one-layer", 0.7, 64)
    assert draft.config.vocab_size == target.config.vocab_size
    assert (draft.config.num_hidden_layers, draft.config.tie_word_embeddings) == (1, False)


def test_errors(pair, tmp_path):
    for wrong in (1.5, -0.1, [], [0.5, 2]):
        with pytest.raises(ValueError, match=r"acceptance must be a probability in \[0, 1\]"):
            SyntheticSpecExtend(*pair, acceptance=wrong, **CHAIN)
    with pytest.raises(ValueError, match="trees of 96 nodes are too large"):
        SyntheticSpecExtend(*pair, acceptance=0.5, tree_nodes=96)
    with pytest.raises(ValueError, match="a shape is one of llama-3.1-70b, .*; got"):
        random_model(tmp_path, 64)


def test_label():
    assert label(0.7) == "synthetic acceptance 0.7"
    assert label((0.9, 0.5)) == "synthetic acceptance 0.9, 0.5"


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        ("llama-3.1-70b", 70.6), ("llama-3.1-8b", 8.0), ("llama-3.2-1b", 1.5), ("vicuna-7b", 6.7),
        ("deepseek-v3-lite", 16.0), ("qwen3.5-9b", 9.0), ("gemma-4-12b", 12.0),
    ],
)  # fmt: skip
def test_shapes_have_the_size_of_their_names(shape, billions):
    """Heads and embeddings apart where the models' own are tied, for two of them."""
    model = random_model(shape, 100, "meta")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=0.03)


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "deepseek-v3-lite", "qwen3.5-9b", "gemma-4-12b"])
def test_one_layer_attends_to_all(shape):
    changes = dict(one_layer(shape), hidden_size=64, intermediate_size=64, vocab_size=99)
    model = random_model(shape, 100, **changes)
    target = SpecExtend(model, None).target
    assert len(target.kinds) == 1 and target.kinds[0].rows and not target.keeps_states
    assert not any(target.find_windows().values())
