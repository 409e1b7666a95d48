"""Tests the benchmarks' one form, and their figures on set numbers and tiny models."""

from __future__ import annotations

import argparse
import json
import time
from types import SimpleNamespace
from unittest import mock

import bench_acceptance
import bench_answer
import bench_contexts
import bench_decode
import bench_memory
import bench_ops
import bench_prefill
import bench_record
import bench_same_text
import pytest
import torch
from families import WINDOW, miniature
from models import VOCAB, prompt, tiny_model
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from specextend import SpecConfig, SpecExtend, __version__, machine
from specextend.cache import KVCache
from specextend.compat import CACHE, num_cached
from specextend.eval.memory import PeakMemory
from specextend.gate import Gate, break_even
from specextend.pace import Round
from specextend.pair import Pair
from specextend.target import Target
from specextend.testing import Spread, time_calls

RATES = bench_record.Rates(bandwidth=1e9, arithmetic={"fp32": 1e10})


def given(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{"device": "cpu", "filter": "", "json": None, **changes})


@pytest.fixture
def report(tmp_path):
    """Make a report with set rates, and its record as the file has it."""
    with mock.patch.object(bench_record.Rates, "measure", return_value=RATES):
        made = bench_record.Report(given(json=tmp_path / "new/record.json"), 1.0, dtype="fp32")
    return made, lambda: json.loads((tmp_path / "new/record.json").read_text())


def test_header_says_what_was_measured_on(capsys):
    about = machine.header()
    assert about["version"] == __version__ and about["torch"] == torch.__version__
    assert about["threads"] == torch.get_num_threads()
    assert about["machine"].keys() >= {"processor", "cores", "isa", "gpu"}
    assert about["commit"] == machine.commit()
    bench_record.Report(given(), kind="set")
    shown = capsys.readouterr().out
    for name in ("version", "torch", "transformers", "python", "command", "threads"):
        assert about[name] and str(about[name]) in shown, name
    for name in ("processor", "cores", "isa"):
        assert about["machine"][name] and str(about["machine"][name]) in shown, name
    assert (about["commit"] or "no checkout") in shown and "kind set" in shown


def test_a_line_and_its_record(report, capsys):
    made, record = report
    capsys.readouterr()
    spread, peer = Spread([i * 1e-3 for i in range(1, 12)]), Spread([9e-3])
    bound = RATES.bound(num_bytes=3e6, operations=1e6)
    made.add("op P=1", spread, "ms", bound, {"torch": peer}, "a remark", nodes=8)
    cells = [cell.strip() for cell in capsys.readouterr().out.split("|")]
    assert cells == [
        "op P=1", "6.00 (2.00..10.0) ms", "50 % (bandwidth)", "torch 1.50", "a remark"
    ]  # fmt: skip
    entry = record()["cases"][0]
    assert entry["median"] == pytest.approx(6e-3) and entry["samples"] == 11
    assert entry["p10"] == pytest.approx(2e-3) and entry["p90"] == pytest.approx(10e-3)
    assert entry["share"] == pytest.approx(0.5) and entry["nodes"] == 8
    assert entry["peers"]["torch"]["ratio"] == pytest.approx(1.5)
    made.add("other", Spread([5.0]), "tokens")  # written again behind each line
    assert capsys.readouterr().out.split("|")[1].strip() == "5.00 tokens"
    assert [entry["case"] for entry in record()["cases"]] == ["op P=1", "other"]
    assert record()["header"]["version"] == __version__
    assert record()["rates"]["bandwidth"] == 1e9 and record()["settings"] == {"dtype": "fp32"}


def test_bounds_are_of_the_longer_and_add_up():
    reading, computing = RATES.bound(2e9, 1e10), RATES.bound(1e9, 3e10)
    assert (reading.least, reading.kind) == (2.0, "bandwidth")
    assert (computing.least, computing.kind) == (3.0, "arithmetic")
    assert (2 * reading + computing).least == 7.0
    assert (2 * reading + computing).kind == "bandwidth"


def test_spread_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one measurement"):
        Spread([])


def test_caches_are_emptied_before_each_call():
    calls = []
    time_calls(
        lambda: calls.append("a"), lambda: calls.append("b"), seconds=0, min_calls=2,
        before=lambda: calls.append("-"),
    )  # fmt: skip
    assert "".join(calls) == "ab" + "-a-b" * 2  # the first of each is a warm-up
    assert bench_record.cache_bytes() >= 1 << 20
    with mock.patch.object(bench_record, "cache_bytes", return_value=1 << 20):
        assert bench_record.cache_emptier()() == (2 << 20) / 4


