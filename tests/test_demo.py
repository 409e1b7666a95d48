"""Tests the demonstration in its short form: on the embedded pair, in a terminal and without."""

from __future__ import annotations

import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl

import pytest
from eagle_heads import make
from models import tiny_model
from test_cli import byte_tokenizer

from specextend import SpecExtend, assets, cli
from specextend.command import demonstration as demo

SHORT = ["demo", "--short", "--threads", "1"]
ROWS = [demo.HUGGING_FACE, demo.PLAIN, *demo.TREES]
COLOUR = re.compile("\x1b\\[3[23]m")
ESCAPE = re.compile("\x1b\\[[0-9;?]*[A-Za-z]")


def table(text: str) -> dict[str, list[str]]:
    """Return the cells of each row."""
    rows = {}
    for line in text.splitlines():
        for name in (*ROWS, demo.TREE):
            if line.startswith(name + "  "):
                rows[name] = line[len(name) :].split()
    return rows


def sections(text: str) -> list[str]:
    """Return what was written live: the lines below each heading up to the line of statistics."""
    return re.findall(r"^-- .*\n((?:.*\n)*?)(?=\d+ tokens \| )", text, re.MULTILINE)


def check_table(text: str) -> None:
    rows = table(text)
    assert list(rows) == ROWS
    for name, cells in rows.items():
        assert len(cells) == 11
        assert cells[-1] == ("-" if name == demo.HUGGING_FACE else "yes")
        assert all(float(cell) >= 0 for cell in cells[:-1] if cell != "-")
        assert float(cells[0]) > 0
    assert rows[demo.HUGGING_FACE][2] == rows[demo.PLAIN][1] == "1.00"
    assert rows[demo.PLAIN][3] == "1.00"  # tokens per forward
    # verify, draft: every tree spent time in both; only one of them retrieved
    assert all(float(rows[name][6]) > 0 and float(rows[name][9]) > 0 for name in demo.TREES)
    assert [name for name in ROWS if rows[name][8] != "-"] == [demo.RETRIEVAL]


def test_without_a_terminal(capsys):
    assert cli.main(SHORT) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert ": 2,000 tokens, then 48 new ones\n" in captured.out
    check_table(captured.out)
    plain, speculative = sections(captured.out)
    assert plain == speculative and len(plain) > 100
    assert "specextend demo --tokens 2000 --max-new-tokens 48 --dtype float32\n" in captured.out
    # The way to go on is one that the command understands.
    last = captured.out.replace("\\\n", "").partition("from the hub:\n")[2]
    args = cli.make_parser().parse_args(last.split()[1:])
    assert args.short and args.target.startswith("Qwen/") and args.draft.startswith("Qwen/")


