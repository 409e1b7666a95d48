"""What users ask of ``generate`` is honoured in all three ways in, or refused by name."""

from __future__ import annotations

import pytest
import torch
from drafts import KINDS, SMALL, WAYS, draft, target, write
from models import prompt, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StopStringCriteria,
    pipeline,
)
from transformers.generation import EosTokenCriteria

from specextend import SpecExtend, hf

GREEDY = dict(max_new_tokens=20, do_sample=False)


def theirs(ids, model=None, **kwargs):
    return (model or target()).generate(ids, **kwargs)[0, ids.shape[1] :].tolist()


def spec_of(kind="model", **kwargs):
    return SpecExtend(target(), draft(kind), SMALL, **kwargs)


# ---- options -------------------------------------------------------------------------------------


def test_every_option_is_in_one_table():
    """What a new version of `transformers` brings is refused until it is looked at."""
    tables = (hf.HONOURED, hf.IDLE, hf.COMPUTING)
    assert sum(map(len, tables)) == len(frozenset.union(*tables))
    refused = {"num_return_sequences", "output_attentions", "output_hidden_states", "token_healing"}
    known = {n for n in vars(GenerationConfig()) if not n.startswith("_")}
    assert known - frozenset.union(*tables) <= refused | {"continuous_batching_config"}


MODES = [
    dict(num_beams=3), dict(penalty_alpha=0.6, top_k=4), dict(prompt_lookup_num_tokens=3),
    dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.5), dict(assistant_early_exit=1),
    dict(dola_layers="low"), dict(force_words_ids=[[5]], num_beams=2),
]  # fmt: skip
OTHERS = [
    dict(num_return_sequences=2, do_sample=True), dict(cache_implementation="static"),
    dict(cache_implementation="offloaded"), dict(use_cache=False), dict(prefill_chunk_size=8),
    dict(output_attentions=True, return_dict_in_generate=True),
    dict(output_hidden_states=True, return_dict_in_generate=True),
]  # fmt: skip


@pytest.mark.sweep(12)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [*MODES, *OTHERS], ids=lambda o: next(iter(o)))
def test_what_cannot_be_honoured_is_refused_by_name(options, way):
    ids, spec = prompt(20), spec_of()
    with pytest.raises(ValueError, match=next(iter(options))):
        # Some are refused by `transformers` before it calls, for reasons of its own.
        write(spec, way, ids, **{"max_new_tokens": 4, "do_sample": False, **options})
    assert write(spec, way, ids, **GREEDY) == theirs(ids, **GREEDY)


@pytest.mark.parametrize("way", WAYS)
def test_assistant_model(way):
    with pytest.raises(ValueError, match=r"assistant_model is not available.*SpecExtend\(draft=\)"):
        write(spec_of(), way, prompt(20), assistant_model=tiny_model("llama", seed=1), **GREEDY)


@pytest.mark.parametrize("way", WAYS)
def test_options_of_a_checkpoint_that_do_not_matter(way):
    """How it would be computed, and what beams and assistants would do, say nothing of the text."""
    model, ids = tiny_model("llama"), prompt(30)
    expected = theirs(ids, model, **GREEDY)
    model.config.use_cache = False
    own = model.generation_config
    own.use_cache, own.num_assistant_tokens, own.length_penalty = False, 5, 2.0
    own.cache_implementation, own.early_stopping = "static", True
    own.of_an_older_version = 7
    spec = SpecExtend(model, draft("model"), SMALL)
    assert write(spec, way, ids, **GREEDY) == expected


def test_beams_of_a_checkpoint_are_refused():
    model = tiny_model("llama")
    model.generation_config.num_beams = 4
    with pytest.raises(ValueError, match="num_beams=4 asks for beam search"):
        SpecExtend(model, None, SMALL).generate(prompt(8), **GREEDY)


