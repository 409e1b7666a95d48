"""The one command for machines with a GPU: its plan, and how it runs and records steps."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "bench/gpu_check.py")
gpu_check = importlib.util.module_from_spec(_spec)
sys.modules["gpu_check"] = gpu_check
_spec.loader.exec_module(gpu_check)

Step = gpu_check.Step


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_dry_run_prints_the_plan_and_runs_nothing():
    command = [sys.executable, "bench/gpu_check.py", "--dry-run"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    names = [line.split()[0] for line in ran.stdout.splitlines()[:-1]]
    assert ran.returncode == 0 and "nothing was run" in ran.stdout
    # What shows errors comes before what measures.
    assert names[:6] == ["build", "cases", "tests", "memcheck", "racecheck", "synccheck"]
    assert {"ops", "decode"} <= set(names[6:])
    for step in gpu_check.plan(sys.executable, Path("results")):
        scripts = [part for part in step.command if part.startswith("bench/")]
        assert all((ROOT / script).exists() for script in scripts), step


def test_fits_in_ten_minutes():
    assert gpu_check.DEADLINE < 600
    needed = [s for s in gpu_check.plan("python", Path(".")) if s.needed]
    assert [s.name for s in needed] == ["build"]


def test_runs_to_the_end_and_records(tmp_path):
    result, path = tmp_path / "r.json", tmp_path / "deep/record.json"
    steps = [
        Step("good", python("print('fine')"), 20),
        Step("bad", python("print('it broke'); raise SystemExit(3)"), 20),
        Step("slow", python("import time; print('on', flush=True); time.sleep(60)"), 1),
        Step("absent", ["no-such-tool"], 5),
        Step("result", python(f"open({str(result)!r}, 'w').write('[1]')"), 20, result),
    ]
    start = time.monotonic()
    assert not gpu_check.run_all(steps, {"gpu": "none"}, path, 60)
    assert time.monotonic() - start < 30
    record = json.loads(path.read_text())
    assert record["gpu"] == "none" and record["results"] == {"result": [1]}
    states = {s["name"]: s["status"] for s in record["steps"]}
    assert states == dict(
        good="passed", bad="failed", slow="timed out", absent="skipped", result="passed"
    )
    assert record["steps"][1]["exit_status"] == 3
    assert "it broke" in record["steps"][1]["output_tail"]
    assert "on" in record["steps"][2]["output_tail"]


def test_children_end_with_their_step(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); "
    gpu_check.run(Step("parent", python(code + "time.sleep(60)"), 1), 1)
    time.sleep(4)
    assert not mark.exists()


def test_stops_where_going_on_makes_no_sense(tmp_path):
    path = tmp_path / "record.json"
    steps = [Step("build", python("raise SystemExit(1)"), 20, needed=True), Step("next", ["x"], 9)]
    assert not gpu_check.run_all(steps, {}, path, 60)
    record = json.loads(path.read_text())
    assert record["steps"][1]["status"] == "skipped"
    assert record["steps"][1]["output_tail"] == "build did not pass"
    assert not gpu_check.run_all([Step("late", python(""), 9)], {}, path, 0)
    assert json.loads(path.read_text())["steps"][0]["output_tail"] == "no time was left"


@pytest.mark.skipif(bool(gpu_check.describe()["gpu"]), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, "bench/gpu_check.py"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2 and "no GPU here" in ran.stdout