BENCHES = [
    bench_acceptance, bench_answer, bench_contexts, bench_decode, bench_memory, bench_ops,
    bench_prefill, bench_same_text,
]  # fmt: skip


@pytest.mark.parametrize("bench", BENCHES, ids=lambda bench: bench.__name__)
def test_options_of_all(bench, tmp_path):
    path = str(tmp_path / "r.json")
    arguments = bench_record.parse(bench.options(), ["--quick", "--filter", "P=16", "--json", path])
    assert arguments.quick and arguments.device in ("cpu", "cuda")
    report = bench_record.Report(arguments)
    assert report.wants("op P=1638") and not report.wants("op P=2048")
    report.save()
    assert json.loads((tmp_path / "r.json").read_text())["cases"] == []
    assert not bench_record.parse(bench.options(), []).quick


def sleep(ms):
    return lambda: time.sleep(ms / 1e3)


@pytest.fixture
def slower_now(report):
    """Make a report of which the machine has become slower since its start: 5 and 10 times."""
    made, record = report
    made.rates = bench_record.Rates(
        1e9, {"fp32": 1e10},
        {"bandwidth": bench_record.Yardstick(sleep(10), 2e6),
         "fp32": bench_record.Yardstick(sleep(5), 0.25e7).times(2)},
    )  # fmt: skip
    return made, record


def test_the_share_is_of_rates_in_turns_with_the_case(slower_now):
    made, record = slower_now
    for flops in (0, 5000):
        line = bench_ops.Line("op", "1x1", "fp32", sleep(1), 1000, flops)
        entry = bench_ops.report(line, lambda line=line: line, made, 0.0, lambda: None)
        now = entry["rates"]
        assert 0.1e9 < now["bandwidth"] <= 0.2e9
        assert entry["bound"]["kind"] == ("arithmetic" if flops else "bandwidth")
        if flops:
            assert 0.25e9 < now["arithmetic"]["fp32"] <= 0.5e9
        least = flops / now["arithmetic"]["fp32"] if flops else 1000 / now["bandwidth"]
        assert entry["share"] == pytest.approx(least / entry["median"])


def test_the_fastest_way_of_a_peer_counts(slower_now):
    report = slower_now
    line = bench_ops.Line(
        "op", "1x1", "fp32", sleep(1), 1000, 500, {"torch": [sleep(60), sleep(20)]}
    )
    entry = bench_ops.report(line, lambda: line, report[0], 0.0, lambda: None)
    assert entry["case"] == "op 1x1 fp32"
    assert 20e-3 <= entry["peers"]["torch"]["median"] < 60e-3


# ---- the cost of a round -------------------------------------------------------------------------


@pytest.mark.parametrize("emitted", [1.9, 2.6])
def test_the_line_of_a_round_agrees_with_the_gate(report, capsys, emitted):
    """What a line says of set costs is what the gate does at these costs."""
    made, record = report

    def rounds(seconds):
        return SimpleNamespace(seconds=seconds, phase_seconds=lambda: {"verify": 0.02})

    own, plain = rounds([0.020, 0.020, 0.026]), rounds([0.010])
    bound = bench_record.Bound(0.011, "bandwidth")
    bench_decode.report(made, "tree", own, plain, bound, bound, emitted=emitted)
    entry = record()["cases"][0]
    assert entry["break_even"] == pytest.approx(break_even(0.022, 0.010)) == pytest.approx(2.2)
    assert entry["peers"]["plain"]["ratio"] == pytest.approx(0.5)  # of medians
    pays = "does not pay" not in capsys.readouterr().out
    gate, depths = Gate(SpecConfig(), 1, follows=True), []
    for _ in range(200):
        depths.append(gate.next_depth())
        took = (1, 1, emitted, 0.022) if depths[-1] else (0, 0, 1, 0.010)
        gate.count(Round(*took))
    assert pays == (emitted > 2.2) == (depths.count(1) > 190)


@pytest.fixture(scope="module")
def pair():
    options = dict(max_position_embeddings=1024)
    return tiny_model("llama", **options), tiny_model("llama", seed=1, **options)


