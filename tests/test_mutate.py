"""Tests the lists of planted faults, and how `tools/mutate.py` plants and judges them."""

from __future__ import annotations

import sys
from pathlib import Path

import emulation
import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"
if not TOOLS.is_dir():
    pytest.skip("tools/ is not part of this installation", allow_module_level=True)
sys.path.insert(0, str(TOOLS))

import mutants  # noqa: E402
import mutate  # noqa: E402
from mutants import Area, Mutant  # noqa: E402

AREAS = {area.name: area for area in mutants.areas()}
EACH = [(area, mutant) for area in AREAS.values() for mutant in area.mutants]


class TestLists:
    def test_counts(self):
        count = {name: len(area.mutants) for name, area in AREAS.items()}
        assert count["cuda"] >= 80 and count["python"] >= 20
        assert count["cpu"] + count["partition"] >= 20

    def test_every_fault_can_be_planted(self):
        for _, mutant in EACH:
            assert mutant.old != mutant.new
            mutant.planted()  # what it replaces is there once

    def test_names_tell_faults_apart(self):
        names = [mutant.name for _, mutant in EACH]
        assert len(set(names)) == len(names)
        planted = [(mutant.file, mutant.old, mutant.new) for _, mutant in EACH]
        assert len(set(planted)) == len(planted)

    def test_tests_and_sources_are_there(self):
        emulation.instantiations()
        for area, mutant in EACH:
            assert mutant.tests, mutant.name
            for test in mutant.tests:
                file, *path = test.split("::")
                text = (mutants.ROOT / file).read_text(encoding="utf-8")
                for name in path:
                    name = name.split("[")[0]
                    assert f"def {name}(" in text or f"class {name}" in text, (mutant.name, test)
            for source in mutant.sources:
                assert (mutants.ROOT / source).is_file(), (mutant.name, source)
            compiled = area.name in ("cuda", "cpu", "amx")
            assert bool(mutant.sources) == compiled, mutant.name
            if mutant.file.endswith((".cpp", ".cu")):
                assert mutant.file in mutant.sources, mutant.name

    def test_a_fault_that_is_not_there_is_an_error(self):
        fault = Mutant("name", "Makefile", "no such text", "", ())
        with pytest.raises(ValueError, match="name: in Makefile 0 times, not once: 'no such text'"):
            fault.planted()


@pytest.mark.parametrize(
    "status, output, want",
    [
        (0, "3 passed, 1 skipped in 2 s", ("survived", "3 tests")),
        (0, "3 skipped in 2 s", ("broken", "all tests are skipped")),
        (1, "FAILED tests/test_a.py::test_b[x y] - assert 1\n", 
         ("found", "tests/test_a.py::test_b[x y] - assert 1")),
        (1, "ERROR tests/test_a.py::test_b - RuntimeError: emulation: x does not compile\n"
            "a.cpp:1:2: error: no ';'\n", ("broken", "does not compile: error: no ';'")),
        (2, "ERROR tests/test_a.py - SyntaxError\n",
         ("broken", "pytest ends with 2: tests/test_a.py - SyntaxError")),
        (None, "", ("found", f"not over after {mutate.SECONDS} s")),
        (-11, 'Fatal\n  File "/a/tests/cases.py", line 7 in f\n', 
         ("found", "SIGSEGV in tests/cases.py:7")),
    ],
)  # fmt: skip
def test_judging(status, output, want):
    assert mutate.judge(status, output) == want


def test_tests_are_named_once():
    def naming(*tests):
        return Mutant("", "", "", "", tests)

    named = [naming("a.py::b"), naming("c.py::d", "a.py::b"), naming("c.py")]
    assert mutate.union(named) == ["a.py::b", "c.py"]
    assert mutate.stages(named[1]) == [["c.py::d", "a.py::b"]]
    assert mutate.stages(naming("c.py", "a.py::b")) == [["a.py::b"], ["c.py"]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Give results and faults of these tests a folder."""
    monkeypatch.setattr(mutate, "FOLDER", tmp_path)
    monkeypatch.setattr(mutate, "RESULTS", tmp_path / "results.json")
    return tmp_path


# What is quick of each kind.
QUICK = {
    "python": ("n-gram: among equals the oldest", "n-gram: a match one token shorter than wanted"),
    "partition": ("partition: two parts in one place",),
    "cpu": ("select_chunks: a chunk that has only begun does not count",),
    "cuda": ("append_kv: rows that do not fit are written",),
}


@pytest.mark.long  # half a minute
@pytest.mark.parametrize("name", QUICK)
def test_faults_are_found(name, folder, monkeypatch, capsys):
    """Faults are planted in each way: on the command line, with results that are kept."""
    own = [m for m in AREAS[name].mutants if m.name in QUICK[name]]
    assert len(own) == len(QUICK[name])
    area = Area(name, own, AREAS[name].keyword, AREAS[name].environment)
    monkeypatch.setattr(mutate, "areas", lambda: [area])
    monkeypatch.setattr(sys, "argv", ["mutate.py", "--jobs", "1"])
    for runs in (True, False):  # then from what is kept
        assert mutate.main() == 0
        printed = capsys.readouterr().out
        assert printed.count(" found ") == len(own) + 1 and "100.0%" in printed  # and a heading
        assert ("pass without a fault" in printed) == runs


@pytest.mark.long  # 15 s
def test_a_fault_is_seen_by_processes_that_tests_start(folder, tmp_path):
    """And by nobody else: the tree is as it was."""
    fault = Mutant(
        "another version", "specextend/__init__.py", "import", "import sys; sys.exit(7)\nimport", ()
    )
    text = (mutants.ROOT / fault.file).read_text()
    fault = Mutant(fault.name, fault.file, text, "import sys; sys.exit(7)\n", ())
    tree = tmp_path / "tree"
    mutate.plant_in_python(fault, tree)
    (tree / "tests/test_planted.py").write_text(
        "import subprocess, sys\n"
        "def test_it(tmp_path):\n"
        "    command = [sys.executable, '-c', 'import specextend']\n"
        "    assert subprocess.run(command, cwd=tmp_path).returncode == 0\n"
    )
    (tree / "tests/conftest.py").unlink()  # it imports the package itself
    status, output = mutate.run_tests(["tests/test_planted.py"], "", tree, {}, 100)
    assert status == 1 and "7 == 0" in output
    assert (mutants.ROOT / fault.file).read_text() == text


def test_a_run_that_hangs_is_ended(folder, tmp_path):
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "test_hang.py").write_text(
        "import subprocess, sys, time\n"
        "def test_it():\n"
        "    subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    )
    status, _ = mutate.run_tests(["test_hang.py"], "", tmp_path, {}, 3)
    assert status is None
