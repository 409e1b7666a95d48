"""Tests ``specextend eval``: prompts, methods, records, resuming; the command on tiny models."""

from __future__ import annotations

import argparse
import json
import math
import mmap
import re

import pytest
import torch
from models import tiny_model
from test_cli import byte_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig

from specextend import SpecConfig, SpecExtend, assets, cli
from specextend.command import evaluate as command
from specextend.command import evaluation
from specextend.draft import load_draft
from specextend.eval import models as eval_models
from specextend.eval import options, prompts
from specextend.eval.memory import PeakMemory
from specextend.eval.methods import METHODS, REFERENCE
from specextend.eval.needle import needle
from specextend.eval.options import Stage
from specextend.eval.prompts import Prompts
from specextend.eval.records import FILE, Difference, Header, Results, Run, from_json, to_json
from specextend.eval.run import Row, Runner, Task, rows_of, tasks_of
from specextend.target import Target

WORDS = "the river went on and nobody at Harbour House said a word until Winter came . ".split()
PROSE = "\n".join(" ".join(WORDS[i % 7 :] + WORDS[: i % 5]) for i in range(60))
CODE = "\n\n".join(
    f"def area_{i}(width, height):\n    return width * height + {i}\n\n\n"
    f"class Shape{i}:\n    pass\n"
    for i in range(30)
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Folders: "code" and "prose" of text files, "records" of JSON Lines named after lengths,
    "loose" of one file that is not."""
    root = tmp_path_factory.mktemp("texts")
    for name in ("code", "prose", "records", "loose"):
        (root / name).mkdir()
    (root / "code" / "a.py").write_text(CODE)
    (root / "code" / "b.py").write_text(CODE.replace("area", "volume"))
    (root / "prose" / "a.txt").write_text(PROSE)
    (root / "prose" / "short.md").write_text("Too short.")

    def lines(*parts):
        return "".join(json.dumps({"text": text, "trunc_length": 1}) + "\n" for text in parts)

    (root / "records" / "set_512.jsonl").write_text(lines("short one", PROSE + "\n### Summary:\n"))
    (root / "records" / "set_1K.jsonl").write_text(lines(PROSE.upper()))
    (root / "loose" / "texts.jsonl").write_text(lines("short one", PROSE, CODE))
    return root


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def pair():
    target = tiny_model(vocab_size=257, max_position_embeddings=4096)
    return target, tiny_model(vocab_size=257, seed=1, hidden_size=16, head_dim=8)


# ---- prompts ---------------------------------------------------------------------------------


class TestPrompts:
    @pytest.mark.parametrize("folder", ["code", "prose", "records", "loose"])
    @pytest.mark.parametrize("kind", options.GENERATED)
    def test_lengths_are_exact(self, texts, tokenizer, kind, folder):
        made = Prompts(tokenizer, texts / folder, seed=3)
        for length in (300, 1024, 2001):
            found = made.make(kind, length, 3)
            assert [len(prompt.ids) for prompt in found] == [length] * 3
            assert len({prompt.name for prompt in found}) == 3
            assert len({tuple(prompt.ids) for prompt in found}) == 3
            assert all(p.source == kind and p.length == length for p in found)
            assert all((p.answer is None) == (kind in ("joined", "code")) for p in found)
        again = Prompts(tokenizer, texts / folder, seed=3).make(kind, 300, 2)
        assert again == made.make(kind, 300, 2)
        if kind in ("needle", "lookup"):
            assert again != Prompts(tokenizer, texts / folder, seed=4).make(kind, 300, 2)

    @pytest.mark.parametrize("folder", ["code", "prose"])
    def test_needle(self, texts, tokenizer, folder):
        """The answer stands in the text once, at its depth, at the beginning of a line."""
        for prompt, depth in zip(
            Prompts(tokenizer, texts / folder).make("needle", 2000, 5), prompts.DEPTHS, strict=True
        ):
            text, answer = tokenizer.decode(prompt.ids), tokenizer.decode(prompt.answer)
            assert len(answer) == 8 and text.count(answer) == 1
            at = text.index(answer)
            assert abs(at / len(text) - depth) < 0.1
            fact = text[text.rindex("\n", 0, at) + 1 :].split("\n")[0]
            question = text[text.rindex("\n") + 1 :]
            assert fact.startswith(question.removeprefix("assert ").replace("==", "="))

    def test_lookup(self, texts, tokenizer):
        for prompt in Prompts(tokenizer, texts / "code").make("lookup", 2000, 5):
            text = tokenizer.decode(prompt.ids)
            table, _, question = text[text.index("TABLE = ") :].partition("\n\nassert ")
            key, _, rest = question.removeprefix('TABLE["').partition('"')
            assert rest == "] == "
            values = eval(table.removeprefix("TABLE = "))
            assert len(values) > 30 and values[key] == int(tokenizer.decode(prompt.answer))

    def test_code(self, texts, tokenizer):
        """The copy is the original but for its names."""
        (prompt,) = Prompts(tokenizer, texts / "code").make("code", 2000, 1)
        text = tokenizer.decode(prompt.ids)
        original = text[: int(prompts.ORIGINAL * 2000)]
        copy = text[len(original) :]
        assert original == CODE[: len(original)]
        assert "_area_0(width, height)" in copy and "def area_0" not in copy
        plain = copy
        for name in set(re.findall(r"\b\w+_(?=area_\d|Shape\d)", copy)):
            plain = plain.replace(name, "")
        assert original.startswith(plain)

    def test_tokens_of_the_beginning(self, texts):
        """What a tokenizer puts before a text comes once."""
        tokenizer = byte_tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<end> $A", special_tokens=[("<end>", 0)]
        )
        for folder, kind in (("code", "joined"), ("code", "needle"), ("records", "prompts")):
            (prompt,) = Prompts(tokenizer, texts / folder).make(kind, 512, 1)
            assert prompt.ids[0] == 0 and prompt.ids.count(0) == 1

    def test_files_named_after_lengths(self, texts, tokenizer):
        made = Prompts(tokenizer, texts / "records")
        short, long = made.make("prompts", 512, 5)
        assert tokenizer.decode(short.ids) == "short one"  # as the file has it
        assert (short.name, short.source, short.length) == ("set_512-0", "jsonl", 512)
        assert len(long.ids) == 512 and tokenizer.decode(long.ids).endswith("### Summary:\n")
        assert [p.name for p in made.make("prompts", 1024, 5)] == ["set_1K-0"]
        with pytest.raises(
            ValueError, match="no text of 2,048 tokens: .* prompts of 512, 1024; --g"
        ):
            made.make("prompts", 2048, 1)

    def test_other_files(self, texts, tokenizer):
        found = Prompts(tokenizer, texts / "loose").make("prompts", 700, 5)
        assert [(p.name, len(p.ids)) for p in found] == [("texts-1", 700), ("texts-2", 700)]
        (found,) = Prompts(tokenizer, texts / "prose").make("prompts", 700, 5)
        assert (found.source, found.name) == ("folder", "a.txt")
        assert tokenizer.decode(found.ids) == PROSE[:700]

    def test_documents_of_the_library(self):
        assert prompts.read_documents(None) == assets.held_out_documents()

    def test_errors(self, texts, tokenizer, tmp_path):
        with pytest.raises(ValueError, match="there is no file or folder"):
            Prompts(tokenizer, tmp_path / "none").make("prompts", 10, 1)
        with pytest.raises(ValueError, match=r"has no .jsonl, .txt, .md or .py files"):
            Prompts(tokenizer, tmp_path).make("joined", 10, 1)
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"texts": "b"}\n')
        with pytest.raises(ValueError, match='line 2: an object with "text" is wanted'):
            Prompts(tokenizer, tmp_path).make("joined", 10, 1)
        made = Prompts(tokenizer, texts / "prose")
        with pytest.raises(
            ValueError, match="have [0-9],[0-9]+ tokens together, 100,000 are wanted"
        ):
            made.make("joined", 100_000, 1)
        with pytest.raises(ValueError, match="a prompt of 50 tokens is too short"):
            made.make("needle", 50, 1)


@pytest.mark.parametrize("text, tokens", [("512", 512), ("16K", 16384), ("1k", 1024)])
def test_length(text, tokens):
    assert command.length(text) == tokens


@pytest.mark.parametrize(
    "parse, text",
    [
        (command.lengths, "1K,x"), (command.lengths, "0"), (command.generated, "joined,other"),
        (command.sweep, "budget"), (command.sweep, "budget=a"),
    ],
)  # fmt: skip
def test_options_that_are_not_understood(parse, text):
    with pytest.raises(argparse.ArgumentTypeError, match=", got "):
        parse(text)


# ---- methods ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drafts(pair):
    target = Target(pair[0])
    loaded = [load_draft(draft, target, SpecConfig()) for draft in (pair[1], "ngram", "self")]
    return {draft.kind: draft for draft in loaded}


class TestMethods:
    def test_each_row_adds_one_technique(self, pair, drafts):
        """Table 4 of the paper: what the rows switch on, one after the other."""
        rows = rows_of(Stage((64,), options.LADDER), drafts, "cpu")
        assert [row.method.key for row in rows] == [REFERENCE, *options.LADDER]
        assert [row.draft for row in rows] == [None, *["model"] * 5]
        base = SpecConfig(chunk_size=8, budget=32, recent_chunks=1, gate="off")
        configs = [base.replace(**row.method.changes) for row in rows[1:]]
        seen = [(c.prefill_chunk, c.tree_attention, c.draft_cache) for c in configs]
        assert seen == [
            (None, False, "full"), (1024, False, "full"), (1024, True, "full"),
            (1024, True, "window"), (1024, True, "retrieval"),
        ]  # fmt: skip

    def test_rows(self, drafts):
        stage = Stage((64,), ("hf", "retrieval", "ngram", "self"), sweep={"budget": (64, 128)})
        rows = rows_of(stage, drafts, "cpu")
        assert [(r.method.key, r.draft, dict(r.sweep)) for r in rows] == [
            ("plain", None, {}), ("hf", None, {}), ("retrieval", "model", {}),
            ("retrieval", "model", {"budget": 64}), ("retrieval", "model", {"budget": 128}),
            ("ngram", "ngram", {}), ("ngram", "ngram", {"budget": 64}),
            ("ngram", "ngram", {"budget": 128}), ("self", "self", {}),
            ("self", "self", {"budget": 64}), ("self", "self", {"budget": 128}),
        ]  # fmt: skip
        (row,) = rows_of(Stage((64,), ("streaming:self",)), drafts, "cpu")[1:]
        assert (row.draft, row.title) == ("self", "streaming cache (self)")

    @pytest.mark.parametrize(
        "method, text",
        [
            ("other", "a method is one of hf, .*, got 'other'"),
            ("plain_eager", "on a GPU only"),
            ("eagle3", "needs a draft of the kind eagle3; there is model, ngram, self"),
            ("retrieval:eagle3", "needs a draft of the kind eagle3"),
            ("standard:self", "draft_cache='full', which a draft of the kind self does not know"),
            ("streaming:ngram", "its own row is 'ngram'"),
            ("hf:model", "the draft of hf cannot be chosen"),
        ],
    )
    def test_errors(self, drafts, method, text):
        with pytest.raises(ValueError, match=text):
            rows_of(Stage((64,), (method,)), drafts, "cpu")
        if "self" in method:
            with pytest.raises(ValueError, match="needs a draft, and none was named"):
                rows_of(Stage((64,), ("standard",)), {}, "cpu")

    def test_order(self, drafts):
        """The reference comes first, and each of the others comes in every place."""
        rows = rows_of(Stage((64,), ("hf", "standard", "retrieval")), drafts, "cpu")
        prompt = prompts.Prompt("p", "joined", 4, [1, 2, 3, 4])
        keys = [(t.repeat, t.row.method.key) for t in tasks_of([prompt], rows, 3)]
        assert [key for _, key in keys[::4]] == ["plain"] * 3
        assert [key for _, key in keys[1::4]] == ["hf", "standard", "retrieval"]
        assert len(set(keys)) == 12


def test_needle_of_a_full_cache_is_the_drafts_own(pair, drafts):
    """Against one forward of the draft over prompt and answer."""
    config = SpecConfig(draft_cache="full", gate="off")
    ids = torch.randint(1, 257, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        logits = pair[1](torch.tensor([ids])).logits[0].log_softmax(-1)
    answer = ids[33:]
    answer[2] = int(logits[34].argmax())  # one that it is right about, and what comes behind it
    with torch.inference_mode():
        logits = pair[1](torch.tensor([ids[:33] + answer])).logits[0, 32:-1].log_softmax(-1)
    found = needle(pair[0], drafts["model"].with_config(config), config, ids[:33], answer)
    right = (logits.argmax(-1) == torch.tensor(answer)).double().mean().item()
    loss = -logits.gather(1, torch.tensor(answer)[:, None]).mean().item()
    assert found.accuracy == right > 0
    assert math.isclose(found.perplexity, math.exp(loss), rel_tol=1e-4)


def test_peak_memory():
    memory = PeakMemory(torch.device("cpu"))
    if memory.kind is None:
        assert memory.peak() is None
        pytest.skip("this system does not reset the peak of a process")
    memory.start()
    before = memory.peak()
    with mmap.mmap(-1, 64 << 20) as fresh:  # what malloc gives may have been resident before
        for page in range(0, len(fresh), mmap.PAGESIZE):
            fresh[page] = 1
    after = memory.peak()
    assert 50 << 20 < after - before < 80 << 20
    memory.start()
    assert memory.peak() < after


def test_a_method_without_enough_positions_is_refused(pair, drafts):
    runner = Runner(pair[0], drafts, {None: SpecConfig()}, new_tokens=8)
    with pytest.raises(ValueError, match="prompts of 4,090 tokens: .* 4096 positions"):
        runner.check(prompts.Prompt("p", "joined", 4090, [1] * 4090))


def test_sampled_runs_are_exact(pair, drafts):
    """A draft does not change what is drawn; Hugging Face draws otherwise."""
    config = SpecConfig(chunk_size=8, budget=32, recent_chunks=1, gate="off", seed=5)
    configs = dict.fromkeys((None, "model"), config)
    runner = Runner(pair[0], drafts, configs, new_tokens=12, warmup=0, temperature=1.0, seed=5)
    prompt = prompts.Prompt("p", "joined", 60, list(range(1, 61)))
    rows = [Row(METHODS["plain"]), Row(METHODS["retrieval"], "model"), Row(METHODS["hf"])]
    plain = runner.run(Task(prompt, rows[0], 0), None, _quiet)
    ours, theirs = (runner.run(Task(prompt, row, 0), plain.tokens, _quiet) for row in rows[1:])
    assert plain.exact is None and plain.tokens and ours.exact is True and ours.tokens is None
    assert theirs.exact is None and theirs.first_difference is None


def test_every_run_reads_its_prompt(pair, drafts):
    """Also behind a warm-up and a run that had the same one."""
    config = SpecConfig(chunk_size=8, budget=32, recent_chunks=1, gate="off")
    runner = Runner(pair[0], drafts, {"model": config}, new_tokens=4)
    prompt = prompts.Prompt("p", "joined", 60, list(range(1, 61)))
    for repeat in range(2):
        runner.run(Task(prompt, Row(METHODS["retrieval"], "model"), repeat), None, _quiet)
        (spec,) = runner._specs.values()
        assert spec.stats.num_cached_tokens == 0 and spec.stats.num_prompt_tokens == 60


def _quiet(phase: str, done: int, total: int) -> None:
    pass


# ---- records ---------------------------------------------------------------------------------

RUN = Run(
    64, 64, "p", "joined", "retrieval", "model", {"budget": 64}, 0, 8, 0.1, 0.01, 0.2, 40.0, 2.0,
    [0.5], 4, {"verify": 0.1}, None, False, Difference(3, 0.5), [[0, 1]], None, None, None,
)  # fmt: skip


class TestRecords:
    def test_form(self):
        line = to_json(RUN)
        assert "\n" not in line and json.loads(line)["type"] == "run"
        assert from_json(line) == RUN
        assert RUN.row == ("retrieval", "model", (("budget", 64),))

    @pytest.mark.parametrize(
        "line, text",
        [
            ("{", "not a line of JSON"),
            ("[1]", "not a record"),
            ('{"type": "walk"}', '"type" must be "header" or "run"'),
            ('{"type": "run", "length": 1, "more": 2}', "not a run of this version: .*more"),
        ],
    )
    def test_errors(self, line, text):
        with pytest.raises(ValueError, match=text):
            from_json(line)

    def test_file_without_a_header(self, tmp_path):
        (tmp_path / FILE).write_text(to_json(RUN) + "\n")
        with pytest.raises(ValueError, match="must begin with a header"):
            Results.read(tmp_path)
        (tmp_path / FILE).write_text("{}\n")
        with pytest.raises(ValueError, match=f"{FILE}, line 1: not a record"):
            Results.read(tmp_path)


# ---- the command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(pair, tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    for name, model in zip(("target", "draft"), pair, strict=True):
        model.save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture
def evaluate(models, texts, capsys, monkeypatch):
    """Runs the command, on the tiny pair; returns exit status, standard output and error."""

    def call(*arguments, pair=True, plots=False):
        if not plots:  # which take longer than all else
            monkeypatch.setattr(evaluation.plots, "write", lambda folder: [])
        given = "--chunk-size 8 --budget 64 --recent-chunks 1 --warmup 0".split()
        if pair:
            given += ["--target", str(models / "target"), "--draft", str(models / "draft")]
            given += ["--prompts", str(texts / "code")]
        try:
            code = cli.main(["eval", *given, *map(str, arguments)])
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out + captured.err
        return code, captured.out, captured.err

    return call


SMALL = "--generate joined,needle --lengths 200,300 --max-new-tokens 8 --runs 2".split()
ALL = ["hf", "hf_assisted", "hf_lookup", "plain", *options.LADDER, "ngram", "self"]


@pytest.mark.sweep(1)
def test_command(evaluate, tmp_path):
    """Every method runs; then come an interruption, the rest, and other options."""
    methods = ["--methods", ",".join(ALL), "--output", tmp_path]
    code, out, err = evaluate(*SMALL, *methods, plots=True)
    assert code == 0, err
    total = 2 * 2 * 2 * len(ALL)
    assert f"run {total} of {total}: " in err and " | about 0 s left" in err
    results = Results.read(tmp_path)
    header, runs = results.header, results.runs
    assert isinstance(header, Header) and header.settings["new_tokens"] == 8
    assert header.settings["config"] == {
        "chunk_size": 8, "budget": 64, "recent_chunks": 1, "gate": "off", "seed": 0
    }  # fmt: skip
    assert list(header.drafts) == ["model", "ngram", "self"] and header.dtype == "float32"
    assert len(runs) == len({run.key for run in runs}) == total
    for run in runs:
        first = run.method == "plain" and run.repeat == 0
        assert run.exact is (None if first else True) and (run.tokens is not None) is first
        assert run.new_tokens == 8 and run.prompt_tokens == run.length
        assert run.prefill_seconds > 0 and run.tokens_per_second > 0
        assert math.isclose(run.tokens_per_second, 7 / run.decode_seconds, rel_tol=0.8)
        assert run.mean_acceptance_length >= 1
        ours = not run.method.startswith("hf")
        assert (run.seconds is not None) is ours
        speculates = ours and run.method != "plain"
        assert (run.draft_prefill_seconds is not None) is speculates
        retrieves = run.method in ("retrieval", "self")
        assert (run.retrieved_chunks is not None) is retrieves
        if retrieves:
            assert run.retrieved_chunks and all(len(ids) == 8 for ids in run.retrieved_chunks)
        asked = run.source == "needle" and run.method in options.LADDER and run.repeat == 0
        assert (run.needle is not None) is asked
    assert "cross-model retrieval (model)" in out and f"results: {tmp_path / FILE}" in out
    assert f"report: {tmp_path / 'results.md'}\n" in out
    assert (tmp_path / "results.md").stat().st_size > 1000
    assert len(list(tmp_path.glob("**/*.svg"))) > 1 and not list(tmp_path.glob("**/*.png"))

    lines = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    kept = b"".join(lines[:20])
    (tmp_path / FILE).write_bytes(kept + lines[20][:50])  # interrupted in the midst of a line
    code, out, err = evaluate(*SMALL, *methods)
    assert code == 0 and f"19 of {total} runs are in {tmp_path} already" in err
    assert (tmp_path / FILE).read_bytes().startswith(kept)
    assert {run.key for run in Results.read(tmp_path).runs} == {run.key for run in runs}
    assert evaluate(*SMALL, *methods)[2].startswith(f"{total} of {total} runs are in")

    before = (tmp_path / FILE).read_bytes()
    for change, text in (
        (["--max-new-tokens", 9], "new_tokens=8, but new_tokens=9 is asked for: name another fold"),
        (["--seed", 1], "seed=0, but seed=1"),
        (["--budget", 128], 'made with config={"chunk_size": 8, "budget": 64,'),
    ):
        code, _, err = evaluate(*SMALL, *methods, *change)
        assert code == 1 and text in err
    assert (tmp_path / FILE).read_bytes() == before


def test_difference_is_found(evaluate, tmp_path, monkeypatch):
    """One method writes another token in one run: its record says so, and so does the status."""
    stream, calls = SpecExtend.stream, []

    def wrong(self, *args, **kwargs):
        faulty = self.draft is not None and self.config.draft_cache == "window"
        calls.append(faulty)
        faulty = faulty and calls.count(True) == 2
        count = 0
        for step in stream(self, *args, **kwargs):
            for i in range(len(step.tokens)):
                if faulty and count + i == 5:
                    step.tokens[i] ^= 1
            count += len(step.tokens)
            yield step

    monkeypatch.setattr(SpecExtend, "stream", wrong)
    some = "--generate joined --lengths 200 --max-new-tokens 8 --runs 2 --methods streaming,hf"
    code, out, err = evaluate(*some.split(), "--output", tmp_path)
    assert code == 1 and "NO" in out and ", NOT EXACT | " in err
    assert (
        "1 of 6 runs are not exact; the first: streaming on joined-0 of 200 tokens, from new "
        "token 5 on, where the two tokens' logits are " in err
    )
    (run,) = (run for run in Results.read(tmp_path).runs if run.exact is False)
    assert (run.method, run.repeat, run.first_difference.at) == ("streaming", 1, 5)
    assert run.first_difference.gap > 0
    assert evaluate(*some.split(), "--output", tmp_path)[0] == 1  # nothing to run, but as wrong


def test_sweep(evaluate, tmp_path):
    code, _, err = evaluate(
        *"--lengths 300 --generate joined --max-new-tokens 8 --runs 1 --methods retrieval".split(),
        *"--sweep budget=32,128 --sweep retrieve-every=2".split(), "--output", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    runs = {str(run.sweep): run for run in Results.read(tmp_path).runs if run.draft}
    assert list(runs) == ["None", "{'budget': 32}", "{'budget': 128}", "{'retrieve_every': 2}"]
    chosen = [len(run.retrieved_chunks[0]) for run in runs.values()]
    assert chosen == [8, 4, 16, 8]


def test_prompts_are_read_once(evaluate, tmp_path, monkeypatch):
    """Our methods go on from what one of them has read, with the text that they write alone."""
    read, lengths = Target.read, []

    def counted(self, ids, *rest):
        lengths.append(ids.shape[1])
        return read(self, ids, *rest)

    monkeypatch.setattr(Target, "read", counted)
    code, _, err = evaluate(
        *"--generate joined --lengths 200,300 --max-new-tokens 8 --runs 2 --warmup 0".split(),
        *"--methods hf,plain,streaming,retrieval,ngram,self --read-once".split(),
        "--output", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    results = Results.read(tmp_path)
    assert results.header.settings["read_once"] is True
    assert [n for n in lengths if n > 100] == [199, 299]  # others come before the runs
    for index, run in enumerate(results.runs):
        assert run.exact is not False and run.new_tokens == 8
        first = run.method == "plain" and run.repeat == 0
        assert (run.prefill_seconds is not None) is (first or run.method == "hf"), index
        assert (run.draft_prefill_seconds is None) is (run.method in ("plain", "hf"))
    assert "| - / " in (tmp_path / "results.md").read_text()


class TestMemory:
    """What does not fit is said, before anything runs."""

    MORE = "--generate joined --max-new-tokens 8 --runs 1 --warmup 0 --methods plain,retrieval"

    @pytest.fixture
    def free(self, monkeypatch):
        """Sets the memory that is free, in tokens of the tiny pair: 2 layers of 2 heads each."""
        token = 2 * 2 * 2 * 2 * 8 * 4

        def set_free(tokens):
            monkeypatch.setattr(eval_models, "free_memory", lambda device: tokens * token)

        return set_free

    def test_what_was_asked_for(self, evaluate, tmp_path, free):
        free(250)
        code, _, err = evaluate(
            *self.MORE.split(), "--lengths", "200,243,300", "--output", tmp_path
        )
        assert code == 1 and list(tmp_path.iterdir()) == []
        assert (
            "prompts of 243 tokens do not fit: caches take 512 bytes for each token, and 125 KiB "
            "of memory are free" in err
        )
        free(251)
        assert evaluate(*self.MORE.split(), "--lengths", "200,243", "--output", tmp_path)[0] == 0
        other = ["--read-once", "--output", tmp_path / "other"]
        code, _, err = evaluate(*self.MORE.split(), "--lengths", "200", *other)
        assert code == 1 and "caches take 768 bytes for each token" in err

    def test_what_was_not(self, evaluate, tmp_path, free, monkeypatch):
        stages = (Stage((100, 200), ("plain",), runs=1), Stage((200, 300), ("plain",), runs=1))
        monkeypatch.setattr(options, "SUITE", stages)
        free(210)
        code, _, err = evaluate("--preset", "suite", "--max-new-tokens", 8, "--output", tmp_path)
        assert code == 0, err
        assert err.startswith("without prompts of 300 tokens: caches take 512 bytes for each token")
        assert sorted(run.length for run in Results.read(tmp_path).runs) == [100, 200]
        free(100)
        code, _, err = evaluate(
            "--preset", "suite", "--max-new-tokens", 8, "--output", tmp_path / "other"
        )
        assert code == 1 and "too few for prompts of 100 tokens: give --lengths" in err


def test_synthetic(evaluate, tmp_path):
    """Random weights run, with proposals that are right as often as was said."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "shape")
    code, out, err = evaluate(
        *"--synthetic 1 --lengths 96 --max-new-tokens 24 --runs 1".split(), "--target",
        tmp_path / "shape", "--methods", "plain,retrieval", "--output", tmp_path, pair=False,
    )  # fmt: skip
    assert code == 0, err
    plain, ours = Results.read(tmp_path).runs
    assert plain.source == ours.source == "random" and plain.prompt_tokens == 96
    assert plain.synthetic == ours.synthetic == {"acceptance": 1.0} and ours.exact is None
    assert ours.mean_acceptance_length > 3


@pytest.mark.parametrize(
    "arguments, code, text",
    [
        ("--runs 0", 2, "--runs must be at least 1, got 0"),
        ("--max-new-tokens 1", 2, "--max-new-tokens must be at least 2"),
        ("--temperature -1", 2, "--temperature must not be negative"),
        ("--lengths 1K,2X", 2, "a length is a number such as 512 or 16K, got '2X'"),
        ("--generate other", 2, "a kind of prompts is one of joined, needle, lookup, code"),
        ("--sweep gate=1", 2, "--sweep: an option is one of budget, "),
        ("--sweep budget=32,44", 1, "budget must be a positive multiple of chunk_size=8, got 44"),
        ("--methods nothing --lengths 64", 1, "a method is one of hf, "),
        ("--lengths 64K --generate joined", 1, "the documents have "),
        ("--preset nothing", 1, "a preset is one of paper-table1, "),
        ("--synthetic 0.5 --methods hf_lookup", 2, "hf_lookup accepts what the models"),
        ("--draft self --draft self", 2, "one draft of a kind at a time: self and self are"),
        ("--preset paper-table8 --prompts x --read-once", 2, "counts every method's own prefill"),
        ("--budget 12", 2, "budget must be a positive multiple of chunk_size=8, got 12"),
    ],
)
def test_errors(evaluate, tmp_path, arguments, code, text):
    got, _, err = evaluate(*arguments.split(), "--output", tmp_path / "out")
    assert got == code and text in err and err.startswith("specextend: error: ")
    assert not (tmp_path / "out").exists()


def test_a_preset_wants_the_papers_prompts(evaluate, tmp_path):
    code, _, err = evaluate("--preset", "paper-table2", "--output", tmp_path, pair=False)
    assert code == 2 and "--preset paper-table2 needs the paper's prompts: --prompts PATH" in err
