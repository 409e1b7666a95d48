"""Every code block of the README and of the documentation runs.

A block's first line says what it is, as the reader's Markdown does:

* ``python``: runs, in one namespace per page, in order.
* ``sh``: every command runs, in a folder of the page's own, in order with the Python of the page.
* ``text``: what the block in front of it printed; ``...`` stands for anything.
* a language and a file (``cpp csrc/merge.h``): lines of that file; a line ``...`` leaves some out.

Blocks of any other kind fail, so that none goes unnoticed. The examples in docstrings run, too.
"""

from __future__ import annotations

import argparse
import doctest
import functools
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt  # comes with rich
from transformers import AutoModelForCausalLM

from specextend import SpecExtend, assets, cli, ops

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "specextend/assets/README.md",
]

# What a reader puts in. MODEL behind --draft is a draft.
PLACEHOLDERS = {"MODEL": assets.target_path(), "DRAFT": assets.draft_path()}

# What is added to commands to make them short.
SHORTER = {
    "specextend generate": "--max-new-tokens 8",
    "specextend chat": "--max-new-tokens 8",
    "specextend eval": "--lengths 256 --max-new-tokens 8 --runs 1 --warmup 0",
    "specextend train": "--steps 1 --warmup 0 --length 64 --batch 1 --no-tensorboard",
    "python -m specextend.train.continuations": "--count 2 --passage 192 --new 8",
    "python -m tools.embedded.evaluate_pair": "--lengths 200 --documents 1 --new 8",
    "python bench/bench_acceptance.py": "--lengths 200 --documents 1 --new 8",
}

# Commands that are not run here: where they are, as a whole or in their short form, and what says
# so there. What follows these words is parsed by the command's own parser.
ELSEWHERE = {
    "make demo": ("tests/test_demo.py", 'SHORT = ["demo", "--short"'),
    "make build": (".ci/run", "make build"),
    "make test": (".ci/run", "make test"),
    "make test-long": ("Makefile", "pytest $(workers) -m long"),
    "make test-newest": (".ci/run", "make test-newest"),
    "make test-oldest": ("tests/test_versions.py", "smoke.OLDEST"),
    "make mutants": ("tests/test_mutate.py", "def test_faults_are_found("),
    "python tools/mutate.py": ("tests/test_mutate.py", "def test_faults_are_found("),
    "python bench/bench_same_text.py": ("tests/test_bench.py", "def test_decisions_that_differ"),
    "make lint": ("Makefile", "ruff check . &&"),
    "make bench": ("bench/gpu/c_record.py", '"bench/bench_ops.py"'),
    "pip install": ("Makefile", "pip install -q --no-build-isolation --no-deps -e ."),
    "specextend demo": ("tests/test_demo.py", 'SHORT = ["demo", "--short"'),
    "specextend eval --output": ("tests/test_eval.py", "def test_command("),
    "specextend eval --prompts": ("tests/test_eval.py", "def test_command("),
    "specextend demo --web": ("tests/test_web.py", 'cli.main(["demo", "--web"'),
    "python -m pytest": ("Makefile", "$(python) -m pytest"),
    "python bench/gpu/a_right.py": ("tests/test_gpu_scripts.py", "def test_rehearsal("),
    "python bench/gpu/b_round.py": ("tests/test_gpu_scripts.py", "def test_rehearsal("),
    "python bench/gpu/c_record.py": ("tests/test_gpu_scripts.py", "def test_rehearsal("),
    "python tools/carry.py": ("tests/test_gpu_scripts.py", "class TestModule:"),
    "python bench/kernel_report.py": ("tests/test_kernel_report.py", "kernel_report"),
    "python bench/bench_ops.py": ("bench/gpu/c_record.py", '"bench/bench_ops.py"'),
    "python bench/bench_decode.py": ("tests/test_bench.py", "bench_decode"),
    "python bench/bench_memory.py": ("tests/test_bench.py", "bench_memory"),
    "python bench/bench_answer.py": ("tests/test_bench.py", "def test_answers("),
    "python bench/bench_contexts.py": ("tests/test_bench.py", "def test_contexts("),
    "python bench/bench_prefill.py": ("tests/test_bench.py", "def test_prompts_are_read_alike("),
    "accelerate launch": ("tests/test_train.py", "test_processes_make_the_same_step"),
}
# Hours of training and evaluation, and the text for it: these are parsed, and run by no test.
HOURS = (
    "tools.embedded",
    "tools.embedded.corpus",
)