def test_rounds_in_turns_behind_a_stretched_prompt(pair, monkeypatch):
    """All contestants stand behind the whole context, and write in turns."""
    monkeypatch.setattr(bench_decode, "PART", 64)
    config = SpecConfig(
        gate="off", tree_shape="top_k", tree_nodes=4, tree_depth=2, chunk_size=16, budget=128,
        seed=0,
    )  # fmt: skip
    specs = {
        name: SpecExtend(pair[0], draft, config, generation=bench_decode.Stretched)
        for name, draft in (("plain", None), ("tree", pair[1]))
    }
    lengths = []
    stretch = bench_decode.stretch

    def watched(cache, length):
        stretch(cache, length)
        rows = cache.layers[-1].keys[:, :, :length]
        assert rows.abs().sum(-1).min() > 0 and torch.equal(rows[:, :, 64:128], rows[:, :, :64])
        lengths.append(cache.length)

    monkeypatch.setattr(bench_decode, "stretch", watched)
    ran = bench_decode.in_turns(specs, prompt(300), turns=2, warmup=2)
    assert lengths == [299] * 3  # the target's cache twice, and the draft's
    for rounds in ran.values():
        assert len(rounds.seconds) >= 2 and min(rounds.seconds) > 0 and not rounds.ended
        assert sum(rounds.phase_seconds().values()) <= 1.01 * sum(rounds.seconds) / 2
    assert ran["plain"].emitted == 1.0 and not ran["plain"].phases["draft"]
    assert ran["tree"].phases["draft"] > 0 and ran["tree"].phases["verify"] > 0
    assert ran["tree"].spec.stats.num_retrievals >= 1
    assert ran["plain"].spec.stats.num_rounds == 2 + 2 * bench_decode.TURN


def test_work_of_a_forward(pair):
    model = pair[0]
    c = model.config
    layers = sum(p.numel() for p in model.model.layers.parameters())
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    read, operations = bench_decode.work(model, rows=3, tokens=100)
    head = c.vocab_size * c.hidden_size
    assert read == 4 * (layers + head + c.hidden_size + 100 * row)
    attention = 4 * 3 * 103 * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    assert operations == 2 * 3 * (layers + head + c.hidden_size) + attention


def test_work_of_experts_windows_and_states():
    model = miniature("deepseek_v3")
    mixture = model.model.layers[-1].mlp
    c, experts = model.config, sum(p.numel() for p in mixture.experts.parameters())
    share = c.num_experts_per_tok / c.n_routed_experts
    (one, used), (three, more) = (bench_decode.work(model, rows, 0) for rows in (1, 3))
    count = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    spared = 3 * experts  # three of the four layers have experts
    assert one == pytest.approx(4 * (count - spared * (1 - share)))
    assert three == pytest.approx(4 * (count - spared * (1 - share) ** 3))
    model = miniature("gemma3_text")
    rows = [bench_decode.work(model, 1, n)[0] for n in (WINDOW, WINDOW + 1)]
    config = model.config
    full = sum(kind == "full_attention" for kind in config.layer_types)
    row = 2 * config.num_key_value_heads * config.head_dim * 4
    assert rows[1] - rows[0] == full * row and full < config.num_hidden_layers
    kinds = [layer.states > 0 for layer in bench_decode.layers(miniature("qwen3_next"))]
    assert kinds == [True, False] * 2


def test_trees_of_an_option():
    assert bench_decode.trees("1x1,32x5") == [(1, 1), (32, 5)]


# ---- memory --------------------------------------------------------------------------------------

LENGTHS = [4096, 8192, 16384, 32768]
LINE = [
    (5 << 20) + 1536 * n + wobble for n, wobble in zip(LENGTHS, (0, 4e5, -4e5, 2e5), strict=True)
]


def test_a_line_of_memory_is_one():
    found = bench_memory.fit(LENGTHS, LINE)
    assert found.absent and abs(found.per_token - 1536) < 40 and found.off < 1e6


@pytest.mark.parametrize("bits", [1, 8, 32])
def test_a_square_tensor_shows(bits):
    """A mask may be packed into bits, be of booleans, or of floats."""
    peaks = [peak + n * n * bits / 8 for n, peak in zip(LENGTHS, LINE, strict=True)]
    found = bench_memory.fit(LENGTHS, peaks)
    assert not found.absent and found.per_square == pytest.approx(bits / 8, rel=0.05)


def test_a_parabola_through_three_points_shows_nothing():
    with pytest.raises(ValueError, match="at least four lengths are wanted for a fit, got 3"):
        bench_memory.fit([1, 2, 2, 3], [1, 2, 2, 3])


