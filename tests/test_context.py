"""Contexts that are kept: the text is that of a generation without one, whatever was kept."""

from __future__ import annotations

import threading
from functools import cache

import pytest
import torch
from drafts import KINDS, SMALL, WAYS, Oracle, draft, target, write
from emulated_gpu_memory import emulated_gpu_memory
from families import miniature
from models import VOCAB, prompt, tiny_model
from transformers import DynamicCache

from specextend import SpecExtend
from specextend.cache_layers import Marks, StateLayer
from specextend.compat import CACHE
from specextend.context import Context, Shelf
from specextend.draft import Draft
from specextend.verify import Verifier

NEW = 12
GREEDY = dict(max_new_tokens=NEW, do_sample=False)
SAMPLED = dict(max_new_tokens=NEW, do_sample=True, temperature=0.8)
#: families with layers that keep a state
STATES = ("lfm2", "qwen3_next", "falcon_h1", "mamba2", "minimax", "jamba")


def fresh(model, ids, config=SMALL, how=GREEDY) -> list[int]:
    """Write without a draft and without a context."""
    spec = SpecExtend(model, None, config, keep_contexts=0)
    return spec.generate(ids, attention_mask=torch.ones_like(ids), **how)[0].tolist()


@cache
def wanted(length: int, sampled: bool = False) -> tuple[int, ...]:
    return tuple(fresh(target(), prompt(length), how=SAMPLED if sampled else GREEDY))


def again(spec, ids, cached, how=GREEDY, **options) -> list[int]:
    """Write, and look at what was there."""
    ids_mask = torch.ones_like(ids)
    out = spec.generate(ids, attention_mask=ids_mask, **how, **options)[0].tolist()
    eagle = spec.draft is not None and bool(spec.draft.feature_layers)
    # EAGLE's row at the border is that of the next token: what the target saw there is read again.
    assert spec.stats.num_cached_tokens == max(0, cached - eagle)
    assert spec.stats.num_prompt_tokens == ids.shape[1]
    return out


def leaving(ids, at: int, seed: int = 1) -> torch.Tensor:
    """Return a text that leaves another one behind ``at`` tokens."""
    tail = prompt(ids.shape[1] - at + 3, seed)
    if at < ids.shape[1] and tail[0, 0] == ids[0, at]:
        tail[0, 0] = 3 + (tail[0, 0] - 2) % (VOCAB - 3)
    return torch.cat([ids[:, :at], tail], 1)


