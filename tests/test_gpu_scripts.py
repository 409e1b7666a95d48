"""Tests the scripts for machines with a GPU: how they run and record steps; rehearses each."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GPU = ROOT / "bench/gpu"
SCRIPTS = {"a": "a_right", "b": "b_round", "c": "c_record"}


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(GPU))


@pytest.fixture
def steps():
    return importlib.import_module("steps")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


class TestPlans:
    @pytest.mark.parametrize("name", SCRIPTS.values())
    def test_fit_in_ten_minutes(self, steps, name, tmp_path):
        """The limits of all steps fit together, so that the last one has its time, too."""
        plan = importlib.import_module(name).plan(tmp_path, "cuda")
        assert sum(step.limit for step in plan if not step.needed) <= steps.DEADLINE < 600
        assert len({step.name for step in plan}) == len(plan)
        for step in plan:
            files = [str(w) for w in step.command if str(w).startswith(("bench/", "tests/"))]
            assert all((ROOT / file).exists() for file in files), step

    def test_what_shows_errors_comes_before_what_measures(self, tmp_path):
        plan = importlib.import_module("a_right").plan(tmp_path, "cuda")
        names = [step.name.split()[0] for step in plan]
        assert names == ["module", *["cases"] * 17, "Hopper", "forks", "goals", *["profile"] * 3]
        assert [step.name for step in plan if step.needed] == ["module"]

    def test_every_op_has_cases_and_tests(self, tmp_path):
        ops = {path.stem for path in (ROOT / "csrc/ops").glob("*.cpp")}
        a, b = (importlib.import_module(SCRIPTS[key]) for key in "ab")
        assert {"tree_attention", *a.CASES} == ops
        tested = {step.name.removeprefix("tests of ") for step in b.plan(tmp_path, "cuda")}
        assert ops | {"graphs"} <= tested


@pytest.mark.sweep(1)
@pytest.mark.parametrize("key", SCRIPTS)
def test_rehearsal(key, tmp_path):
    """Every step runs in its small form; the folder gets two files, which hold all there is."""
    command = [sys.executable, f"bench/gpu/{SCRIPTS[key]}.py", str(tmp_path), "--rehearse"]
    ran = subprocess.run([*command, "--commit", "abc"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{key}.json", f"{key}.log"]
    record = json.loads((tmp_path / f"{key}.json").read_text())
    assert record["commit"] == "abc" and record["packages"]["torch"] and record["command"]
    assert {step["status"] for step in record["steps"]} == {"passed"}
    assert all(result for result in record["results"].values())
    log = (tmp_path / f"{key}.log").read_text()
    assert all(f"==== {step['name']}: " in log for step in record["steps"])


class TestRunning:
    def test_to_the_end_and_recorded(self, steps, tmp_path):
        result, folder = tmp_path / "r.json", tmp_path / "deep"
        plan = [
            steps.Step("good", python("print('fine')"), 20),
            steps.Step("bad", python("print('it broke'); raise SystemExit(3)"), 20),
            steps.Step("slow", python("import time; print('on'); time.sleep(60)"), 1),
            steps.Step("absent", ["no-such-tool"], 5),
            steps.Step("result", python(f"open({str(result)!r}, 'w').write('[1]')"), 20, result),
            steps.Step(
                "told", python("import os; print(os.environ['WORD'])"), 20, env={"WORD": "said"}
            ),
        ]
        start = time.monotonic()
        assert not steps.run_all(plan, {"gpu": "none"}, folder, "x", 60)
        assert time.monotonic() - start < 30
        record = json.loads((folder / "x.json").read_text())
        assert record["gpu"] == "none" and record["results"] == {"result": [1]}
        states = {s["name"]: s["status"] for s in record["steps"]}
        assert states == dict(
            good="passed", bad="failed", slow="timed out", absent="skipped", result="passed",
            told="passed",
        )  # fmt: skip
        assert record["steps"][1]["exit_status"] == 3
        log = (folder / "x.log").read_text()
        for index, text in ((1, "it broke"), (2, "on"), (5, "said")):
            assert record["steps"][index]["output_tail"].strip() == text and text in log
        assert "==== told: WORD=said " in log

    def test_tools_that_are_not_here_are_no_fault(self, steps, tmp_path):
        plan = [steps.Step("absent", ["no-such-tool"], 5), steps.Step("good", python(""), 20)]
        assert steps.run_all(plan, {}, tmp_path, "x", 60)

    def test_packages_in_folders_of_their_own_are_seen(self, steps, tmp_path, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", "elsewhere")
        step = steps.Step("path", python("import os; print(os.environ['PYTHONPATH'])"), 20)
        assert steps.run(step, 20, tmp_path / "log").output_tail.strip() == f"{ROOT}:elsewhere"

    def test_children_end_with_their_step(self, steps, tmp_path):
        mark = tmp_path / "mark"
        child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
        code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}])"
        parent = steps.Step("parent", python(code + "; time.sleep(60)"), 0.7)
        steps.run(parent, parent.limit, tmp_path / "log")
        time.sleep(2)
        assert not mark.exists()

    def test_stops_where_going_on_makes_no_sense(self, steps, tmp_path):
        plan = [
            steps.Step("module", python("raise SystemExit(1)"), 20, needed=True),
            steps.Step("next", ["x"], 9),
        ]
        assert not steps.run_all(plan, {}, tmp_path, "x", 60)
        record = json.loads((tmp_path / "x.json").read_text())
        assert record["steps"][1]["status"] == "skipped"
        assert record["steps"][1]["output_tail"] == "module did not pass"
        assert not steps.run_all([steps.Step("late", python(""), 9)], {}, tmp_path, "x", 0)
        record = json.loads((tmp_path / "x.json").read_text())
        assert record["steps"][0]["output_tail"] == "no time was left"


class TestModule:
    """Tests what is done with the module that tools/carry.py made, and without one."""

    @pytest.fixture
    def module(self, tmp_path, monkeypatch):
        module = importlib.import_module("module")
        (tmp_path / "specextend").mkdir()
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "CARRIED", tmp_path / "build/carry")
        monkeypatch.setattr(sys, "argv", ["module.py"])
        return module

    @pytest.mark.parametrize(
        "loads, builds, answers, status, built",
        [
            (True, True, True, 0, False),
            (True, True, False, 1, False),  # no GPU: a build would not help
            (False, True, True, 0, True),
            (False, False, True, 1, True),
        ],
    )
    def test_built_only_where_that_helps(
        self, module, monkeypatch, loads, builds, answers, status, built
    ):
        done = []

        def runs(code: str) -> bool:
            return answers if code == module.GPU_ANSWERS else loads or bool(done and builds)

        monkeypatch.setattr(module, "runs", runs)
        monkeypatch.setattr(module, "build", lambda: done.append(1) or builds)
        assert module.main() == status and bool(done) == built

    def test_the_carried_one_comes_first(self, module, monkeypatch):
        carried = module.CARRIED / "module" / module.NAME
        carried.parent.mkdir(parents=True)
        carried.write_text("carried")
        (module.ROOT / "specextend" / module.NAME).write_text("what was there")
        monkeypatch.setattr(module, "runs", lambda code: True)
        assert module.main() == 0
        assert (module.ROOT / "specextend" / module.NAME).read_text() == "carried"


def test_predictions_are_in_the_documentation():
    """What is predicted of an H200 stands there before one has been asked, line by line."""
    predict = runpy.run_path(str(GPU / "predict.py"))
    page = (ROOT / "docs/measuring.md").read_text(encoding="utf-8")
    assert predict["table"]() in page
    assert all(
        p["us"] > 1e6 * p["bytes"] / predict["BANDWIDTH"]
        for p in (predict["attention"](*case) for case in predict["goal_cases"]())
    )