def test_resident_peak_is_seen_and_forgotten():
    meter = bench_memory.Resident()
    meter.reset()
    before = meter.peak()
    torch.ones(16 << 20)  # 64 MiB, freed at once
    assert meter.peak() - before > 50 << 20
    meter.reset()
    assert meter.peak() - before < 50 << 20


def test_the_standard_way_is_measured_where_it_is_quadratic(pair):
    """Two forwards of the model's own run as it came: a mask over the prompt, then one token."""
    lengths = []
    bench_memory.standard(pair[0], prompt(70), lambda: lengths.append(1))
    assert len(lengths) == 2


def test_predicted_memory(pair):
    """Weights and caches are counted in full, the working cache where there is one."""
    target, draft = pair
    parts = bench_memory.predict(target, None, bench_memory.WAYS["plain"], 5000)
    assert "draft's full cache" not in parts["prefill"]
    total = 5000 + bench_memory.NEW_TOKENS
    assert parts["rounds"]["target's cache"] == total * bench_memory.cache_row(target)
    for way, cached in (("full", False), ("window", True), ("retrieval", True)):
        parts = bench_memory.predict(target, draft, bench_memory.WAYS[way], 5000)
        assert ("working cache" in parts["rounds"]) == cached
        assert parts["rounds"]["weights"] == 4 * sum(
            p.numel() for model in pair for p in model.parameters()
        )


# ---- the same text -------------------------------------------------------------------------------


@pytest.mark.parametrize("questions", [1, 2])
def test_answers(pair, report, questions):
    """All contestants write the same text, and their seconds are of the whole of it. Of a single
    question all is read; of a second one what is new, by those who keep the first."""
    made, record = report
    target, draft = pair
    config = SpecConfig(gate="off", tree_nodes=4, seed=0)
    answering = bench_answer.contestants(Pair(target, draft, None), config, None, questions)
    assert [name.split()[0] for name in answering] == ["Hugging"] * 3 + ["ours"] * 4
    documents = [
        [ids, torch.cat([ids[:, :length], (ids[:, length : length + 5] + 1) % VOCAB], 1)]
        for ids, length in ((prompt(70), 60), (prompt(90), 80))
    ]
    documents = [prompts[:questions] for prompts in documents]
    memory = PeakMemory(torch.device("cpu"))
    start = time.perf_counter()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it calls its assistant in a way that it calls deprecated
    try:
        both = bench_answer.run(answering, documents, 12, 2, memory)
    finally:
        logging.set_verbosity(level)
    spent = time.perf_counter() - start
    assert len(both) == questions
    assert sum(a.last for found in both for answers in found.values() for a in answers) < spent
    for question, found in enumerate(both):
        for name, answers in found.items():
            assert len(answers) == 4
            keeps = question == 1 and (name.startswith("ours") or name == "Hugging Face plain")
            assert [a.cached for a in answers] == ([60, 80] * 2 if keeps else [0] * 4)
            for answer, plain in zip(answers, found["Hugging Face plain"], strict=True):
                assert answer.tokens == plain.tokens and answer.count == 12
                assert 0 < answer.first < answer.last and answer.rate > 0
                assert answer.passes >= 1 and (name != "ours plain" or answer.passes == 1)
        text = bench_answer.remarks(found["ours draft"], found["Hugging Face plain"])
        assert "4 of 4 texts as Hugging Face's" in text and "per pass" in text
        assert ("(70 tokens were there)" in text) == (question == 1)


def test_contexts(pair, report, tmp_path):
    """What is asked again is read but for what is new, also on a fork; loading has its peer."""
    made, record = report
    target, draft = pair
    config = SpecConfig(gate="off", tree_nodes=4, seed=0)
    models, ids = Pair(target, draft, None), prompt(70)
    prompts = [ids[:, :60], torch.cat([ids[:, :60], ids[:, 64:]], 1)]
    spec = models.spec(config)
    context = bench_contexts.add_questions(made, "60 tokens", spec, models, config, prompts)
    bench_contexts.add_files(made, "60 tokens", spec, context, tmp_path / "context")
    cases = {entry["case"].removeprefix("60 tokens, "): entry for entry in record()["cases"]}
    first, step = (
        cases[name]["median"] for name in ("first question, first token", "a plain round")
    )
    for name in ("second question", "second question on the fork"):
        entry = cases[f"{name}, first token"]
        assert entry["cached"] == 60 and entry["of_first"] == entry["median"] / first
        assert entry["plain_rounds"] == entry["median"] / step
    assert cases["fork"]["num_bytes"] == context.num_bytes
    for state in ("on disk", "in the system's cache"):
        entry = cases[f"load, file {state}"]
        assert entry["bytes"] == (tmp_path / "context").stat().st_size
        peer = entry["peers"]["reading the file"]
        assert peer["ratio"] == peer["median"] / entry["median"]