class Parsed(Exception):
    """A command has understood its arguments."""


def blocks(page: Path) -> list[tuple[str, int, str]]:
    """Info string, line number and text of every code block of a page."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    code = [token for token in tokens if token.type in ("fence", "code_block")]
    return [(token.info.strip(), token.map[0] + 1, token.content) for token in code]


def is_excerpt(info: str) -> bool:
    return len(info.split()) == 2 and (ROOT / info.split()[1]).is_file()


def commands(block: str) -> list[list[str]]:
    """Return the words of every command of a block for the shell."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def longest(table: dict, words: list[str]):
    """Return the entry whose words a command begins with; None without one."""
    found = [key for key in table if words[: len(key.split())] == key.split()]
    return table[max(found, key=len)] if found else None


class Page:
    """Runs the blocks of one page, in a folder of its own."""

    def __init__(self, name: str, capsys, monkeypatch):
        self.name, self.capsys, self.monkeypatch = name, capsys, monkeypatch
        self.namespace = {"__name__": "__main__"}
        self.printed: str | None = None  # by the last block

    def run(self, info: str, line: int, text: str) -> None:
        if is_excerpt(info):
            self.excerpt(info.split()[1], text)
        elif info == "text":
            self.compare(text)
        elif info == "python":
            code = "\n" * line + text  # so that a traceback names the page's lines
            exec(compile(code, self.name, "exec"), self.namespace)
            self.printed = self.capsys.readouterr().out
        elif info == "sh":
            ran = [self.command(words) for words in commands(text)]
            assert ran, "no command"
            self.printed = self.capsys.readouterr().out if all(ran) else None
        else:
            raise AssertionError(f"a block of kind {info!r}: what should be done with it?")

    def excerpt(self, file: str, text: str) -> None:
        source, at = (ROOT / file).read_text(encoding="utf-8"), 0
        for part in re.split(r"^ *\.\.\.\n", text, flags=re.MULTILINE):
            found = source.find(part, at)
            assert found >= 0, f"not in {file}:\n{part}"
            at = found + len(part)

    def compare(self, want: str) -> None:
        assert self.printed is not None, "a text behind nothing that prints"
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.OutputChecker().check_output(want, self.printed, flags), self.printed

    def command(self, words: list[str]) -> bool:
        """Run a command, or look where it is run; whether it ran here."""
        while re.match(r"[A-Z_]+=", words[0]):  # variables of the environment
            words = words[1:]
        elsewhere = longest(ELSEWHERE, words)
        parse_only = elsewhere is not None or words[:2] == ["python", "-m"] and words[2] in HOURS
        if elsewhere is not None:
            file, text = elsewhere
            assert text in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {text!r}"
        else:
            words = words + (longest(SHORTER, words) or "").split()
        words = [str(PLACEHOLDERS.get(word, word)) for word in words]
        for i, word in enumerate(words[:-1]):
            if word == "--draft" and words[i + 1] == str(assets.target_path()):
                words[i + 1] = str(assets.draft_path())
        if parse_only:
            self.parse(words)
        else:
            assert self.program(words) == 0, f"{words}: {self.capsys.readouterr().err}"
        return not parse_only

    def parse(self, words: list[str]) -> None:
        if words[0] == "make":  # what it would do
            plan = subprocess.run(
                ["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True
            )
            assert plan.returncode == 0, plan.stderr
            last = plan.stdout.splitlines()[-1].split(" -m ")[-1]
            words = ["specextend", *shlex.split(last)[1:]] if last.startswith("specextend") else []
        if words[:2] == ["accelerate", "launch"]:
            words = ["specextend", *words[words.index("specextend") + 1 :]]
        if not words or words[0] == "pip" or words[1:3] == ["-m", "pytest"]:
            return
        parse_args = argparse.ArgumentParser.parse_args

        def parse(parser, *args, **kwargs):
            parse_args(parser, *args, **kwargs)
            raise Parsed

        with self.monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse)
            try:
                self.program(words)
            except Parsed:
                return
        raise AssertionError(f"{words}: {self.capsys.readouterr().err}")

    def program(self, words: list[str]) -> int:
        """Run a program of the project in this process, and return its exit status."""
        program, *arguments = words
        try:
            if program == "specextend":
                return cli.main(arguments)
            assert program == "python", f"a program that the test does not know: {program}"
            module = arguments[0] == "-m"
            name, *arguments = arguments[1:] if module else arguments
            with self.monkeypatch.context() as patch:
                patch.setattr(sys, "argv", [name, *arguments])
                if module:
                    patch.syspath_prepend(str(ROOT))
                    runpy.run_module(name, run_name="__main__", alter_sys=True)
                else:
                    patch.syspath_prepend(str((ROOT / name).parent))
                    runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as exit:
            return exit.code or 0
        return 0


