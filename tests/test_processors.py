"""Logits processors of any kind are given what ``generate`` gives them, and write the same text."""

from __future__ import annotations

import inspect

import pytest
import torch
from drafts import KINDS, SMALL, WAYS, draft, target, write
from models import VOCAB, prompt
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import WatermarkingConfig
from transformers.generation import logits_process as hf

from specextend import SpecExtend, ops
from specextend.sampling import STATELESS, TokenChooser
from specextend.stopping import Stop

# All other processors of transformers. A class that is in neither list has come with a new version:
# it belongs here, unless it looks at a row of scores alone and keeps nothing from call to call.
WALKED = {
    "AlternatingCodebooksLogitsProcessor", "BarkEosPrioritizerLogitsProcessor",
    "ClassifierFreeGuidanceLogitsProcessor", "DiaClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSChannelFilterLogitsProcessor", "DiaEOSDelayPatternLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor",
    "ExponentialDecayLengthPenalty", "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor", "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor", "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor", "PrefixConstrainedLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor", "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor",
    "TopHLogitsWarper", "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "WatermarkLogitsProcessor", "WhisperNoSpeechDetection", "WhisperTimeStampLogitsProcessor",
}  # fmt: skip


def processor_classes():
    classes = (c for _, c in inspect.getmembers(hf, inspect.isclass))
    return {c for c in classes if issubclass(c, LogitsProcessor) and c is not LogitsProcessor}


def stop_behind(ids=None) -> Stop:
    ids = torch.tensor([[9, 8, 5, 4]]) if ids is None else ids
    return Stop([], ids.shape[1] + 100, ids)


def chooser(*processors, sample=False, stop=None) -> TokenChooser:
    return TokenChooser(LogitsProcessorList(processors), sample, 0, stop or stop_behind())


# ---- the table -----------------------------------------------------------------------------------


def test_the_table_knows_every_processor_of_this_transformers():
    theirs = {c for c in processor_classes() if c.__module__ == hf.__name__}
    assert set(STATELESS) <= theirs
    assert {c.__name__ for c in theirs - set(STATELESS)} <= WALKED


STATELESS_ONES = [
    hf.TemperatureLogitsWarper(0.7), hf.TopKLogitsWarper(5), hf.TopPLogitsWarper(0.9),
    hf.MinPLogitsWarper(0.1), hf.TypicalLogitsWarper(0.9), hf.EpsilonLogitsWarper(0.01),
    hf.EtaLogitsWarper(0.01, device="cpu"), hf.LogitNormalization(),
    hf.InfNanRemoveLogitsProcessor(), hf.SuppressTokensLogitsProcessor([3, 7], device="cpu"),
]  # fmt: skip


def test_every_stateless_one_is_tried():
    assert {type(p) for p in STATELESS_ONES} == set(STATELESS)


@pytest.mark.parametrize("processor", STATELESS_ONES, ids=lambda p: type(p).__name__)
def test_stateless_ones_look_at_a_row_alone(processor):
    """The same bits for a row alone, among others, at any time, with any tokens before it."""
    logits = 3 * torch.randn(1, 7, 50, generator=torch.Generator().manual_seed(0))
    before, choose = logits.clone(), chooser(processor)
    assert not choose.walks
    together = choose.scores(logits)
    assert torch.equal(logits, before)
    for node in (3, 0, 6):
        ids = torch.full((1, 4), node)
        assert torch.equal(processor(ids, before[:, node].clone()), together[:, node])


@pytest.mark.parametrize("parent", STATELESS, ids=lambda c: c.__name__)
def test_heirs_are_not_taken_for_their_parents(parent):
    heir = type("Heir", (parent,), {"__init__": lambda self: None})()
    assert chooser(heir).walks and not chooser(*STATELESS_ONES).walks