def test_a_cache_that_cannot_go_back_is_left(pair):
    """Another one is begun; where nothing is to be cut, it stays as it is."""
    target = pair[0]
    ids = prompt(20)
    cache = DynamicCache(config=target.config)
    target(ids, **{CACHE: cache})
    longer = torch.cat([ids, ids], 1)
    given = Pair(target, None, None)
    assert bench_answer.kept(given, cache, ids, longer) is cache and num_cached(cache) == 20
    with mock.patch.object(cache, "crop", side_effect=RuntimeError):
        assert num_cached(bench_answer.kept(given, cache, ids, 1 + ids)) == 0


def test_questions_have_the_length_that_was_asked_for():
    class Words:
        chat_template = None

        def __call__(self, text, **options):
            return SimpleNamespace(input_ids=[len(word) for word in text.split()])

        def decode(self, ids):
            return " ".join("x" * i for i in ids)

        def apply_chat_template(self, messages, **options):
            assert messages[0]["content"].endswith(bench_answer.QUESTIONS)
            return {"input_ids": torch.tensor([self(messages[0]["content"]).input_ids])}

    words, text = Words(), "some words and " * 50
    lengths = [len(question.split()) for question in bench_answer.QUESTIONS]
    assert bench_answer.ask(words, text, 151, 1) is None
    asked = bench_answer.ask(words, text, 100, 2)
    assert [ids.shape for ids in asked] == [(1, 100), (1, 100 + lengths[1])]
    assert torch.equal(asked[1][:, :100], asked[0])
    assert len(bench_answer.ask(words, text, 100, 1)) == 1
    words.chat_template = "a template"
    asked = bench_answer.ask(words, text, 100, 2)
    assert [ids.shape for ids in asked] == [(1, 100 - 64 + length) for length in lengths]


def test_prompts_are_read_alike():
    """As `generate` reads them, and in our loop's way: the same keys."""
    model, ids = tiny_model("llama"), prompt(50)
    kept = []

    class Kept(KVCache):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append(self)

    with mock.patch.object(bench_prefill, "KVCache", Kept), torch.inference_mode():
        bench_prefill.read_by_model(model, ids)
        for chunk in (50, 17):
            bench_prefill.read_by_target(Target(model), ids, chunk)
    for first, second in zip(*(cache.layers for cache in kept), strict=True):
        torch.testing.assert_close(first.keys, second.keys, rtol=1e-4, atol=1e-5)
    assert [cache.length for cache in kept] == [50, 50]


def test_decisions_that_differ_are_counted_one_by_one():
    """What a tree's rows are off by decides where plain decoding's two best are nearer; behind it
    the text goes on as plain decoding has it."""
    model, ids = tiny_model(dtype=torch.bfloat16), prompt(30)
    config = SpecConfig(gate="off", tree_nodes=4)
    loops = SpecExtend(model, None, config), SpecExtend(model, "self", config)
    clean = bench_same_text.compare(*loops, ids, 30)
    assert clean.tokens == 30 and clean.gaps == [] and clean.rows == 0

    def favour(module, args, output):
        return output + 2 * (torch.arange(97) == 5) * (output.shape[1] > 1)

    hook = model.lm_head.register_forward_hook(favour)
    counts = bench_same_text.compare(*loops, ids, 30)
    hook.remove()
    assert counts.tokens == 30 and counts.rows >= 20
    assert 1 <= len(counts.gaps) < counts.rows and all(0 <= gap <= 2.1 for gap in counts.gaps)
    for gap, steps in zip(counts.gaps, counts.steps, strict=True):
        assert steps == pytest.approx(gap / 2**-6, rel=8)
    text = bench_same_text.remarks([counts, clean])
    assert f"{len(counts.gaps)} of 60 decided otherwise, gap " in text


def test_steps_of_a_dtype():
    for x, dtype, step in ((1.0, torch.bfloat16, 2**-7), (-12.0, torch.bfloat16, 2**-4)):
        assert bench_same_text.step_size(x, dtype) == step
    assert bench_same_text.step_size(3.0, torch.float16) == 2**-9