class TestKept:
    @pytest.mark.sweep(8)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("sampled", [False, True])
    def test_a_prompt_that_leaves_a_text(self, kind, sampled, tmp_path):
        ids, how = prompt(60), SAMPLED if sampled else GREEDY
        spec = SpecExtend(target(), draft(kind, folder=tmp_path), SMALL)
        for at in (0, 1, 7, 8, 13, 31, 58, 59):
            write(spec, "generate", leaving(ids, at), **how)
            assert again(spec, ids, at, how) == list(wanted(60, sampled))

    @pytest.mark.long
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("sampled", [False, True])
    @pytest.mark.parametrize("draft_cache", ["full", "window", "retrieval"])
    def test_every_place_of_a_prompt(self, kind, sampled, draft_cache, tmp_path):
        if kind == "self" and draft_cache == "full":
            pytest.skip("there is none on the full cache")
        ids, how = prompt(200), SAMPLED if sampled else GREEDY
        config = SMALL.replace(draft_cache=draft_cache)
        spec = SpecExtend(target(), draft(kind, config, tmp_path), config)
        for at in range(200):
            write(spec, "generate", leaving(ids, at), **how)
            assert again(spec, ids, at, how) == list(wanted(200, sampled)), at

    @pytest.mark.sweep(10)
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_conversation(self, kind, way, tmp_path):
        """Every prompt has the text before it, what was written included."""
        spec = SpecExtend(target(), draft(kind, folder=tmp_path), SMALL)
        ids, cached = prompt(40), 0
        for turn in range(4):
            out = write(spec, way, ids, attention_mask=torch.ones_like(ids), **GREEDY)
            assert ids[0].tolist() + out == fresh(target(), ids)
            eagle = kind.startswith("eagle")
            assert spec.stats.num_cached_tokens == max(0, cached - eagle)
            # The last token is decided, and not yet in the target's cache.
            cached = ids.shape[1] + NEW - 1
            ids = torch.cat([ids, torch.tensor([out]), prompt(5, turn + 7)], 1)

    @pytest.mark.parametrize("kind", ["model", "eagle", "longspec"])
    def test_the_draft_goes_on_as_if_it_had_read_all(self, kind, tmp_path, monkeypatch):
        """It proposes the same trees, which a row that were wrong or missing would change."""
        config = SMALL.replace(draft_cache="full", tree_nodes=20)
        spec = SpecExtend(target(), draft(kind, config, tmp_path), config)
        proposed: list = []
        own = type(spec.draft).propose

        def propose(self, *args, **options):
            tree = own(self, *args, **options)
            proposed.append(tree.tokens[0].tolist())
            return tree

        monkeypatch.setattr(type(spec.draft), "propose", propose)
        ids = prompt(60)
        spec.generate(ids, **GREEDY)
        alone = list(proposed)
        for at in (1, 20, 45, 59):
            spec.generate(leaving(ids, at), attention_mask=None, **GREEDY)
            proposed.clear()
            again(spec, ids, at)
            assert proposed == alone

    def test_windows(self):
        """Rows that no later token of the old text saw are there for the new one."""
        model, ids = tiny_model("gemma3_text"), prompt(70)
        spec = SpecExtend(model, "ngram", SMALL)
        spec.generate(ids, **GREEDY)
        for at in (60, 40, 12):
            other = leaving(ids, at)
            assert again(spec, other, at) == fresh(model, other)

    def test_the_same_prompt_and_a_shorter_one(self):
        spec = SpecExtend(target(), target(), SMALL)
        spec.generate(prompt(60), **GREEDY)
        for length in (60, 31, 1, 60):
            ids = prompt(60)[:, :length]
            # The last token of a prompt is always run.
            cached = min(
                length - 1, 0 if length == 60 and spec.stats.num_prompt_tokens == 1 else 59
            )
            out = spec.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
            assert out[0].tolist() == fresh(target(), ids)
            assert spec.stats.num_cached_tokens <= length - 1
            assert length == 60 or spec.stats.num_cached_tokens == cached

    def test_none(self):
        spec = SpecExtend(target(), target(), SMALL, keep_contexts=0)
        for _ in range(2):
            assert again(spec, prompt(60), 0) == list(wanted(60))

    def test_forget(self):
        spec = SpecExtend(target(), target(), SMALL)
        spec.generate(prompt(60), **GREEDY)
        spec.forget()
        assert again(spec, prompt(60), 0) == list(wanted(60))
        assert again(spec, prompt(60), 59) == list(wanted(60))

    def test_exact(self):
        """Parts of the prompt are read as without a context, so that rows have the same bits."""
        model = tiny_model("llama", dtype=torch.bfloat16)
        config, ids = SMALL.replace(exact=True), prompt(60)
        spec = SpecExtend(model, "ngram", config)
        expected = fresh(model, ids, config)
        for at in (5, 13, 14, 26, 40, 59):
            spec.generate(leaving(ids, at), attention_mask=None, **GREEDY)
            assert again(spec, ids, at // 13 * 13) == expected

    def test_longrope(self):
        """Beyond some length all keys are turned in another way."""
        rope = dict(
            rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=32,
            short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[3.0, 5.0, 7.0, 9.0],
        )  # fmt: skip
        model = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=32)
        spec = SpecExtend(model, None, SMALL)
        # Up to the edge, over it, beyond, and back.
        for length, cached in ((14, 0), (18, 14), (40, 0), (45, 40), (19, 0)):
            ids = prompt(60)[:, :length]
            assert again(spec, ids, cached) == fresh(model, ids)