def test_sampling_options_of_a_checkpoint():
    """They are the call's defaults, as in ``generate``; a greedy call leaves them aside."""
    model, ids = tiny_model("llama"), prompt(30)
    model.generation_config.update(do_sample=True, temperature=0.3, top_k=3, repetition_penalty=1.5)
    spec = SpecExtend(model, draft("model"), SMALL)
    assert write(spec, "generate", ids, **GREEDY) == theirs(ids, model, **GREEDY)
    plain = SpecExtend(model, None, SMALL)
    one, other = (write(s, "generate", ids, max_new_tokens=20) for s in (spec, plain))
    assert one == other != theirs(ids, model, **GREEDY)


# ---- inputs and outputs --------------------------------------------------------------------------


@pytest.mark.sweep(2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["none", "model", "ngram"])
def test_int32_ids(kind, way):
    ids = prompt(30)
    options = dict(GREEDY, repetition_penalty=1.3)
    assert write(spec_of(kind), way, ids.int(), **options) == theirs(ids, **options)
    assert write(spec_of(kind), way, ids.int(), **GREEDY) == theirs(ids, **GREEDY)
    out = spec_of(kind).generate(ids.int(), **GREEDY)
    assert out.dtype == target().generate(ids.int(), **GREEDY).dtype


@pytest.mark.sweep(9)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, dict(repetition_penalty=1.3)], ids=["device", "walk"])
def test_what_is_returned_can_be_changed_and_learnt_from(kind, options, tmp_path):
    spec = SpecExtend(target(), draft(kind, folder=tmp_path), SMALL)
    out = spec.generate(
        prompt(60), **GREEDY, **options, return_dict_in_generate=True, output_scores=True,
        output_logits=True,
    )  # fmt: skip
    tensors = [out.sequences, *out.scores, *out.logits, *spec.stats.retrieved_ids]
    assert not any(t.is_inference() for t in tensors)
    out.scores[0][0, :3] = 0
    weight = torch.zeros(97, requires_grad=True)
    (weight * out.logits[-1]).sum().backward()
    assert torch.equal(weight.grad, out.logits[-1][0])


def test_a_greedy_run_draws_nothing():
    spec = SpecExtend(target(), draft("model"), SMALL, seed=None)
    before = torch.get_rng_state()
    spec.generate(prompt(20), **GREEDY)
    assert torch.equal(torch.get_rng_state(), before)
    spec.generate(prompt(20), max_new_tokens=4, do_sample=True)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("at", [7, 19])
def test_a_pad_token_inside_the_prompt(at):
    ids = prompt(20)
    ids[0, at] = 0
    text = "pad token 0 elsewhere than on its left; give an attention_mask"
    with pytest.raises(ValueError, match=text):
        spec_of().generate(ids, **GREEDY)
    mask = torch.ones_like(ids)
    out = write(spec_of(), "generate", ids, attention_mask=mask, **GREEDY)
    assert out == theirs(ids, attention_mask=mask, **GREEDY)


# ---- ends ----------------------------------------------------------------------------------------