# ---- the walk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [False, True])
def test_walk_equals_the_walk_on_the_device(sample):
    """Over random trees, with siblings of one token and nodes that no path reaches."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(40):
        nodes = int(torch.randint(1, 12, (), generator=generator))
        tokens = torch.randint(4, (1, nodes), generator=generator)
        draws = [int(torch.randint(i, (), generator=generator)) for i in range(1, nodes)]
        parents = torch.tensor([[-1, *draws]], dtype=torch.int32)
        if nodes > 3:
            parents[0, -1] = -1
        logits = torch.randn(1, nodes, 4, generator=generator)
        positions = torch.randint(20, (1, nodes), generator=generator)
        choose = chooser(sample=sample)
        choices = choose.choose(logits, positions)
        expected = ops.verify_tree(tokens, parents, choices)
        scores, *got = choose.walk(logits, positions, tokens, parents)
        assert torch.equal(scores, logits)
        assert all(
            torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, expected, strict=True)
        )


class Recording(LogitsProcessor):
    """Keeps what it is given, and wants what ``generate`` gives."""

    def __init__(self):
        self.histories = []

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == scores.shape[0] == 1 and input_ids.dtype == torch.int64
        assert scores.dtype == torch.float32 and not torch.is_inference_mode_enabled()
        assert not scores.is_inference() and not input_ids.is_inference()
        self.histories.append(input_ids[0].tolist())
        return scores


class Automaton(LogitsProcessor):
    """Goes from state to state by the last token, as grammars do; a state allows some tokens."""

    def __init__(self):
        self.state, self.length = 0, None

    def __call__(self, input_ids, scores):
        if self.length is not None:
            assert input_ids.shape[1] == self.length + 1
            self.state = (3 * self.state + int(input_ids[0, -1])) % 5
        self.length = input_ids.shape[1]
        allowed = torch.arange(scores.shape[1]) % 5 != self.state
        return scores.masked_fill(~allowed, -torch.inf)


class Counter(LogitsProcessor):
    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores[:, self.calls % VOCAB] += 40.0 * (self.calls % 3 == 0)  # in place, too
        return scores


class TopKThatReads(hf.TopKLogitsWarper):
    def __call__(self, input_ids, scores):
        scores = super().__call__(input_ids, scores)
        return scores.scatter(1, input_ids[:, -3:], -torch.inf)


def allowed_tokens(batch_id, ids):
    return [(int(ids[-1]) + i) % VOCAB for i in (7, 11, 30)] if batch_id == 0 else 1 / 0


# Options of `generate` by what is tried. Each has to change the text, or it shows nothing.
USERS = {
    "automaton": lambda: dict(logits_processor=[Automaton()]),
    "counter": lambda: dict(logits_processor=[Counter()]),
    "heir": lambda: dict(logits_processor=[TopKThatReads(9)]),
    "prefix": lambda: dict(prefix_allowed_tokens_fn=allowed_tokens),
}
COUNTING = {
    "min_new_tokens": lambda: dict(min_new_tokens=12),
    "min_length": lambda: dict(min_length=44),
    "forced_eos": lambda: dict(forced_eos_token_id=3, eos_token_id=None),
    "begin_suppress": lambda: dict(begin_suppress_tokens=list(range(50, 80))),
    "decay": lambda: dict(exponential_decay_length_penalty=(0, 3.0)),
    "repetition": lambda: dict(repetition_penalty=1.7),
    "ngrams": lambda: dict(no_repeat_ngram_size=1),
    "bad_words": lambda: dict(bad_words_ids=[[i] for i in range(3, 50)]),
    "bias": lambda: dict(sequence_bias={(i,): 8.0 for i in range(5, 12)}),
    "guidance": lambda: dict(guidance_scale=2.5),
    "watermark": lambda: dict(watermarking_config=WatermarkingConfig(bias=6.0)),
    "encoder_repetition": lambda: dict(encoder_repetition_penalty=2.0),
}
ALL = {**USERS, **COUNTING}


@pytest.fixture(scope="module")
def ends():
    """Choose an end token that plain decoding meets early, so that counting options matter."""
    text = target().generate(prompt(30), max_new_tokens=20, do_sample=False)[0, 30:].tolist()
    return text[4]


def padded(ids, pads):
    """Return a prompt with ``pads`` tokens of padding on its left, and its mask."""
    ids = torch.cat([torch.zeros(1, pads, dtype=torch.int64), ids], 1)
    mask = torch.ones_like(ids)
    mask[:, :pads] = 0
    return ids, mask


@pytest.mark.sweep(3)
@pytest.mark.parametrize("pads", [0, 6])
@pytest.mark.parametrize("name", ALL)
def test_greedy_text_is_generates(name, pads, ends):
    ids, mask = padded(prompt(30), pads)
    common = dict(max_new_tokens=20, do_sample=False, eos_token_id=ends, attention_mask=mask)
    expected = target().generate(ids, **{**common, **ALL[name]()})[0, ids.shape[1] :].tolist()
    if "eos_token_id" in ALL[name]():
        common["eos_token_id"] = None
    assert expected != target().generate(ids, **common)[0, ids.shape[1] :].tolist()
    for kind, way in (("model", "generate"), ("none", "custom_generate"), ("ngram", "stream")):
        spec = SpecExtend(target(), draft(kind), SMALL)
        options = {**common, **ALL[name]()}
        assert write(spec, way, ids, **options) == expected, (kind, way)


@pytest.mark.sweep(4)
@pytest.mark.parametrize("pads", [0, 5])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_users_processors_with_every_draft(kind, way, pads, ends, tmp_path):
    """Greedy: as ``generate``. Sampled: as without a draft. In order, once per token, padded."""
    ids, mask = padded(prompt(30), pads)
    common = dict(max_new_tokens=14, attention_mask=mask)
    spec = SpecExtend(target(), draft(kind, folder=tmp_path), SMALL)
    plain = SpecExtend(target(), None, SMALL)
    for options in (dict(do_sample=False), dict(do_sample=True, temperature=1.3, top_k=20)):
        texts = []
        for one in (spec, plain):
            watch = Recording()
            text = write(
                one, way, ids, **common, **options,
                logits_processor=[Automaton(), Counter(), watch],
            )  # fmt: skip
            texts.append(text)
            whole = ids[0].tolist() + text
            assert watch.histories == [whole[: ids.shape[1] + i] for i in range(len(text))]
        assert texts[0] == texts[1] and len(text) == 14
        if not options["do_sample"]:
            processors = [Automaton(), Counter()]
            theirs = target().generate(ids, **common, **options, logits_processor=processors)
            assert text == theirs[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("at", range(1, 8))
def test_no_call_behind_the_end(at):
    """Where a path goes on behind the token that ends the text, processors do not follow it."""
    ids, model = prompt(30), target()
    text = model.generate(ids, max_new_tokens=20, do_sample=False)[0, 30:].tolist()
    watch, spec = Recording(), SpecExtend(model, model, SMALL)
    eos = text[at]
    out = spec.generate(
        ids, max_new_tokens=20, do_sample=False, eos_token_id=eos, logits_processor=[watch]
    )
    assert out[0, 30:].tolist() == text[: text.index(eos) + 1]
    assert len(watch.histories) == text.index(eos) + 1


def test_processors_and_criteria_take_turns():
    """As in ``generate``: a token's processors, then its criteria, then the next token's."""
    calls, ids = [], prompt(30)

    def processor(input_ids, scores):
        calls.append(("processor", input_ids.shape[1]))
        return scores

    def criterion(input_ids, scores, **kwargs):
        calls.append(("criterion", input_ids.shape[1]))
        return torch.tensor([input_ids.shape[1] >= 41])

    given = dict(logits_processor=[processor], stopping_criteria=[criterion])
    target().generate(ids, max_new_tokens=20, do_sample=False, **given)
    expected, calls[:] = list(calls), []
    SpecExtend(target(), target(), SMALL).generate(ids, max_new_tokens=20, do_sample=False, **given)
    assert calls == expected and len(calls) == 22


def test_scores_are_the_processed_ones():
    ids = prompt(30)
    common = dict(
        max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_scores=True,
        output_logits=True,
    )  # fmt: skip
    theirs = target().generate(ids, **common, logits_processor=[TopKThatReads(9)])
    spec = SpecExtend(target(), draft("model"), SMALL)
    ours = spec.generate(ids, **common, logits_processor=[TopKThatReads(9)])
    for name in ("scores", "logits"):
        a, b = (torch.cat(getattr(out, name)) for out in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_nothing_allowed_is_said():
    spec = SpecExtend(target(), draft("model"), SMALL)
    nothing = [lambda ids, scores: torch.full_like(scores, -torch.inf)]
    for sample in (False, True):
        with pytest.raises(ValueError, match="position 29 are NaN, or -inf for every token"):
            spec.generate(prompt(30), max_new_tokens=4, do_sample=sample, logits_processor=nothing)


# ---- a grammar library's own ---------------------------------------------------------------------


@pytest.mark.sweep(5)
@pytest.mark.parametrize("kind", KINDS)
def test_xgrammar(kind, tmp_path):
    """Its processor wants one call per token, and refuses to go on behind the end."""
    xgrammar = pytest.importorskip("xgrammar")
    from xgrammar.contrib.hf import LogitsProcessor as Grammar

    words = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", *'0123456789{}[]:,"']
    words += [f"<{i}>" for i in range(len(words), VOCAB)]
    info = xgrammar.TokenizerInfo(words, vocab_size=VOCAB, stop_token_ids=[2])
    rule = 'root ::= "{" pair ("," pair)* "}"\npair ::= [a-z]+ ":" [0-9] [0-9]?'
    grammar = xgrammar.GrammarCompiler(info).compile_grammar(rule)
    spec = SpecExtend(target(), draft(kind, folder=tmp_path), SMALL)
    plain = SpecExtend(target(), None, SMALL)
    ids, common = prompt(30), dict(max_new_tokens=30, eos_token_id=2)
    for sample in (False, True):
        options = dict(common, do_sample=sample, **(dict(temperature=2.0) if sample else {}))
        text, expected = (
            write(s, "generate", ids, **options, logits_processor=[Grammar(grammar)])
            for s in (spec, plain)
        )
        assert text == expected
        if not sample:
            theirs = target().generate(ids, **options, logits_processor=[Grammar(grammar)])
            assert text == theirs[0, 30:].tolist()
        written = "".join(words[t] for t in text)
        assert written.startswith("{") and (":" in written or len(text) == 30)