class TestStates:
    """Layers whose state cannot be taken back: it is that of a place that was marked."""

    @pytest.mark.sweep(4)
    @pytest.mark.parametrize("family", STATES)
    @pytest.mark.parametrize("kind", ["none", "model"])
    def test_text(self, family, kind):
        model = miniature(family)
        spec = SpecExtend(model, draft(kind, model=model), SMALL.replace(draft_cache="full"))
        ids = prompt(60)
        spec.generate(ids, **GREEDY)
        # Behind a part of 13 tokens of the prompt, or the prompt; or the text goes on.
        for at, cached in ((59, 59), (58, 52), (40, 39), (13, 13), (12, 0)):
            assert again(spec, leaving(ids, at), cached) == fresh(model, leaving(ids, at))
            spec.forget()
            spec.generate(ids, **GREEDY)
        out = spec.generate(ids, **GREEDY)
        longer = torch.cat([out, prompt(4, 5)], 1)
        assert again(spec, longer, 60 + NEW - 1) == fresh(model, longer)

    @pytest.mark.parametrize("family", STATES)
    def test_several_answers_behind_what_was_accepted(self, family):
        """The copy behind an answer has what the state had yet to take in, and stays as it is
        whatever follows."""
        model, ids = miniature(family), prompt(60)
        written = fresh(model, ids)
        for new in range(5, NEW):  # which end with one token, or with several that were accepted
            oracle = Oracle(written)
            spec = SpecExtend(model, oracle, SMALL)
            out = spec.generate(ids, max_new_tokens=new, do_sample=False)
            assert out[0].tolist() == written[: 60 + new]
            for seed in (1, 2, 3):
                longer = torch.cat([out, prompt(4, seed)], 1)
                oracle.text = fresh(model, longer)
                assert again(spec, longer, 60 + new - 1) == oracle.text

    @pytest.mark.parametrize("family", STATES)
    def test_an_error_in_the_middle_of_a_forward(self, family):
        """Some layers have taken in tokens by then, and others have not."""
        model, ids = miniature(family), prompt(60)
        written = fresh(model, ids)
        spec = SpecExtend(model, Oracle(written), SMALL)
        layers = model.get_decoder().layers
        got: list = []

        def fail(*args):
            if len(got) > 5:
                raise RuntimeError("inside")

        hook = layers[-1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="inside"):
            for step in spec.stream(ids, **GREEDY):
                got += step.tokens
        hook.remove()
        # Right up to where the error came, and beyond.
        longer = torch.cat([torch.tensor([written[: 60 + len(got)]]), prompt(5, 3)], 1)
        assert again(spec, longer, 59) == fresh(model, longer)
        assert again(spec, ids, 59) == fresh(model, ids)

    def test_marks_are_thinned(self, monkeypatch):
        monkeypatch.setattr("specextend.cache_layers.MARK_BYTES", 4 * 8)
        layer = StateLayer()
        marks = Marks([layer])
        for length in range(1, 31):
            layer.update_recurrent_state(torch.full((1, 2), float(length)))
            marks.add(length)
            assert marks.num_bytes <= 32
        assert marks.go_back(30) == 30 and float(layer.states[0][0, 0]) == 30
        assert marks.go_back(29) == 29 and float(layer.states[0][0, 0]) == 29
        middle = marks.go_back(28)
        assert 8 <= middle <= 28 and float(layer.states[0][0, 0]) == middle
        assert marks.go_back(0) == 0 and not layer.states