def tokenizer():
    """Make a byte-level tokenizer of the tiny models' size: characters, and pairs of them."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", *"0123456789", "\u0120"]
    pairs = [(a, b) for a in letters[:8] for b in letters[8:16]][: 97 - 3 - len(letters)]
    entries = ["<pad>", "<unk>", "<end>", *letters, *(a + b for a, b in pairs)]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    made = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def words():
    """Return a tokenizer, and text that plain decoding of `prompt(30)` writes."""
    made = tokenizer()
    return made, made.decode(theirs(prompt(30), **GREEDY))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("where", ["call", "constructor"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("source", ["argument", "configuration", "checkpoint"])
def test_stop_strings(source, way, where, words):
    """Given as users give them: a string that ends inside a token, across tokens, at any place."""
    made, text = words
    ids, stops = prompt(30), [text[i : i + n] for i in range(0, 20, 3) for n in (1, 4)]
    for stop in stops:
        model = tiny_model("llama")
        kwargs = dict(GREEDY)
        if source == "argument":
            kwargs["stop_strings"] = [stop]
        elif source == "configuration":
            kwargs = dict(generation_config=GenerationConfig(**GREEDY, stop_strings=stop))
        else:
            model.generation_config.stop_strings = [stop]
        expected = theirs(ids, model, tokenizer=made, **kwargs)
        spec = SpecExtend(
            model, draft("model"), SMALL, tokenizer=made if where == "constructor" else None
        )
        if where == "call":
            kwargs["tokenizer"] = made
        assert write(spec, way, ids, **kwargs) == expected, stop


@pytest.mark.parametrize("way", WAYS)
def test_stop_strings_without_a_tokenizer(way):
    with pytest.raises(ValueError, match="tokenizer"):
        write(spec_of(), way, prompt(20), stop_strings=["x"], **GREEDY)


def test_pipeline_with_stop_sequence(words):
    made, text = words
    model = tiny_model("llama")
    write = pipeline("text-generation", model=model, tokenizer=made)
    options = dict(GREEDY, stop_sequence=text[9:12], return_full_text=False)
    start = made.decode(prompt(30)[0])
    (expected,) = write(start, **options)
    spec = SpecExtend(model, draft("model"), SMALL, tokenizer=made)
    assert write(start, custom_generate=spec, **options) == [expected]


class EosThatWaits(EosTokenCriteria):
    """Ends at the token's second coming."""

    seen = 0

    def __call__(self, input_ids, scores, **kwargs):
        met = super().__call__(input_ids, scores)
        self.seen += int(met)
        return met & (self.seen > 1)


class EndsInBool(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] % 7 == 5])


def criteria(ids):
    token = theirs(ids, **GREEDY)[3]
    return [
        [MaxLengthCriteria(33)], [MaxLengthCriteria(60)], [MaxLengthCriteria(ids.shape[1])],
        [EosTokenCriteria(token)], [EosThatWaits(token)], [EndsInBool()],
        [MaxLengthCriteria(45), EndsInBool()],
    ]  # fmt: skip


@pytest.mark.sweep(10)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["none", "model", "ngram"])
@pytest.mark.parametrize("case", range(7))
def test_criteria_of_the_users(case, kind, way):
    ids = prompt(30)
    expected = theirs(ids, stopping_criteria=criteria(ids)[case], **GREEDY)
    spec = spec_of(kind)
    assert write(spec, way, ids, stopping_criteria=criteria(ids)[case], **GREEDY) == expected


@pytest.mark.sweep(2)
@pytest.mark.parametrize("walk", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_add_up_for_every_end(kind, walk, tmp_path):
    """Ends by length, by token and by criterion, at every place of a block."""
    ids, spec = prompt(60), SpecExtend(target(), draft(kind, folder=tmp_path), SMALL)
    options = dict(repetition_penalty=1.01) if walk else {}
    text = theirs(ids, **GREEDY, **options)
    ends = [dict(max_new_tokens=n) for n in (1, 2, 3, 7)]
    ends += [dict(max_new_tokens=20, eos_token_id=t) for t in text[:9]]
    ends += [dict(max_new_tokens=20, stopping_criteria=[EndsInBool()])]
    for end in ends:
        steps = list(spec.stream(ids, do_sample=False, **options, **end))
        stats, count = spec.stats, sum(len(s.tokens) for s in steps)
        assert stats.num_emitted_tokens == count
        assert stats.num_accepted_tokens == sum(s.num_accepted for s in steps)
        assert count == stats.num_rounds + stats.num_accepted_tokens + 1 and len(steps) == (
            stats.num_rounds + 1
        )
        assert stats.num_accepted_tokens == sum(
            n * times for n, times in stats.acceptance_histogram.items()
        )
        assert stats.mean_acceptance_length <= max(len(s.tokens) for s in steps)


def test_stop_string_criteria_of_the_users(words):
    made, text = words
    ids, stop = prompt(30), [StopStringCriteria(made, [text[9:12]])]
    expected = theirs(ids, stopping_criteria=stop, **GREEDY)
    for way in WAYS:
        assert write(spec_of(), way, ids, stopping_criteria=stop, **GREEDY) == expected
