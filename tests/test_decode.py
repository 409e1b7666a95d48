"""Tests the loop: losslessness, exact truncation, state, options, errors."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from models import FAMILIES, VOCAB, prompt, tiny_model
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import specextend
from specextend import SpecConfig, SpecExtend
from specextend.attention import PatchedModel
from specextend.gate import Gate
from specextend.generation import Generation

# Small enough that prompts of a hundred tokens do not fit the draft's working cache.
SMALL = SpecConfig(
    chunk_size=8, budget=32, sink_chunks=1, recent_chunks=1, retrieve_every=2, prefill_chunk=40,
    draft_prefill_window=16, gate="off", tree_nodes=9, tree_depth=4, tree_threshold=0.0, seed=7,
)  # fmt: skip


def greedy(model, ids, n=40, **kwargs):
    return model.generate(ids, max_new_tokens=n, do_sample=False, **kwargs)


@pytest.fixture(scope="module")
def target():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def draft():
    return tiny_model("llama", seed=1, num_hidden_layers=2, hidden_size=16, head_dim=8)


class TestGreedyEqualsGenerate:
    """Exact, in fp32, for every family that passes the guard (O14)."""

    @pytest.mark.sweep(3)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_families(self, family, draft):
        model, ids = tiny_model(family), prompt(90)
        expected = greedy(model, ids)
        assert len(set(expected[0, 90:].tolist())) >= 8  # of 40: a loop would be easy to reproduce
        for kind in (None, draft, model):
            config = SMALL.replace(draft_cache="full") if kind is model else SMALL
            spec = SpecExtend(model, kind, config)
            assert torch.equal(spec.generate(ids, max_new_tokens=40, do_sample=False), expected)
            if kind is model:
                assert spec.stats.mean_acceptance_length > 2

    @pytest.mark.sweep(3)
    @pytest.mark.parametrize("draft_cache", ["full", "window", "retrieval"])
    @pytest.mark.parametrize("shape", ["opt", "top_k", "fixed"])
    @pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 120])
    def test_cache_and_tree(self, target, draft, draft_cache, shape, length):
        ids = prompt(length)
        config = SMALL.replace(draft_cache=draft_cache, tree_shape=shape, tree_widths=(3, 4, 2))
        spec = SpecExtend(target, draft, config)
        assert torch.equal(
            spec.generate(ids, max_new_tokens=50, do_sample=False), greedy(target, ids, 50)
        )

    @pytest.mark.sweep(3)
    @pytest.mark.parametrize(
        "change",
        [
            dict(tree_attention=False),
            dict(prefill_chunk=None),
            dict(prefill_chunk=1),
            dict(gate="auto"),
            dict(score_reduce="max"),
            dict(score_layers=(0, 1)),
            dict(draft_prefill_window=None),
            dict(retrieve_every=1),
            dict(tree_nodes=70, tree_width=16, tree_top_k=16),
            dict(tree_nodes=1, tree_depth=1),
            dict(sink_chunks=0, recent_chunks=0),
            dict(tree_width=1, tree_top_k=1, tree_nodes=4),
        ],
        ids=str,
    )
    def test_options(self, target, draft, change):
        ids = prompt(100)
        spec = SpecExtend(target, draft, SMALL.replace(**change))
        assert torch.equal(
            spec.generate(ids, max_new_tokens=45, do_sample=False), greedy(target, ids, 45)
        )

    @pytest.mark.parametrize("window", [2, 3])
    def test_windows_inside_the_tree(self, window):
        """Keys of the tree are hidden by their depth, not by their place among the nodes."""
        model = tiny_model("mistral", sliding_window=window)
        config = SMALL.replace(draft_cache="full", tree_depth=8, tree_nodes=63)
        spec, ids = SpecExtend(model, model, config), prompt(40)
        out = spec.generate(ids, max_new_tokens=60, do_sample=False)
        assert torch.equal(out, greedy(model, ids, 60)) and spec.stats.mean_acceptance_length > 4

    def test_dense_masks(self):
        """SDPA for a root alone and for trees, with sliding windows."""
        model, ids = tiny_model("mistral"), prompt(60)
        for kind in (None, model):
            spec = SpecExtend(model, kind, SMALL, draft_cache="full", tree_attention=False)
            out = spec.generate(ids, max_new_tokens=40, do_sample=False)
            assert torch.equal(out, greedy(model, ids))

    def test_adversarial_draft(self, target):
        """A draft finds least likely what the target finds most likely: nothing is accepted."""
        adversary = tiny_model("llama")
        with torch.no_grad():
            adversary.lm_head.weight.neg_()
        spec = SpecExtend(target, adversary, SMALL)
        ids = prompt(80)
        assert torch.equal(
            spec.generate(ids, max_new_tokens=30, do_sample=False), greedy(target, ids, 30)
        )
        assert spec.stats.mean_acceptance_length < 1.2


class TestIdenticalDraft:
    @pytest.mark.parametrize("draft_cache", ["full", "window", "retrieval"])
    def test_accepts_to_full_depth(self, target, draft_cache):
        """The target as its own draft agrees with itself (O11): positions and masks are right.
        Working caches have room for everything."""
        config = SMALL.replace(
            draft_cache=draft_cache, budget=160, draft_prefill_window=None,
            tree_shape="top_k", tree_nodes=4, tree_width=1, tree_top_k=1,
        )  # fmt: skip
        spec = SpecExtend(target, target, config)
        spec.generate(prompt(60), max_new_tokens=41, do_sample=False)
        # the first token is not a round; 40 tokens in rounds of 5
        assert spec.stats.num_rounds == 8
        assert spec.stats.acceptance_histogram == {4: 8}
        assert spec.stats.mean_acceptance_length == 5.0

    @pytest.mark.parametrize("draft_cache", ["window", "retrieval"])
    def test_cache_that_holds_everything_changes_nothing(self, target, draft, draft_cache):
        """Chunks that cover the context: same proposals as the full cache (O9)."""
        ids, runs = prompt(70), []
        for kind in ("full", draft_cache):
            config = SMALL.replace(
                draft_cache=kind, budget=160, draft_prefill_window=None, tree_shape="top_k"
            )
            spec = SpecExtend(target, draft, config)
            runs.append(
                [step.tokens for step in spec.stream(ids, max_new_tokens=85, do_sample=False)]
            )
        assert runs[0] == runs[1]


class TestSampling:
    @pytest.mark.sweep(3)
    @pytest.mark.parametrize(
        "options",
        [
            dict(),
            dict(temperature=0.7, top_k=0),
            dict(top_p=0.9),
            dict(min_p=0.05, top_k=0),
            dict(repetition_penalty=1.3),
            dict(no_repeat_ngram_size=2),
            dict(min_new_tokens=20, eos_token_id=5),
        ],
        ids=str,
    )
    def test_equals_plain_sampling(self, target, draft, options):
        """Token by token, for the same seed: with a draft and without."""
        ids = prompt(70)
        kwargs = dict(max_new_tokens=40, do_sample=True, **options)
        plain = SpecExtend(target, None, SMALL).generate(ids, **kwargs)
        for kind in (draft, target):
            assert torch.equal(SpecExtend(target, kind, SMALL).generate(ids, **kwargs), plain)
        other = SpecExtend(target, draft, SMALL, seed=8).generate(ids, **kwargs)
        assert not torch.equal(other, plain)

    def test_seed_from_torch(self, target, draft):
        spec = SpecExtend(target, draft, SMALL, seed=None)
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            runs.append(spec.generate(prompt(20), max_new_tokens=20, do_sample=True))
        g = torch.Generator().manual_seed(3)
        runs.append(spec.generate(prompt(20), max_new_tokens=20, do_sample=True, generator=g))
        assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])

    def test_greedy_with_processors(self, target, draft):
        ids = prompt(60)
        for options in (
            dict(repetition_penalty=1.5),
            dict(no_repeat_ngram_size=2),
            dict(bad_words_ids=[[9]]),
        ):
            expected = greedy(target, ids, **options)
            got = SpecExtend(target, draft, SMALL).generate(
                ids, max_new_tokens=40, do_sample=False, **options
            )
            assert torch.equal(got, expected)

    @pytest.mark.parametrize("self_draft", [False, True])
    def test_distribution(self, self_draft):
        """Two tokens have the distribution of exact enumeration, by chi-square (O13)."""
        model = tiny_model(
            "llama", vocab_size=6, bos_token_id=None, pad_token_id=None, initializer_range=0.2
        )
        other = (
            model
            if self_draft
            else tiny_model("llama", seed=5, vocab_size=6, bos_token_id=None, pad_token_id=None)
        )
        ids = torch.tensor([[1, 2, 3]])
        with torch.inference_mode():
            first = model(ids).logits[0, -1].double().softmax(-1)
            second = (
                torch.stack(
                    [
                        model(torch.cat([ids, torch.tensor([[t]])], 1)).logits[0, -1]
                        for t in range(6)
                    ]
                )
                .double()
                .softmax(-1)
            )
            third = (
                torch.stack(
                    [
                        model(torch.cat([ids, torch.tensor([[t, u]])], 1)).logits[0, -1]
                        for t in range(6)
                        for u in range(6)
                    ]
                )
                .double()
                .softmax(-1)
            )
        joint = ((first[:, None] * second).reshape(36, 1) * third).flatten()
        draws = 1200
        counts = torch.zeros(216, dtype=torch.float64)
        spec = SpecExtend(model, other, SMALL.replace(tree_nodes=4, tree_depth=2, seed=None))
        torch.manual_seed(0)
        for _ in range(draws):
            out = spec.generate(ids, max_new_tokens=3, do_sample=True, top_k=0)
            a, b, c = out[0, 3:].tolist()
            counts[36 * a + 6 * b + c] += 1
        # cells of small expectation are pooled
        order = joint.argsort(descending=True)
        keep = order[(joint[order] * draws >= 5)]
        rest = joint.sum() - joint[keep].sum()
        chi2 = ((counts[keep] - joint[keep] * draws) ** 2 / (joint[keep] * draws)).sum()
        if rest * draws > 1:
            chi2 += (draws - counts[keep].sum() - rest * draws) ** 2 / (rest * draws)
        freedom = len(keep)
        # chi-square has mean k and variance 2 k; 4 deviations is p < 1e-3 for these k
        assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


class TestEnds:
    @pytest.mark.parametrize("n", [1, 2, 3, 7, 20])
    def test_max_new_tokens_is_exact(self, target, n):
        ids = prompt(30)
        out = SpecExtend(target, target, SMALL).generate(ids, max_new_tokens=n, do_sample=False)
        assert torch.equal(out, greedy(target, ids, n)) and out.shape[1] == 30 + n

    def test_nothing_is_run_behind_the_last_token(self, target, monkeypatch):
        """A model may have no more positions there, for one."""
        forward, furthest = PatchedModel.forward, []

        def noting(self, tokens, positions, *args, **kwargs):
            furthest.append(int(positions.max()))
            return forward(self, tokens, positions, *args, **kwargs)

        monkeypatch.setattr(PatchedModel, "forward", noting)
        for n in range(2, 12):
            spec = SpecExtend(target, target, SMALL, draft_cache="full")
            furthest.clear()
            spec.generate(prompt(40), max_new_tokens=n, do_sample=False)
            assert max(furthest) == 40 + n - 2  # of the last but one

    @pytest.mark.parametrize("at", range(6))
    def test_nothing_after_end_of_sequence(self, target, at):
        """Also when it comes inside an accepted path."""
        ids = prompt(30)
        eos = int(greedy(target, ids, 20)[0, 30 + at])
        expected = greedy(target, ids, 20, eos_token_id=eos)
        out = SpecExtend(target, target, SMALL).generate(
            ids, max_new_tokens=20, do_sample=False, eos_token_id=eos
        )
        assert torch.equal(out, expected)

    def test_stopping_criteria_see_every_token(self, target):
        class AtLength(StoppingCriteria):
            def __init__(self):
                self.lengths = []

            def __call__(self, input_ids, scores, **kwargs):
                self.lengths.append(input_ids.shape[1])
                return torch.tensor([input_ids.shape[1] >= 43])

        criterion = AtLength()
        out = SpecExtend(target, target, SMALL).generate(
            prompt(30), max_new_tokens=30, do_sample=False, stopping_criteria=[criterion]
        )
        assert out.shape[1] == 43 and criterion.lengths == list(range(31, 44))

    def test_scores_and_logits(self, target, draft):
        ids, kwargs = prompt(40), dict(
            max_new_tokens=20, do_sample=False, return_dict_in_generate=True, output_scores=True,
            output_logits=True, repetition_penalty=1.2,
        )  # fmt: skip
        ours, theirs = (
            SpecExtend(target, draft, SMALL).generate(ids, **kwargs),
            target.generate(ids, **kwargs),
        )
        assert type(ours) is type(theirs) and torch.equal(ours.sequences, theirs.sequences)
        for name in ("scores", "logits"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert len(a) == len(b) == 20
            torch.testing.assert_close(torch.cat(a), torch.cat(b), rtol=1e-4, atol=1e-4)


class Recorder(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ended += 1


class TestWaysIn:
    def test_custom_generate(self, target, draft):
        ids = prompt(50)
        spec = SpecExtend(target, draft, SMALL)
        out = target.generate(ids, custom_generate=spec, max_new_tokens=30, do_sample=False)
        assert torch.equal(out, greedy(target, ids, 30))

    @pytest.mark.parametrize("way", ["generate", "custom_generate", "constructor"])
    def test_streamer_gets_what_hugging_face_would_send(self, target, draft, way):
        ids, expected, got = prompt(50), Recorder(), Recorder()
        greedy(target, ids, 30, streamer=expected)
        kwargs = dict(max_new_tokens=30, do_sample=False)
        if way == "generate":
            SpecExtend(target, draft, SMALL).generate(ids, streamer=got, **kwargs)
        elif way == "custom_generate":
            target.generate(
                ids, custom_generate=SpecExtend(target, draft, SMALL), streamer=got, **kwargs
            )
        else:
            SpecExtend(target, draft, SMALL, streamer=got).generate(ids, **kwargs)
        assert got.values == expected.values and got.ended == expected.ended == 1

    def test_stream(self, target, draft):
        ids = prompt(50)
        spec = SpecExtend(target, target, SMALL)
        steps = list(spec.stream(ids, max_new_tokens=30, do_sample=False))
        assert sum((s.tokens for s in steps), []) == greedy(target, ids, 30)[0, 50:].tolist()
        assert steps[0].num_accepted == 0 and all(s.num_accepted <= len(s.tokens) for s in steps)
        assert spec.stats.num_emitted_tokens == 30

    def test_left_padding_is_not_seen(self, target, draft):
        ids = prompt(40)
        padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
        mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids)], 1)
        kwargs = dict(max_new_tokens=20, do_sample=False)
        out = SpecExtend(target, draft, SMALL).generate(padded, attention_mask=mask, **kwargs)
        assert torch.equal(out[:, :5], padded[:, :5])
        assert torch.equal(out[:, 5:], greedy(target, ids, 20))

    def test_generation_config(self, target, draft):
        ids, config = (
            prompt(40),
            GenerationConfig(max_new_tokens=25, do_sample=False, repetition_penalty=1.4),
        )
        out = SpecExtend(target, draft, SMALL).generate(ids, generation_config=config)
        assert torch.equal(out, target.generate(ids, generation_config=config))


class TestState:
    def test_long_then_short_and_twice(self, target, draft):
        """No state of one generation reaches the next (B1, O16)."""
        spec = SpecExtend(target, draft, SMALL)
        kwargs = dict(max_new_tokens=30, do_sample=False)

        def steps(ids):
            return [(s.tokens, s.num_accepted) for s in spec.stream(ids, **kwargs)]

        long, short = prompt(300), prompt(20, seed=1)
        first = steps(long)
        assert steps(long) == first
        fresh = SpecExtend(target, draft, SMALL)
        assert steps(short) == [(s.tokens, s.num_accepted) for s in fresh.stream(short, **kwargs)]

    def test_model_is_as_it_came(self, target, draft):
        before = target.config._attn_implementation
        spec = SpecExtend(target, draft, SMALL)
        stream = spec.stream(prompt(30), max_new_tokens=30, do_sample=False)
        next(stream)
        assert target.config._attn_implementation == before  # also between two steps
        assert torch.equal(greedy(target, prompt(30), 5), greedy(target, prompt(30), 5))
        with pytest.raises(RuntimeError, match="in the middle of a generation"):
            spec.generate(prompt(30), max_new_tokens=3)
        stream.close()
        assert torch.equal(
            spec.generate(prompt(30), max_new_tokens=9, do_sample=False),
            greedy(target, prompt(30), 9),
        )

    def test_after_an_interruption(self, target, draft):
        class Interrupt(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                if input_ids.shape[1] > 45:
                    raise KeyboardInterrupt
                return torch.tensor([False])

        spec, recorder = SpecExtend(target, draft, SMALL), Recorder()
        with pytest.raises(KeyboardInterrupt):
            spec.generate(
                prompt(40), max_new_tokens=30, stopping_criteria=[Interrupt()], streamer=recorder
            )
        assert recorder.ended == 1
        ids = prompt(33)
        assert torch.equal(
            spec.generate(ids, max_new_tokens=9, do_sample=False), greedy(target, ids, 9)
        )

    def test_failing_forward_restores_the_model(self, target, draft):
        spec = SpecExtend(target, draft, SMALL)
        handle = target.model.layers[1].register_forward_pre_hook(lambda *a: 1 / 0)
        before = target.config._attn_implementation
        try:
            with pytest.raises(ZeroDivisionError):
                spec.generate(prompt(40), max_new_tokens=3)
        finally:
            handle.remove()
        assert target.config._attn_implementation == before
        ids = prompt(33)
        assert torch.equal(
            spec.generate(ids, max_new_tokens=9, do_sample=False), greedy(target, ids, 9)
        )

    def test_training_mode_is_kept(self, draft):
        model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
        expected = greedy(model, prompt(20), 10)
        model.train()
        model.transformer.h[1].eval()
        out = SpecExtend(model, draft, SMALL).generate(
            prompt(20), max_new_tokens=10, do_sample=False
        )
        assert torch.equal(out, expected)
        assert model.training and not model.transformer.h[1].training


class TestRetrieval:
    def test_schedule_and_selection(self, target, draft):
        config = SMALL.replace(retrieve_every=3)
        spec = SpecExtend(target, draft, config)
        spec.generate(prompt(150), max_new_tokens=30, do_sample=False)
        stats = spec.stats
        # Behind the last round nobody needs one.
        expected = 1 + -(-(stats.num_rounds - 1) // 3)
        assert stats.num_retrievals == len(stats.retrieved_chunks) == expected
        for ids in stats.retrieved_chunks:
            assert len(ids) == 4 and ids == sorted(set(ids)) and ids[0] == 0  # sink

    @pytest.mark.parametrize("layers", [(0,), (-1,)])
    def test_scores_are_of_the_last_accepted_node(self, layers, monkeypatch):
        target = tiny_model("llama", attn_implementation="eager")
        config = SMALL.replace(score_layers=layers, retrieve_every=1)
        spec, text, given, accepted = SpecExtend(target, target, config), prompt(150), [], 0
        retrieve = spec.draft.retrieve
        monkeypatch.setattr(
            spec.draft, "retrieve", lambda scores: given.append(scores) or retrieve(scores)
        )
        before = 0  # tokens that were committed before the round that was scored
        for step in spec.stream(text, max_new_tokens=40, do_sample=False):
            if given:  # by the round before
                # The root stands behind all that was seen by then.
                seen = target(text[:, :-1], output_attentions=True).attentions[layers[0]][0, :, -1]
                whole = before // 8  # chunks; the next one has the tree's share
                mass = seen[:, : 8 * whole].unflatten(-1, (whole, 8)).sum(-1).mean(0)
                torch.testing.assert_close(given.pop()[0, :whole], mass, rtol=1e-4, atol=1e-6)
            text, before = torch.cat([text, torch.tensor([step.tokens])], 1), text.shape[1] - 1
            accepted += step.num_accepted
        assert accepted >= 3 and spec.stats.num_retrievals > 5

    def test_short_inputs_are_not_scored(self, target, draft):
        spec = SpecExtend(target, draft, SMALL, budget=256)
        spec.generate(prompt(40), max_new_tokens=30, do_sample=False)
        assert spec.stats.num_retrievals == 0


class TestGate:
    def test_rests_when_speculation_loses(self, target, draft):
        """With rounds of a tree a hundred times as slow, most tokens come from plain rounds."""

        class Slow(Gate):
            def count(self, took):
                super().count(replace(took, seconds=100.0 if took.nodes else 1.0, drafting=0.0))

        gate = Slow(SMALL.replace(gate="auto"), SMALL.max_depth, follows=True)
        spec = SpecExtend(target, draft, SMALL, generation=partial(Generation, gate=gate))
        ids = prompt(40)
        out = spec.generate(ids, max_new_tokens=200, do_sample=False)
        assert torch.equal(out, greedy(target, ids, 200))
        assert spec.stats.num_plain_rounds > 50


class TestErrors:
    @pytest.mark.parametrize(
        "ids, text",
        [
            (torch.zeros(1, 0, dtype=torch.long), "prompt is empty"),
            (torch.zeros(5, dtype=torch.long), r"must be a \[1, L\] int64 tensor, got \[5\]"),
            (torch.zeros(2, 4, dtype=torch.long), r"one prompt at a time.*\[2, 4\]"),
            (torch.zeros(1, 4), "must hold int64 token ids, got torch.float32"),
            (torch.full((1, 4), VOCAB), rf"token ids must be in \[0, {VOCAB}\), got {VOCAB}"),
            (None, "a prompt is wanted"),
        ],
        ids=str,
    )
    def test_prompts(self, target, draft, ids, text):
        spec = SpecExtend(target, draft, SMALL)
        with pytest.raises(ValueError, match=text):
            spec.generate(ids, max_new_tokens=4)

    def test_context_overflow(self, target, draft):
        spec = SpecExtend(target, draft, SMALL)
        with pytest.raises(
            ValueError, match="has 512 positions, but the prompt's 500 tokens and 13"
        ):
            spec.generate(prompt(500), max_new_tokens=13)
        assert spec.generate(prompt(500), max_new_tokens=12, do_sample=False).shape == (1, 512)

    @pytest.mark.parametrize(
        "kwargs, text",
        [
            (dict(num_beams=2), "num_beams=2 asks for beam search"),
            (dict(output_hidden_states=True, return_dict_in_generate=True), "output_hidden_states"),
            (dict(stop_strings=["x"]), "tokenizer"),
            (dict(use_cache=False), "use_cache"),
        ],
        ids=str,
    )
    def test_what_cannot_be_honoured_is_refused(self, target, draft, kwargs, text):
        with pytest.raises(ValueError, match=text):
            SpecExtend(target, draft, SMALL).generate(prompt(10), max_new_tokens=4, **kwargs)

    def test_nan_logits(self, draft):
        model = tiny_model("llama")
        spec = SpecExtend(model, draft, SMALL)
        with torch.no_grad():
            model.lm_head.weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="scores at position 29 are NaN"):
            spec.generate(prompt(30), max_new_tokens=4)

    def test_vocabularies(self, target):
        other = tiny_model("llama", vocab_size=VOCAB + 31)
        with pytest.raises(ValueError, match="vocabulary has 97 entries, the draft's 128"):
            SpecExtend(target, other, SMALL)

    def test_types(self, target):
        with pytest.raises(TypeError, match="model must be a transformers model, got str"):
            SpecExtend("gpt2")
        with pytest.raises(TypeError, match="draft must be .* got int"):
            SpecExtend(target, 3)
        with pytest.raises(ValueError, match="unknown option 'tree_size'"):
            SpecExtend(target, None, tree_size=3)
        with pytest.raises(ValueError, match="score_layers must be in"):
            SpecExtend(target, None, score_layers=(5,))

    def test_draft_without_rotary_positions(self, target):
        gpt2 = tiny_model("gpt2")
        with pytest.raises(ValueError, match="rotary"):
            SpecExtend(target, gpt2, SMALL, draft_cache="window")
        ids = prompt(40)
        spec = SpecExtend(target, gpt2, SMALL, draft_cache="full")
        assert torch.equal(
            spec.generate(ids, max_new_tokens=20, do_sample=False), greedy(target, ids, 20)
        )

    def test_another_model(self, target, draft):
        spec = SpecExtend(target, draft, SMALL)
        with pytest.raises(ValueError, match="another model"):
            draft.generate(prompt(10), custom_generate=spec, max_new_tokens=3)

    def test_attention_name_outside(self, target):
        model = tiny_model("llama")
        model.set_attn_implementation("specextend")
        with pytest.raises(RuntimeError, match="works inside specextend.SpecExtend only"):
            model(prompt(4))


def test_package_attributes():
    assert set(specextend.__all__) <= set(dir(specextend))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        specextend.nothing  # noqa: B018


class TestLowPrecision:
    """bf16: other kernels round differently, so output may differ at ties, and only there."""

    @pytest.mark.sweep(2)
    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox"])
    def test_divergence_from_generate_only_at_ties(self, family):
        model = tiny_model(family, dtype=torch.bfloat16)
        exact = tiny_model(family)
        exact.load_state_dict(model.state_dict())  # the same weights, in fp32
        same = 0
        for seed in range(6):
            ids = prompt(60, seed=seed)
            ours = SpecExtend(model, model, SMALL).generate(ids, max_new_tokens=40, do_sample=False)
            theirs = greedy(model, ids)
            differs = (ours != theirs)[0].nonzero()
            if not len(differs):
                same += 1
                continue
            at = int(differs[0])
            with torch.inference_mode():
                logits = exact(ours[:, :at]).logits[0, -1]
            gap = (logits[ours[0, at]] - logits[theirs[0, at]]).abs()
            # bf16 keeps 8 bits; a few layers of it move a logit by a percent of the logits' size
            assert gap <= 0.05 * logits.abs().max(), (family, seed, at, float(gap))
        assert same >= 1

    def test_plain_and_speculative_have_the_same_bits(self):
        """They have where torch's linear layers give a row the same bits for any number of rows."""
        model = tiny_model("llama", dtype=torch.bfloat16)
        x = torch.randn(16, 32).bfloat16()
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        layers = [m for m in layers if m.in_features == 32]
        if not all(
            torch.equal(m(x)[i : i + 1], m(x[i : i + 1])) for m in layers for i in range(16)
        ):
            pytest.skip("this torch's bf16 matmul depends on the number of rows on this machine")
        for seed in range(4):
            ids = prompt(100, seed=seed)
            plain = SpecExtend(model, None, SMALL).generate(ids, max_new_tokens=60, do_sample=False)
            out = SpecExtend(model, model, SMALL).generate(ids, max_new_tokens=60, do_sample=False)
            assert torch.equal(out, plain)