class TestBrokenOff:
    @pytest.mark.sweep(4)
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_stream_that_is_closed(self, kind, tmp_path):
        spec = SpecExtend(target(), draft(kind, folder=tmp_path), SMALL)
        ids, tokens = prompt(60), []
        steps = spec.stream(ids, **GREEDY)
        for _ in range(3):
            tokens += next(steps).tokens
        steps.close()
        assert again(spec, ids, 59) == list(wanted(60))
        steps = spec.stream(ids, **GREEDY)
        tokens = next(steps).tokens + next(steps).tokens
        steps.close()
        longer = torch.cat([ids, torch.tensor([tokens]), prompt(5, 3)], 1)
        assert again(spec, longer, 60 + len(tokens) - 1) == fresh(target(), longer)

    @pytest.mark.sweep(16)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("where", ["forward", "accept", "propose", "observe"])
    def test_an_error_inside_a_round(self, kind, where, tmp_path, monkeypatch):
        spec = SpecExtend(target(), draft(kind, folder=tmp_path), SMALL)
        if where in ("propose", "observe"):
            if spec.draft is None:
                pytest.skip("no draft")
            owner = type(spec.draft)
        else:
            owner = Verifier
        calls, own = [], getattr(owner, where)

        def fail(self, *args, **options):
            calls.append(None)
            result = own(self, *args, **options)
            if len(calls) == 3:
                raise RuntimeError("inside")
            return result

        ids = prompt(60)
        with monkeypatch.context() as patch:
            patch.setattr(owner, where, fail)
            with pytest.raises(RuntimeError, match="inside"):
                spec.generate(ids, **GREEDY)
        assert again(spec, ids, 59) == list(wanted(60))
        assert again(spec, ids, 59) == list(wanted(60))

    @pytest.mark.sweep(4)
    @pytest.mark.parametrize("kind", KINDS)
    def test_an_interrupt_while_a_prompt_is_read(self, kind, tmp_path):
        def stop(phase, done, total):
            if done >= 30:
                raise KeyboardInterrupt

        spec = SpecExtend(target(), draft(kind, folder=tmp_path), SMALL, progress=stop)
        with pytest.raises(KeyboardInterrupt):
            spec.generate(prompt(60), **GREEDY)
        spec.progress = None
        # Three parts of 13 tokens.
        assert again(spec, prompt(60), 39) == list(wanted(60))

    def test_a_draft_that_does_not_begin(self, monkeypatch):
        """Its error is what the caller sees, and not that of asking it what to keep."""
        spec = SpecExtend(target(), "ngram", SMALL)
        spec.generate(prompt(60), **GREEDY)

        def fail(*args):
            raise RuntimeError("inside")

        with monkeypatch.context() as patch:
            patch.setattr(type(spec.draft), "begin", fail)
            with pytest.raises(RuntimeError, match="inside"):
                spec.generate(prompt(60), **GREEDY)
        assert again(spec, prompt(60), 59) == list(wanted(60))

    def test_a_draft_that_does_not_say_what_to_keep(self, monkeypatch):
        """What was there then is not taken for the text before it."""
        ids, spec = prompt(60), SpecExtend(target(), "ngram", SMALL)
        spec.generate(ids, **GREEDY)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(type(spec.draft), "keep", lambda *args: 1 / 0)
            spec.generate(leaving(ids, 20), **GREEDY)
        assert again(spec, ids, 20) == list(wanted(60))

    def test_an_argument_that_is_refused(self):
        spec = SpecExtend(target(), None, SMALL)
        spec.generate(prompt(60), **GREEDY)
        with pytest.raises(ValueError, match="token ids"):
            spec.generate(torch.full((1, 5), VOCAB), **GREEDY)
        assert again(spec, prompt(60), 59) == list(wanted(60))


class TestWeights:
    def test_that_were_changed(self):
        model = tiny_model("llama")
        spec = SpecExtend(model, None, SMALL)
        spec.generate(prompt(60), **GREEDY)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        assert again(spec, prompt(60), 0) == fresh(model, prompt(60))
        assert again(spec, prompt(60), 59) == fresh(model, prompt(60))

    @pytest.mark.filterwarnings("ignore::FutureWarning")  # peft calls what is deprecated
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_adapters(self):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(tiny_model("llama"), config)
        spec = SpecExtend(model, None, SMALL)
        texts = []
        for change in (lambda: None, model.base_model.disable_adapter_layers,
                       model.base_model.enable_adapter_layers):  # fmt: skip
            change()
            spec.generate(prompt(60), **GREEDY)
            assert spec.stats.num_cached_tokens == 0
            texts.append(again(spec, prompt(60), 59))
        assert texts[0] == texts[2] != texts[1]


class TestShelf:
    def test_the_one_used_least_recently_leaves_first(self):
        spec = SpecExtend(target(), target(), SMALL, keep_contexts=2)
        a, b, c = (prompt(40, seed) for seed in (1, 2, 3))
        for ids, cached in ((a, 0), (b, 0), (a, 39), (c, 0), (b, 0), (c, 39)):
            again(spec, ids, cached)

    def test_a_text_that_shares_little_is_another_one(self):
        spec = SpecExtend(target(), target(), SMALL, keep_contexts=2)
        ids = prompt(60)
        other = leaving(ids, 10)
        for given, cached in ((ids, 0), (other, 10), (ids, 59), (other, len(other[0]) - 1)):
            assert again(spec, given, cached) == fresh(target(), given)

    def test_bytes(self):
        spec = SpecExtend(target(), target(), SMALL, keep_contexts=3)
        spec.generate(prompt(40, 1), **GREEDY)
        (one,) = spec._shelf._contexts
        assert one.num_bytes > 40 * 2 * 2 * 2 * 8 * 4
        tight = SpecExtend(target(), target(), SMALL, keep_contexts=3, keep_bytes=one.num_bytes)
        for ids, cached in ((prompt(40, 1), 0), (prompt(40, 2), 0), (prompt(40, 2), 39)):
            again(tight, ids, cached)
        assert len(tight._shelf._contexts) == 1
        none = SpecExtend(target(), target(), SMALL, keep_bytes=one.num_bytes - 1)
        for _ in range(2):
            again(none, prompt(40, 1), 0)

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            (dict(keep_contexts=-1), "keep_contexts must not be negative, got -1"),
            (dict(keep_bytes=-1), "keep_bytes must not be negative, got -1"),
        ],
    )
    def test_errors(self, options, error):
        with pytest.raises(ValueError, match=error):
            SpecExtend(target(), None, SMALL, **options)

    def test_one_that_is_in_use_is_left_alone(self):
        shelf, context = Shelf(1), Context()
        context._text = prompt(5)[0]
        shelf.put(context)
        with context.in_use():
            assert shelf.take(prompt(9)) is not context