@pytest.fixture(scope="module")
def load():
    """Give a ``from_pretrained`` that reads every model once, in float32: not all machines of the
    tests are quick in bfloat16."""
    original = AutoModelForCausalLM.from_pretrained

    @functools.cache
    def cached(path: str, **options):
        return original(path, dtype=torch.float32, **options)

    return lambda path, dtype=None, **options: cached(str(path), **options)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Lay out what a reader has: the project's folders, and the files that the pages speak of."""
    for name in ("specextend", "bench"):
        (tmp_path / name).symlink_to(ROOT / name)
    text = assets.demo_document()[1]
    (tmp_path / "report.txt").write_text(text[:1500], encoding="utf-8")
    for name in ("text.jsonl", "corpus.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": text[:6000]}) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # by runpy
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks(page, folder, load, capsys, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(sys, "stdin", io.StringIO("def area(width, height):\n"))
    runner, threads = (
        Page(str(page.relative_to(ROOT)), capsys, monkeypatch),
        torch.get_num_threads(),
    )
    try:
        for info, line, text in blocks(page):
            try:
                runner.run(info, line, text)
            except Exception as error:
                raise AssertionError(f"{page.relative_to(ROOT)}, line {line}: {error}") from error
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    """Links lead to a file of the project and a heading of it, or to another place by https."""
    for link in re.findall(r"\]\(([^\s)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        file = page.parent / path
        assert file.is_file(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]


EXAMPLES = {**{name: getattr(ops, name) for name in ops.__all__}, "SpecExtend": SpecExtend}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_docstrings(name, load, monkeypatch):
    """Every operator, and the class of the loop, has an example that prints what it says."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(EXAMPLES[name], name, globs={"torch": torch, "ops": ops})
    assert any(example.want or "assert" in example.source for example in test.examples)
    printed = io.StringIO()
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, printed.write)
    assert not printed.getvalue(), printed.getvalue()


def test_figures():
    """The images are what ``docs/figures.py`` draws."""
    figures = runpy.run_path(str(ROOT / "docs/figures.py"))["FIGURES"]
    images = {path.stem: path.read_text() for path in (ROOT / "docs/images").glob("*.svg")}
    assert images == {name: draw().svg() for name, draw in figures.items()}
    shown = (ROOT / "docs/how_it_works.md").read_text(encoding="utf-8")
    assert all(f"images/{name}.svg" in shown for name in figures)


def test_an_untested_block_is_an_error(capsys, monkeypatch):
    page = Page("page", capsys, monkeypatch)
    for info, text in (
        ("", "ls"),
        ("text", "1"),
        ("python", "1 / 0"),
        ("sh", "curl x"),
        ("sh", "specextend demo --no-such-option"),
        ("sh", "make no-such-target"),
        ("cpp csrc/merge.h", "int x;\n"),
    ):
        with pytest.raises((AssertionError, ZeroDivisionError)):
            page.run(info, 1, text)