def in_terminal(command: list[str], columns: int, **environment: str) -> tuple[int, str]:
    """Exit status and all that reached a terminal of that width."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    drop = {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "CI"}
    env = {k: v for k, v in os.environ.items() if k not in drop}
    env.update({"TERM": "xterm-256color", **environment})
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # EIO: the other end was closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    return process.wait(), written.decode().replace("\r\n", "\n")


def test_in_a_terminal():
    code, text = in_terminal([sys.executable, "-m", "specextend", *SHORT], columns=130)
    assert code == 0, text
    start = text.index("-- SpecExtend")
    live = text[start : text.index(" tokens | ", start)]
    assert "\x1b[32m" in live and "\x1b[33m" in live  # accepted, and the target's own
    plain = text[text.index("-- plain") : start]
    assert not COLOUR.search(plain)
    assert "of 48 tokens" in text  # a bar, for the ways without live text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0  # the cursor is back
    bare = ESCAPE.sub("", text)
    check_table(bare)
    first, second = sections(bare)
    assert first == second


@pytest.fixture
def tiny(tmp_path):
    """Options for a demonstration on random models."""
    for name, options in (("target", {}), ("draft", dict(seed=1, hidden_size=16, head_dim=8))):
        tiny_model(vocab_size=257, **options).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    document = tmp_path / "document.txt"
    document.write_text("All work and no play makes Jack a dull boy.\n" * 10)
    return [
        "demo", "--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft"),
        "--document", str(document), "--chunk-size", "8", "--budget", "64", "--recent-chunks", "1",
    ]  # fmt: skip


def test_own_models_and_document(tiny, capsys):
    assert cli.main([*tiny, "--tokens", "300", "--max-new-tokens", "20"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("document.txt: 300 tokens, then 20 new ones\ntarget 0.0 M parameters")
    assert "Qwen" not in text
    check_table(text)


@pytest.mark.parametrize(
    "draft, said, ways",
    [
        ("ngram", "n-gram look-up", [demo.TREE]),
        ("self", "the target itself", ["tree, window", demo.RETRIEVAL]),
        ("head", "0.0 M parameters", list(demo.TREES)),
        ("head+ngram", "0.0 M parameters with look-up", list(demo.TREES)),
    ],
)
def test_other_drafts(tiny, tmp_path, capsys, draft, said, ways):
    """There is one row for every way that a draft can be used in."""
    draft = draft.replace("head", str(make("eagle1", vocab=257).write(tmp_path / "weights")))
    assert cli.main([*tiny, "--draft", draft, "--tokens", "300", "--max-new-tokens", "12"]) == 0
    text = capsys.readouterr().out
    assert f", draft {said}, float32" in text and f"specextend demo --draft {draft} " in text
    rows = table(text)
    assert list(rows) == [demo.HUGGING_FACE, demo.PLAIN, *ways]
    assert all(rows[name][-1] == "yes" for name in [demo.PLAIN, *ways])


def test_the_embedded_head_is_asked_for_by_name(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(assets.DRAFTS, "eagle3", str(tmp_path))
    assert cli.main(["demo", "--short", "--draft", "eagle3"]) == 1
    assert "the embedded draft 'eagle3' is not in" in capsys.readouterr().err


def test_difference_is_an_error(tiny, capsys, monkeypatch):
    """One way writes another token: the table says so, and the error names it."""
    stream = SpecExtend.stream

    def wrong(self, *args, **kwargs):
        count = 0
        for step in stream(self, *args, **kwargs):
            if self.draft is not None and self.config.draft_cache == "window":
                for i in range(len(step.tokens)):
                    if count + i == 7:
                        step.tokens[i] = 66
            count += len(step.tokens)
            yield step

    monkeypatch.setattr(SpecExtend, "stream", wrong)
    assert cli.main([*tiny, "--tokens", "200", "--max-new-tokens", "12"]) == 1
    captured = capsys.readouterr()
    assert [cells[-1] for cells in table(captured.out).values()] == ["-", "yes", "yes", "NO", "yes"]
    assert re.search(
        r"^specextend: error: tree, window: new token 7 is .+ \(66\), but .+ \(\d+\) with "
        r"Hugging Face generate; in float32 their logits are [\d.e+-]+ apart$",
        captured.err, re.MULTILINE,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options, code, text",
    [
        (["--tokens", "1"], 2, "--tokens and --max-new-tokens must be at least 2"),
        (["--max-new-tokens", "0"], 2, "must be at least 2"),
        (["--tokens", "1000"], 1, "document.txt has 440 tokens, 1,000 are wanted"),
        (["--tokens", "400", "--max-new-tokens", "200"], 1, "has 512 positions"),
        (["--draft", "none"], 2, "the demonstration needs a draft"),
        (["--gate", "auto"], 2, "unrecognized arguments: --gate auto"),
    ],
)
def test_errors(tiny, capsys, options, code, text):
    try:
        got = cli.main([*tiny, *options])
    except SystemExit as exit:
        got = exit.code
    err = capsys.readouterr().err
    assert got == code and err.startswith("specextend: error: ") and text in err
    assert err.count("\n") == 1