class TestByHand:
    @pytest.mark.sweep(4)
    @pytest.mark.parametrize("kind", KINDS)
    def test_read_and_fork(self, kind, tmp_path):
        """Several questions on one document, each with its own continuation."""
        spec = SpecExtend(target(), draft(kind, folder=tmp_path), SMALL)
        document = prompt(50)
        context = spec.read(document)
        assert context.ids.tolist() == document.tolist() and context.get_seq_length() == 50
        forks = [context.fork() for _ in range(3)]
        for turn in range(2):
            for seed, fork in enumerate(forks):
                ids = torch.cat([fork.ids, prompt(6, 10 * turn + seed)], 1)
                cached = fork.get_seq_length()
                assert again(spec, ids, cached, past_key_values=fork) == fresh(target(), ids)
                assert fork.get_seq_length() == ids.shape[1] + NEW - 1
        assert context.ids.tolist() == document.tolist()

    def test_one_that_is_returned(self):
        spec = SpecExtend(target(), target(), SMALL, keep_contexts=0)
        out = spec.generate(prompt(60), return_dict_in_generate=True, **GREEDY)
        context = out[CACHE]
        longer = torch.cat([out.sequences, prompt(5, 2)], 1)
        assert again(spec, longer, 60 + NEW - 1, past_key_values=context) == fresh(target(), longer)
        same = spec.generate(
            longer, past_key_values=context, return_dict_in_generate=True, **GREEDY
        )
        assert same[CACHE] is context
        out = target().generate(longer, custom_generate=spec, **{CACHE: context}, **GREEDY)
        assert out[0].tolist() == fresh(target(), longer)
        assert spec.stats.num_cached_tokens == longer.shape[1] - 1

    def test_one_of_another_draft(self, tmp_path):
        """Its rows of the target serve; the draft reads what it lacks."""
        context = SpecExtend(target(), draft("model"), SMALL).read(prompt(50))
        spec = SpecExtend(target(), draft("longspec"), SMALL)
        ids = torch.cat([prompt(50), prompt(5, 1)], 1)
        assert again(spec, ids, 50, past_key_values=context) == fresh(target(), ids)
        spec = SpecExtend(target(), draft("eagle", folder=tmp_path), SMALL)
        again(spec, ids, 0, past_key_values=context)  # what the target saw is not kept

    def test_one_of_another_draft_of_the_same_kind(self):
        """What the other one has kept is no part of what is proposed."""
        config, ids = SMALL.replace(draft_cache="full"), prompt(50)
        found = []
        for before in (None, tiny_model(seed=5)):
            spec = SpecExtend(target(), draft("model"), config)
            given = {}
            if before is not None:
                given[CACHE] = SpecExtend(target(), before, config).read(ids)
            out = again(spec, ids, 49 if given else 0, **given)
            found.append((out, spec.stats.acceptance_histogram))
        assert found[0] == found[1]

    @pytest.mark.sweep(8)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("length", [1, 50, 59, 60])
    def test_a_cache_of_transformers(self, kind, length, tmp_path):
        spec = SpecExtend(target(), draft(kind, folder=tmp_path), SMALL)
        theirs = DynamicCache(config=target().config)
        with torch.no_grad():
            target()(prompt(60)[:, :length], **{CACHE: theirs})
        before = [layer.keys.clone() for layer in theirs.layers]
        cached = 0 if kind.startswith("eagle") else min(length, 59)
        assert again(spec, prompt(60), cached, past_key_values=theirs) == list(wanted(60))
        assert all(map(torch.equal, before, (layer.keys for layer in theirs.layers)))

    @pytest.mark.parametrize("family", ["lfm2", "qwen3_next", "falcon_h1"])
    def test_a_cache_of_transformers_with_states(self, family):
        model, ids = miniature(family), prompt(60)
        theirs = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :50], **{CACHE: theirs})
        spec = SpecExtend(model, None, SMALL)
        assert again(spec, ids, 50, past_key_values=theirs) == fresh(model, ids)

    def cache_of(self, model, length=50, dtype=None):
        theirs = DynamicCache(config=model.config)
        with torch.no_grad():
            model(prompt(length), **{CACHE: theirs})
        return theirs

    @pytest.mark.parametrize(
        ("make", "error"),
        [
            (lambda self: self.cache_of(tiny_model("llama", num_hidden_layers=3)),
             "the model's 2 layers, got 3"),
            (lambda self: self.cache_of(tiny_model("llama", dtype=torch.bfloat16)),
             "layer 0 of the cache must have keys in torch.float32, got torch.bfloat16"),
            (lambda self: self.cache_of(tiny_model("llama", num_key_value_heads=4)),
             r"layer 0 of the cache must have keys \[1, 2, 50, 8\] of all 50 tokens, got \[1, 4"),
            (lambda self: self.cache_of(tiny_model("llama"), 70),
             "the cache has 70 tokens and the prompt 60"),
            (lambda self: [1], "must be a Context of specextend or a DynamicCache"),
        ],
    )  # fmt: skip
    def test_caches_that_do_not_fit(self, make, error):
        spec = SpecExtend(target(), None, SMALL)
        with pytest.raises(ValueError, match=error):
            spec.generate(prompt(60), past_key_values=make(self), **GREEDY)
        assert again(spec, prompt(60), 0) == list(wanted(60))

    def test_a_cache_that_has_forgotten_rows(self):
        model = tiny_model("mistral")
        spec = SpecExtend(model, None, SMALL)
        with pytest.raises(ValueError, match=r"must have keys .* of all 50 tokens, got \[1, 2, 23"):
            spec.generate(prompt(60), past_key_values=self.cache_of(model), **GREEDY)

    def test_a_cache_that_does_not_say_how_long_it_is(self):
        """Of states alone: it was taken for one of a single token."""
        model, ids = miniature("mamba2"), prompt(60)
        theirs = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :50], **{CACHE: theirs})
        spec = SpecExtend(model, None, SMALL)
        with pytest.raises(ValueError, match="does not say how many tokens it has taken in"):
            spec.generate(ids, past_key_values=theirs, **GREEDY)
        assert again(spec, ids, 0) == fresh(model, ids)

    def test_two_names(self):
        spec = SpecExtend(target(), None, SMALL)
        given = dict(past_key_values=Context(), cache=Context())
        with pytest.raises(ValueError, match="two names of one argument"):
            spec.generate(prompt(60), **given, **GREEDY)

    def test_one_that_is_in_use(self):
        spec, other = (SpecExtend(target(), None, SMALL) for _ in range(2))
        context = spec.read(prompt(50))
        ids = torch.cat([prompt(50), prompt(5, 1)], 1)
        steps = spec.stream(ids, past_key_values=context, **GREEDY)
        next(steps)
        with pytest.raises(RuntimeError, match="this context is in the middle of a generation"):
            other.generate(ids, past_key_values=context, **GREEDY)
        with pytest.raises(RuntimeError, match="this context is in the middle of a generation"):
            context.fork()
        steps.close()
        assert again(other, ids, 54, past_key_values=context) == fresh(target(), ids)

    @pytest.mark.parametrize("kind", ["model", "eagle"])
    def test_forks_as_on_a_gpu(self, kind, tmp_path):
        """Rows of two granules are there once; heads lie side by side in them."""
        with emulated_gpu_memory() as gpu:
            spec = SpecExtend(target(), draft(kind, folder=tmp_path), SMALL)
            document = prompt(150)
            context = spec.read(document)
            before = gpu.memory_in_use
            forks = [context.fork() for _ in range(2)]
            assert 0 < gpu.memory_in_use < 2 * before
            for turn in range(2):
                for seed, fork in enumerate(forks):
                    ids = torch.cat([fork.ids, prompt(6, 10 * turn + seed)], 1)
                    cached = fork.get_seq_length()
                    assert again(spec, ids, cached, past_key_values=fork) == fresh(target(), ids)
            ids = leaving(document, 70)  # inside of what is shared
            assert again(spec, ids, 70, past_key_values=forks[0]) == fresh(target(), ids)
            ids = torch.cat([document, prompt(6, 5)], 1)
            assert again(spec, ids, 150, past_key_values=context) == fresh(target(), ids)

    def test_a_gpu_without_room_for_forks(self):
        """What has been read serves all the same."""
        with emulated_gpu_memory() as gpu:
            spec = SpecExtend(target(), None, SMALL)
            gpu.leave(0)
            context = spec.read(prompt(150))
            with pytest.raises(torch.OutOfMemoryError, match="no memory left for rows of a text"):
                context.fork()
            ids = torch.cat([context.ids, prompt(6)], 1)
            assert again(spec, ids, 150, past_key_values=context) == fresh(target(), ids)
            gpu.leave(None)
            fork = context.fork()
            ids = torch.cat([fork.ids, prompt(6, 1)], 1)
            cached = fork.get_seq_length()
            assert again(spec, ids, cached, past_key_values=fork) == fresh(target(), ids)

    def test_forks_at_a_time(self):
        """Two loops on the same models write to forks in turn."""
        specs = [SpecExtend(target(), draft("model"), SMALL) for _ in range(2)]
        context = specs[0].read(prompt(50))
        texts = [torch.cat([prompt(50), prompt(5, i)], 1) for i in (1, 2)]
        streams = [
            spec.stream(ids, past_key_values=context.fork(), **GREEDY)
            for spec, ids in zip(specs, texts, strict=True)
        ]
        written: list[list[int]] = [[], []]
        while any(len(tokens) < NEW for tokens in written):
            for stream, tokens in zip(streams, written, strict=True):
                tokens += next(stream, None).tokens if len(tokens) < NEW else []
        for ids, tokens in zip(texts, written, strict=True):
            assert ids[0].tolist() + tokens == fresh(target(), ids)


