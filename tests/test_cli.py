"""Tests the command line, on tiny random models."""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from eagle_heads import make
from models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast

import specextend
from specextend import SpecConfig, assets, cli, machine, terminal
from specextend.command.config_options import field_texts
from specextend.command.options import config_from
from specextend.errors import UsageError

TEXT = "def area(width, height):\n    return width * height\n\n\ndef volume("
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
# Small enough for prompts of a hundred bytes to be retrieved from.
SMALL = "--chunk-size 8 --budget 32 --recent-chunks 1 --gate off --dtype float32".split()


def byte_tokenizer(shift: int = 0) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte; id 0 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: 1 + (i + shift) % 256 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab={"<end>": 0, **vocab}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of one vocabulary: target, draft; "other" speaks another; "neo" attends for itself."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer()
    tiny_model(vocab_size=257).save_pretrained(root / "target")
    tiny_model(vocab_size=257, seed=1, hidden_size=16, head_dim=8).save_pretrained(root / "draft")
    for name in ("target", "draft"):
        tokenizer.save_pretrained(root / name)
    tiny_model(vocab_size=257).save_pretrained(root / "other")
    byte_tokenizer(shift=3).save_pretrained(root / "other")
    tiny_model(vocab_size=257).save_pretrained(root / "talker")
    talking = byte_tokenizer()
    talking.chat_template = TEMPLATE
    talking.save_pretrained(root / "talker")
    config = GPTNeoConfig(
        vocab_size=257, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]
    )
    GPTNeoForCausalLM(config).save_pretrained(root / "neo")
    tokenizer.save_pretrained(root / "neo")
    return root


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Runs a command on the tiny pair; returns exit status, standard output, standard error."""

    def call(command, *arguments, stdin="", pair=("target", "draft")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        options = []
        if pair:
            options = ["--target", str(folder / pair[0]), "--draft", str(folder / pair[1]), *SMALL]
        try:
            code = cli.main([*command.split(), *options, *map(str, arguments)])
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out + captured.err  # not a terminal
        return code, captured.out, captured.err

    return call


def greedy(text: str, n: int) -> list[int]:
    ids = torch.tensor([byte_tokenizer()(text).input_ids])
    model = tiny_model(vocab_size=257)
    return model.generate(ids, max_new_tokens=n, do_sample=False)[0, ids.shape[1] :].tolist()


class TestGenerate:
    def test_text_and_statistics(self, run):
        code, out, err = run("generate", "--prompt", TEXT, "--max-new-tokens", 20)
        assert code == 0
        expected = byte_tokenizer().decode(greedy(TEXT, 20), clean_up_tokenization_spaces=False)
        assert out == expected + "\n" * (not expected.endswith("\n"))
        assert re.fullmatch(
            r"20 tokens \| [\d.]+ tokens/s \| mean acceptance length [\d.]+ \| "
            rf"prefill of {len(TEXT)} tokens [\d.]+ s \+ draft [\d.]+ s\n",
            err,
        )

    @pytest.mark.parametrize("draft", ["ngram", "self", "head", "head+ngram", "self+ngram"])
    def test_other_drafts(self, run, folder, tmp_path, draft):
        """Words, and a folder without a tokenizer of its own."""
        name = draft.replace("head", str(make("eagle1", vocab=257).write(tmp_path / "a+b")))
        arguments = ("--target", folder / "target", "--draft", name, "--json", *SMALL)
        code, out, err = run(
            "generate", "--prompt", TEXT, "--max-new-tokens", 12, *arguments, pair=None
        )
        result = json.loads(out)
        assert (code, err) == (0, "") and result["tokens"] == greedy(TEXT, 12)
        assert result["draft"] == str(name) and result["stats"]["num_draft_tokens"] > 0

    def test_json(self, run):
        code, out, err = run("generate", "--json", "--max-new-tokens", 25, stdin=TEXT)
        result = json.loads(out)
        assert (code, err) == (0, "")
        assert result["tokens"] == greedy(TEXT, 25)
        assert result["text"] == byte_tokenizer().decode(result["tokens"])
        assert result["stats"]["num_emitted_tokens"] == 25
        assert result["stats"]["num_prompt_tokens"] == len(TEXT)
        assert result["stats"]["num_retrievals"] > 0
        assert (result["dtype"], result["seed"]) == ("float32", None)

    def test_prompt_file(self, run, tmp_path):
        (tmp_path / "prompt.txt").write_text(TEXT)
        outputs = [
            run("generate", "--json", "--max-new-tokens", 8, *source, stdin=stdin)[1]
            for source, stdin in (
                (["--prompt", TEXT], ""),
                (["--prompt-file", tmp_path / "prompt.txt"], ""),
                (["--prompt-file", "-"], TEXT),
                ([], TEXT),
            )
        ]
        assert len({tuple(json.loads(out)["tokens"]) for out in outputs}) == 1

    def test_plain_decoding(self, run, folder):
        arguments = ("--target", folder / "target", "--draft", "none", *SMALL)
        code, out, err = run(
            "generate", *arguments, "--json", "--max-new-tokens", 12, stdin=TEXT, pair=None
        )
        result = json.loads(out)
        assert result["tokens"] == greedy(TEXT, 12) and result["draft"] is None
        assert result["stats"]["num_draft_tokens"] == 0

    def test_compare(self, run):
        arguments = ("--compare", "--max-new-tokens", 15)
        code, out, err = run("generate", *arguments, stdin=TEXT)
        assert code == 0
        assert re.search(
            r"\nplain decoding [\d.]+ tokens/s \| speed-up [\d.]+ \| identical: yes\n", err
        )
        plain = json.loads(run("generate", "--json", *arguments, stdin=TEXT)[1])["plain"]
        assert plain["identical"] and plain["tokens"] == greedy(TEXT, 15)

    def test_difference_is_an_error(self, run, monkeypatch):
        """Plain decoding that writes something else, for the comparison to find."""
        stream = specextend.SpecExtend.stream

        def wrong(self, *args, **kwargs):
            for i, step in enumerate(stream(self, *args, **kwargs)):
                if self.draft is None and i == 3:
                    step.tokens[0] = 200
                yield step

        monkeypatch.setattr(specextend.SpecExtend, "stream", wrong)
        arguments = ("--compare", "--max-new-tokens", 15)
        code, out, err = run("generate", *arguments, stdin=TEXT)
        assert code == 1 and "identical: no" in err
        assert re.search(
            r"error: new token 3 is .+ \(\d+\), but .+ \(200\) with plain decoding", err
        )
        code, out, err = run("generate", "--json", *arguments, stdin=TEXT)
        assert code == 1 and json.loads(out)["plain"]["identical"] is False

    @pytest.mark.sweep(2)
    @pytest.mark.parametrize(
        "options",
        ["--temperature 0.8", "--top-k 20", "--top-p 0.9", "--min-p 0.02", "--temperature 0.6"
         " --top-k 50 --repetition-penalty 1.2"],
    )  # fmt: skip
    def test_sampling(self, run, options):
        def draw(*more):
            code, out, _ = run(
                "generate", "--json", "--compare", "--max-new-tokens", 24, *options.split(), *more,
                stdin=TEXT,
            )  # fmt: skip
            assert code == 0
            return json.loads(out)

        first, again, other = draw("--seed", 5), draw("--seed", 5), draw("--seed", 6)
        assert first["plain"]["identical"] and first["seed"] == 5
        assert first["tokens"] == again["tokens"] != other["tokens"]
        unseeded = draw()
        assert draw("--seed", unseeded["seed"])["tokens"] == unseeded["tokens"]

    def test_stop(self, run):
        text = byte_tokenizer().decode(greedy(TEXT, 30))
        stop = re.search("[!-~]{2}", text[5:])[0]
        code, out, _ = run("generate", "--json", "--stop", stop, stdin=TEXT)
        expected = text[: text.index(stop) + 2]
        assert code == 0 and json.loads(out)["text"] == expected

    def test_chat_template(self, run):
        arguments = ("--json", "--chat", "--max-new-tokens", 9)
        code, out, _ = run("generate", *arguments, stdin=TEXT, pair=("talker", "draft"))
        assert json.loads(out)["tokens"] == greedy(f"<user>{TEXT}<assistant>", 9)

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
    def test_characters_that_the_output_lacks(self, run, monkeypatch, encoding):
        """They are replaced; the run goes on."""
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        assert run("generate", "--prompt", TEXT, "--max-new-tokens", 40)[0] == 0
        text = byte_tokenizer().decode(greedy(TEXT, 40))
        assert "\ufffd" in text
        expected = text.encode(encoding, "replace").decode(encoding)
        stream.seek(0)
        assert stream.read() == expected + "\n" * (not text.endswith("\n"))

    def test_interrupted(self, run, monkeypatch):
        def interrupt(self, tokens, num_accepted=0):
            raise KeyboardInterrupt

        monkeypatch.setattr(terminal.LiveText, "add", interrupt)
        code, out, err = run("generate", stdin=TEXT)
        assert (code, err) == (130, "specextend: interrupted\n")


class TestChat:
    def test_turns(self, run):
        """Turns pile up until /reset."""
        arguments = ("--max-new-tokens", 6, "--highlight")
        code, out, err = run("chat", *arguments, stdin="one\n\ntwo\n/reset\none\n")
        assert code == 0
        tokenizer = byte_tokenizer()
        first = tokenizer.decode(greedy("one\n", 6))
        second = tokenizer.decode(greedy(f"one\n{first}two\n", 6))
        lines = "".join(t + "\n" * (not t.endswith("\n")) for t in (first, second, first))
        assert out == lines and err.count("6 tokens |") == 3

    @pytest.mark.parametrize("target", ["target", "talker"])
    def test_a_turn_goes_on_from_the_last(self, run, target):
        """As far as the tokens are the same, which is said; /reset begins anew."""
        lines, length = ["one", "two", "three", "/reset", "one"], 6
        arguments, pair = ("--max-new-tokens", length), (target, "draft")
        code, out, err = run("chat", *arguments, stdin="\n".join(lines) + "\n", pair=pair)
        tokenizer, held, prompt, expected = byte_tokenizer(), [], "", []
        for line in lines:
            if line == "/reset":
                held, prompt = [], ""
                continue
            prompt += f"<user>{line}<assistant>" if target == "talker" else f"{line}\n"
            ids = tokenizer(prompt).input_ids
            pairs = zip(ids, held, strict=False)
            expected.append((len(ids), sum(itertools.accumulate((a == b for a, b in pairs), min))))
            answer = greedy(prompt, length)
            held = ids + answer[:-1]  # the last one has not been read
            prompt += tokenizer.decode(answer)
        found = re.findall(r"prefill of (\d+) tokens(?: \((\d+) cached\))? [\d.]+ s", err)
        assert code == 0 and [(int(n), int(cached or 0)) for n, cached in found] == expected
        assert expected[0] == expected[-1] and expected[1][1] > expected[0][0]

    def test_template(self, run):
        arguments = ("--max-new-tokens", 6, "--system", "brief")
        code, out, _ = run("chat", *arguments, stdin="one\n", pair=("talker", "draft"))
        text = byte_tokenizer().decode(greedy("<system>brief<user>one<assistant>", 6))
        assert code == 0 and out == text + "\n" * (not text.endswith("\n"))

    def test_full_context(self, run):
        """New tokens are cut to what fits; a turn that does not fit is taken back; the chat goes
        on, with what is short enough and after /reset."""
        long, new = "a" * 150, 40
        lines = [long, long, long, "b", "b", "b", long, "/reset", long]
        code, out, err = run("chat", "--max-new-tokens", new, stdin="\n".join(lines) + "\n")
        tokenizer, written, texts, errors, cut = byte_tokenizer(), "", [], 0, 0
        for line in lines:
            if line == "/reset":
                written = ""
                continue
            length = len(tokenizer(f"{written}{line}\n").input_ids)
            if length >= 512:
                errors += 1
                assert f"error: the chat has {length} tokens, and the target 512 positions" in err
                continue
            text = tokenizer.decode(greedy(f"{written}{line}\n", min(new, 512 - length)))
            cut += 512 - length < new
            texts.append(text)
            written += f"{line}\n{text}"
        assert code == 0 and out == "".join(t + "\n" * (not t.endswith("\n")) for t in texts)
        assert errors == err.count("this turn is taken back") >= 2 and cut and len(texts) >= 4

    @pytest.mark.parametrize(
        "fault, text",
        [
            ("raise_exception('not so')", "error: the tokenizer's chat template: not so"),
            ("messages[99].content.x", "error: the tokenizer's chat template: "),
            ("1 + 'a'", "error: the tokenizer's chat template: "),
        ],
    )
    def test_templates_that_fail(self, run, folder, fault, text):
        """Their error is shown, whatever its type, and the turn taken back."""
        picky = byte_tokenizer()
        picky.chat_template = (
            f"{{% if messages[-1].content == 'bad' %}}{{{{ {fault} }}}}{{% endif %}}{TEMPLATE}"
        )
        tiny_model(vocab_size=257).save_pretrained(folder / "picky")
        picky.save_pretrained(folder / "picky")
        lines = "bad\none\nbad\ntwo\n/reset\nbad\none\n"
        options = ("--max-new-tokens", 6)
        code, out, err = run("chat", *options, stdin=lines, pair=("picky", "draft"))
        calm = run("chat", *options, stdin="one\ntwo\n/reset\none\n", pair=("talker", "draft"))
        assert (code, out) == calm[:2] and err.count(text) == 3
        assert run("generate", "--chat", stdin="bad", pair=("picky", "draft"))[0] == 1

    def test_errors_within_a_text(self, run, monkeypatch):
        """What was written of a turn that failed is none of the history."""
        stream, broken = specextend.SpecExtend.stream, []

        def failing(self, *args, **kwargs):
            for i, step in enumerate(stream(self, *args, **kwargs)):
                if i == 1 and not broken:
                    broken.append(True)
                    raise ValueError("as if")
                yield step

        monkeypatch.setattr(specextend.SpecExtend, "stream", failing)
        code, out, err = run("chat", "--max-new-tokens", 6, stdin="zero\none\n")
        text = byte_tokenizer().decode(greedy("one\n", 6))
        assert code == 0 and "error: as if" in err and out.endswith(text + "\n")

    def test_a_reader_that_goes_away_ends_it(self, folder, monkeypatch):
        def broken(self, *args, **kwargs):
            raise BrokenPipeError

        monkeypatch.setattr(terminal.LiveText, "add", broken)
        monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
        pair = ["--target", str(folder / "target"), "--draft", str(folder / "draft")]
        args = cli.make_parser().parse_args(["chat", *pair, *SMALL])
        with pytest.raises(BrokenPipeError):
            args.run(args)


@pytest.fixture(scope="module")
def stopping(tmp_path_factory):
    """A target that stops at a string, says use_cache=False, and samples oddly by default; and
    the text up to that string."""
    folder, model = tmp_path_factory.mktemp("stopping"), tiny_model(vocab_size=257)
    text = byte_tokenizer().decode(greedy(TEXT, 30))
    stop = re.search("[!-~]{2}", text[5:])[0]
    model.config.use_cache = False
    model.generation_config.update(
        stop_strings=[stop], use_cache=False, do_sample=True, temperature=0.7, top_k=7
    )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder, text[: text.index(stop) + 2]


class TestCheckpoints:
    """Checkpoints whose generation configuration asks for something."""

    @pytest.mark.parametrize("draft", ["none", "ngram", "self", "model"])
    def test_generate(self, run, folder, stopping, draft):
        draft = folder / "draft" if draft == "model" else draft
        options = ("--target", stopping[0], "--draft", draft, "--json", *SMALL)
        code, out, err = run("generate", *options, "--compare", stdin=TEXT, pair=None)
        result = json.loads(out)
        assert (code, err) == (0, "") and result["text"] == stopping[1]
        assert result["plain"]["identical"]
        sampled = ("--temperature", 0.8, "--seed", 3, "--compare", "--max-new-tokens", 20)
        code, out, _ = run("generate", *options, *sampled, stdin=TEXT, pair=None)
        assert code == 0 and json.loads(out)["plain"]["identical"]

    def test_chat(self, run, folder, stopping):
        options = ("--target", stopping[0], "--draft", folder / "draft", *SMALL)
        code, out, err = run("chat", *options, stdin=TEXT.splitlines()[0] + "\n", pair=None)
        assert code == 0 and "error" not in err and out

    @pytest.mark.parametrize(
        "command",
        [
            "demo --document DIR/text.txt --tokens LENGTH --max-new-tokens 20",
            "eval --prompts DIR/text.jsonl --lengths LENGTH --max-new-tokens 20 --runs 1 "
            "--output DIR/out --methods hf,plain,hf_lookup,tree_attention",
            "eval --prompts DIR/text.jsonl --lengths LENGTH --max-new-tokens 20 --runs 1 "
            "--output DIR/out --methods plain,tree_attention --read-once",
        ],
    )  # fmt: skip
    def test_comparisons(self, run, folder, stopping, tmp_path, command):
        """All ways stop at the same place."""
        (tmp_path / "text.txt").write_text(TEXT * 4)
        (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT * 4}) + "\n")
        words = command.replace("DIR", str(tmp_path)).replace("LENGTH", str(len(TEXT))).split()
        options = ("--target", stopping[0], "--draft", folder / "draft", *SMALL)
        options = [word for word in options if word not in ("--gate", "off")]
        code, out, err = run(*words, *options, pair=None)
        assert code == 0, err
        assert "NO" not in out and "yes" in out


class TestInfo:
    def test_text(self, run):
        code, out, err = run("info", pair=None)
        assert code == 0 and f"specextend       {specextend.__version__}\n" in out
        assert f"in use: {specextend._C.cpu_isa()}" in out and torch.__version__ in out

    def test_json(self, run):
        facts = json.loads(run("info", "--json", pair=None)[1])
        assert facts["specextend"] == specextend.__version__
        assert facts["cpu_isa"] in facts["cpu_isas"]
        assert bool(facts["cuda_archs"]) == specextend._C.has_cuda
        assert facts["threads"] == torch.get_num_threads()


class TestOptions:
    def test_every_field_has_an_option_with_its_text(self):
        found = field_texts()
        names = [field.name for field in dataclasses.fields(SpecConfig)]
        assert sorted(found) == sorted(names)
        expected = {"Tree", "N-gram look-up", "Draft's context", "Running"}
        assert {section for section, _ in found.values()} == expected
        assert all(len(text) > 10 for _, text in found.values())

    def test_help(self, run):
        code, out, _ = run("generate", "--help", pair=None)
        words = " ".join(out.split())
        assert code == 0
        for field in dataclasses.fields(SpecConfig):
            assert f"--{field.name.replace('_', '-')}" in out
        assert "nodes of each level that the draft expands (the beam)." in words

    def test_values(self):
        args = cli.make_parser().parse_args(
            "generate --tree-shape fixed --tree-widths 2,3 --no-tree-attention "
            "--draft-prefill-window none --prefill-chunk 7 --tree-threshold 0.5 --score-layers=-2"
            .split()
        )  # fmt: skip
        assert config_from(args) == SpecConfig(
            tree_shape="fixed", tree_widths=(2, 3), tree_attention=False,
            draft_prefill_window=None, prefill_chunk=7, tree_threshold=0.5, score_layers=(-2,),
            **assets.SETTINGS,
        )  # fmt: skip

    def test_untouched(self):
        """The embedded pair has settings of its own; an option wins over them."""
        parser = cli.make_parser()

        def configured(arguments):
            args = parser.parse_args(arguments)
            return config_from(args)

        for draft in ("model", "ngram", "self", "model+ngram", "self+ngram"):
            assert configured(["chat", "--draft", draft]) == SpecConfig(**assets.SETTINGS)
        assert configured(["chat"]) == SpecConfig(**assets.SETTINGS)
        named = ["chat", "--target", "a", "--draft", "b"]
        assert configured(named) == SpecConfig()
        assert configured(["chat", "--budget", "256"]).budget == 256


class TestDevices:
    """Which device a command computes on, with kernels and GPUs that this machine may not have."""

    @pytest.fixture
    def machine_with(self, monkeypatch):
        """Pretend that there are kernels for GPUs, and so many GPUs."""

        def pretend(kernels: bool, gpus: int) -> None:
            monkeypatch.setattr(machine, "_C", types.SimpleNamespace(has_cuda=kernels))
            monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
            monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)

        return pretend

    @pytest.mark.parametrize(
        "kernels, gpus, expected",
        [(True, 1, "cuda"), (True, 0, "cpu"), (False, 1, "cpu"), (False, 0, "cpu")],
    )
    def test_default(self, machine_with, kernels, gpus, expected):
        machine_with(kernels, gpus)
        assert machine.choose_device(None) == torch.device(expected)

    @pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1"])
    def test_named(self, machine_with, name):
        machine_with(True, 2)
        assert machine.choose_device(name) == torch.device(name)

    @pytest.mark.parametrize(
        "kernels, gpus, name, text",
        [
            (True, 2, "cuda:2", "--device cuda:2: torch sees 2 GPUs"),
            (True, 0, "cuda", "--device cuda: torch sees 0 GPUs"),
            (False, 2, "cuda", "--device cuda: specextend was built without CUDA kernels; "),
        ],
    )
    def test_not_there(self, machine_with, kernels, gpus, name, text):
        machine_with(kernels, gpus)
        with pytest.raises(UsageError) as error:
            machine.choose_device(name)
        assert str(error.value).startswith(text)

    def test_every_command(self):
        """All commands but info, which computes nothing, have the option in the same words."""
        for name in cli.COMMANDS.keys() - {"info"}:
            parser = argparse.ArgumentParser()
            cli.COMMANDS[name].add_options(parser)
            found = [a for a in parser._actions if "--device" in a.option_strings]
            assert [(a.default, a.help) for a in found] == [(None, machine.DEVICE_HELP)], name


class TestErrors:
    """Errors take one line; the status is 2 for bad usage, 1 for failure."""

    @pytest.mark.parametrize(
        "arguments, text",
        [
            ("", "a command is wanted: generate, chat, demo, eval, train or info"),
            ("sing", "invalid choice: 'sing'"),
            ("generate --tree-nodes x", "argument --tree-nodes: invalid int value: 'x'"),
            ("generate --tree-widths 2,x", "invalid comma-separated integers value: '2,x'"),
            ("generate --prompt a --tree-nodes 0", "tree_nodes must be at least 1, got 0"),
            ("generate --prompt a --budget 33", "budget must be a positive multiple of chunk_size"),
            ("generate --prompt a --target here", "--target needs --draft"),
            ("generate --prompt a --threads 0", "--threads must be at least 1, got 0"),
            ("generate --prompt a --prompt-file b", "not allowed with argument --prompt"),
            ("generate --temperature -1 PAIR", "--temperature must not be negative, got -1"),
            ("generate --temperature 0 --top-k 3 PAIR", "no meaning with --temperature 0"),
            ("generate --max-new-tokens 0 PAIR", "--max-new-tokens must be at least 1, got 0"),
            ("generate --device gpu PAIR", "--device must be cpu, cuda or cuda:N, got gpu"),
            ("generate --device meta PAIR", "--device must be cpu, cuda or cuda:N, got meta"),
            ("generate --device cuda:99 PAIR", "--device cuda:99: "),  # no kernels, or no such GPU
        ],
    )  # fmt: skip
    def test_usage(self, run, folder, arguments, text):
        pair = f"--prompt a --target {folder / 'target'} --draft {folder / 'draft'}"
        command, *rest = arguments.replace("PAIR", pair).split() or [""]
        code, out, err = run(command, *rest, pair=None)
        assert code == 2 and out == ""
        assert err.startswith("specextend: error: ") and err.count("\n") == 1 and text in err

    @pytest.mark.parametrize(
        "command",
        [
            "generate --prompt a PAIR", "chat PAIR", "demo PAIR", "demo --web --port 0 PAIR",
            "eval --lengths 64 --output OUT PAIR", "eval --synthetic 0.5 --lengths 64 --output OUT",
            "train --kind longspec --data FILE --output OUT",
        ],
    )  # fmt: skip
    def test_devices(self, run, folder, tmp_path, command):
        """Every command that computes has --device, with one check and one text."""
        (tmp_path / "text").write_text("a" * 100)
        pair = f"--target {folder / 'target'} --draft {folder / 'draft'}"
        named = command.replace("PAIR", pair).replace("OUT", str(tmp_path / "out"))
        words = named.replace("FILE", str(tmp_path / "text")).split()
        for device in ("gpu", "meta"):
            code, _, err = run(*words, "--device", device, pair=None)
            expected = f"specextend: error: --device must be cpu, cuda or cuda:N, got {device}\n"
            assert (code, err) == (2, expected)
        code, _, err = run(*words, "--device", "cuda:99", pair=None)
        assert code == 2 and err.startswith("specextend: error: --device cuda:99: ")

    @pytest.mark.parametrize(
        "arguments, pair, text",
        [
            ("--prompt-file /nowhere/prompt.txt", ("target", "draft"), "/nowhere/prompt.txt"),
            ("--prompt a", ("target", "other"), "must have the same tokenizer: id"),
            ("--prompt a", ("neo", "draft"), "GPTNeoForCausalLM is not supported"),
            ("--prompt a", ("target", "nothing"), "there is no folder"),
            ("--prompt a --chat", ("target", "draft"), "no chat template"),
            ("--prompt-file /dev/null", ("target", "draft"), "the prompt is empty"),
            (f"--prompt {'a' * 500}", ("target", "draft"), "has 512 positions, but the"),
            ("--prompt a --score-layers 9", ("target", "draft"), "score_layers must be in [-2, 2)"),
        ],
    )  # fmt: skip
    def test_failures(self, run, arguments, pair, text):
        code, out, err = run("generate", *arguments.split(), pair=pair)
        assert code == 1 and out == ""
        assert err.startswith("specextend: error: ") and err.count("\n") == 1 and text in err

    def test_damaged_checkpoint(self, run, folder, tmp_path):
        for file in (folder / "target").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "config.json").write_text("{")
        code, _, err = run(
            "generate", "--prompt", "a", "--target", tmp_path, "--draft", tmp_path, pair=None
        )
        assert code == 1 and err.startswith("specextend: error: ") and err.count("\n") == 1


def test_as_a_program(folder):
    """`python -m specextend`, and a reader that goes away."""
    command = [sys.executable, "-m", "specextend", "generate", "--prompt", TEXT]
    command += ["--target", str(folder / "target"), "--draft", str(folder / "draft"), *SMALL]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "50", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert len(process.stdout.read(1)) == 1
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait() == 1 and "Traceback" not in err and "BrokenPipe" not in err


# ---- what a stream can show ----------------------------------------------------------------------


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return Screen()


class TestOutput:
    def test_colour_on_a_terminal_only(self, screen):
        terminal.Output(screen).write("yes", "accepted")
        assert screen.getvalue() == "\x1b[32myes\x1b[0m"
        pipe = io.StringIO()
        terminal.Output(pipe).write("yes", "accepted")
        assert pipe.getvalue() == "yes"

    @pytest.mark.parametrize("name, value", [("NO_COLOR", "1"), ("TERM", "dumb")])
    def test_no_colour(self, screen, monkeypatch, name, value):
        monkeypatch.setenv(name, value)
        terminal.Output(screen).write("yes", "accepted")
        assert screen.getvalue() == "yes"

    def test_control_characters_do_not_reach_a_terminal(self, screen):
        terminal.Output(screen).write("a\x1b[2J\tb\n\r\x9b")
        assert screen.getvalue() == "a\ufffd[2J\tb\n\ufffd\ufffd"
        pipe = io.StringIO()
        terminal.Output(pipe).write("a\x1b[2J")
        assert pipe.getvalue() == "a\x1b[2J"

    def test_table(self, screen, monkeypatch):
        header, rows = (
            ["", "tokens /s", "length"],
            [["plain", "1.0", "1.00"], ["tree", "12.5", "3"]],
        )
        pipe = io.StringIO()
        terminal.Output(pipe).table(header, rows)
        assert pipe.getvalue() == (
            "       tokens\n           /s  length\nplain     1.0    1.00\ntree     12.5       3\n"
        )
        monkeypatch.setenv("COLUMNS", "20")
        monkeypatch.setenv("NO_COLOR", "1")
        terminal.Output(screen).table(header, rows)
        assert screen.getvalue() == (
            "           plain  tree\n"
            "tokens /s    1.0  12.5\n"
            "length      1.00     3\n"
        )  # fmt: skip


class TestMeter:
    @pytest.fixture
    def clock(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
        return now

    def test_lines_now_and_then(self, clock):
        stream = io.StringIO()
        with terminal.Meter(terminal.Output(stream), "tree") as meter:
            for done in range(0, 4001, 100):
                clock[0] = done / 200
                meter("draft_prefill", done, 4000)
                meter("short", done, 2047)
        assert stream.getvalue() == "".join(
            f"tree: draft prefill: {done:,} of 4,000 tokens\n" for done in (1000, 2000, 3000, 4000)
        )

    def test_bar_on_a_terminal(self, clock, screen):
        output = terminal.Output(screen)
        meter = terminal.Meter(output)
        for done in (0, 2000, 4000):
            clock[0] += 1
            meter("prefill", done, 4000)
        assert "prefill" in screen.getvalue() and "2,000 of 4,000 tokens" in screen.getvalue()
        meter.close()
        assert screen.getvalue().endswith("\x1b[2K")  # nothing of it stays
        meter("prefill", 0, 4000)
        meter.close()


class TestDetokenizer:
    TEXT = "naïve – 日本語, \N{SLIGHTLY SMILING FACE} end"

    def test_whole_characters_only(self):
        tokenizer = byte_tokenizer()
        ids = tokenizer(self.TEXT).input_ids
        assert len(ids) == len(self.TEXT.encode())
        detokenizer = terminal.Detokenizer(tokenizer)
        pieces = [detokenizer.add(token) for token in ids]
        assert "".join(pieces) == self.TEXT and max(map(len, pieces)) == 1
        assert detokenizer.end() == ""

    def test_unfinished_character_comes_at_the_end(self):
        tokenizer = byte_tokenizer()
        ids = tokenizer("a日").input_ids
        detokenizer = terminal.Detokenizer(tokenizer)
        pieces = [detokenizer.add(token) for token in ids[:-1]]
        assert pieces == ["a", "", ""] and detokenizer.end() == "\ufffd"


def test_unknown_instruction_set():
    """Read when it is used, and told in a line."""
    environment = {**os.environ, "SPECEXTEND_CPU_ISA": "abacus"}
    ran = subprocess.run(
        [sys.executable, "-m", "specextend", "info"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1 and ran.stderr.startswith("specextend: error: SPECEXTEND_CPU_ISA")