def test_two_threads():
    """Each with its own loop and conversation, on the same models."""
    model, other = target(), draft("model")
    found: dict[int, list] = {}

    def talk(seed: int) -> None:
        spec, ids = SpecExtend(model, other, SMALL), prompt(40, seed)
        for turn in range(4):
            out = spec.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
            found.setdefault(seed, []).append((ids, out[0].tolist(), spec.stats.num_cached_tokens))
            ids = torch.cat([out, prompt(5, 10 * seed + turn)], 1)

    threads = [threading.Thread(target=talk, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        assert [cached for *_, cached in found[seed]] == [0, 51, 68, 85]
        for ids, out, _ in found[seed]:
            assert out == fresh(model, ids)


def test_one_loop_in_two_threads():
    """The second one is refused, and disturbs nothing."""
    spec = SpecExtend(target(), None, SMALL)
    steps = spec.stream(prompt(60), **GREEDY)
    tokens = next(steps).tokens
    caught = []

    def meddle() -> None:
        try:
            spec.generate(prompt(40), **GREEDY)
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=meddle)
    thread.start()
    thread.join()
    assert "in the middle of a generation" in caught[0]
    for step in steps:
        tokens += step.tokens
    assert prompt(60)[0].tolist() + tokens == list(wanted(60))


def test_a_draft_that_knows_nothing_of_contexts(tmp_path):
    """It begins anew; one that wants features has the prompt read again."""

    class Simple(Draft):
        def begin(self, prompt, max_length, cache, graphs) -> None:
            self.seen = 0

        def prefill(self, decided) -> None:
            self.seen += len(decided)

        def propose(self, decided, depth, price=None):
            from specextend.tree import Tree

            return Tree.of(decided.tokens[:, -1:], [])

    simple = Simple()
    spec = SpecExtend(target(), simple, SMALL)
    spec.generate(prompt(60), **GREEDY)
    assert again(spec, prompt(60), 59) == list(wanted(60)) and simple.seen == 0
    simple.feature_layers = (1,)
    out = spec.generate(prompt(60), **GREEDY)
    assert out[0].tolist() == list(wanted(60))
    assert simple.seen == 59 and spec.stats.num_cached_tokens == 0
