"""Everything that takes a GPU, in ten minutes at most: build, tests, sanitizer, benchmark.

    python bench/gpu_check.py [--dry-run] [--only build cases] [--json out.json]

Needs nvcc, torch with CUDA and the packages of pyproject.toml; no network. What shows errors comes
first. Every step has a limit of its own, and the whole a deadline; the record, one JSON file in
bench/results/, is written again after each step, so that it is there however the run ends. The exit
status is 0 if every step passed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 585.0  # seconds for all steps together
TAIL = 6000  # characters of a step's output that the record keeps


@dataclass
class Step:
    """One command.

    Attributes:
        limit: seconds.
        result: JSON that it writes, for the record.
        needed: nothing after it makes sense if it fails.
    """

    name: str
    command: list[str]
    limit: float
    result: Path | None = None
    needed: bool = False
    env: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of a step: passed, failed, timed out or skipped."""

    name: str
    command: str
    status: str
    seconds: float = 0.0
    exit_status: int | None = None
    output_tail: str = ""


def sanitizer() -> str:
    """compute-sanitizer, from PATH or the toolkit."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{home}/bin:{home}/compute-sanitizer"
    )
    return found or "compute-sanitizer"


def plan(python: str, folder: Path) -> list[Step]:
    """The steps, results of which go to ``folder``."""
    cases = [python, "bench/small_cases.py", "--device", "cuda"]
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    build = {"SPECEXTEND_CUDA": "ON", "SPECEXTEND_BUILD_DIR": str(ROOT / "build/gpu_check")}

    def checked(tool: str, limit: float) -> Step:
        options = ["--tool", tool, "--kernel-name", "kns=specextend", "--error-exitcode", "99"]
        return Step(tool, [sanitizer(), *options, *cases, "--few"], limit)

    def writes(name: str, command: list[str], limit: float) -> Step:
        path = folder / f"{name}.json"
        return Step(name, [*command, "--json", str(path)], limit, path)

    return [
        Step("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 240, None, True, build),
        Step("cases", cases, 60),
        Step("tests", [python, "-m", "pytest", "-k", "cuda", "--maxfail=25", *workers], 150),
        checked("memcheck", 60),
        checked("racecheck", 80),
        checked("synccheck", 50),
        writes("kernels", [python, "bench/kernel_report.py", "--build", "build/gpu_check"], 20),
        writes("ops", [python, "bench/bench_ops.py", "--device", "cuda", "--quick"], 110),
        writes("decode", [python, "bench/bench_decode.py", "--device", "cuda", "--quick"], 120),
        writes("flex", [python, "bench/bench_ops.py", "--device", "cuda", "--quick", "--flex",
                        "--seconds", "0.1", "--filter", "tree=32"], 90),
    ]  # fmt: skip


def run(step: Step, limit: float) -> Outcome:
    """Run one step, and end it with all of its children at its limit."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **step.env}
    shown = " ".join(step.command)
    if shutil.which(step.command[0]) is None:
        return Outcome(step.name, shown, "skipped", output_tail=f"no {step.command[0]} here")
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(limit)
            status = "passed" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            for how in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, how)
                    process.wait(3)
                except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
                    pass
        output.seek(0, os.SEEK_END)
        output.seek(max(0, output.tell() - TAIL))
        tail = output.read()
    seconds = time.monotonic() - start
    return Outcome(step.name, shown, status, seconds, process.returncode, tail)


def run_all(steps: list[Step], record: dict, path: Path, deadline: float) -> bool:
    """Run steps in order until the deadline, ``record`` written to ``path`` behind each of them.

    Returns:
        Whether all of them passed.
    """
    start, stopped = time.monotonic(), ""
    record["steps"], record["results"] = [], {}
    path.parent.mkdir(parents=True, exist_ok=True)
    for step in steps:
        left = deadline - (time.monotonic() - start)
        print(f"{step.name}: {' '.join(step.command)}", flush=True)
        if left < 5 and not stopped:
            stopped = "no time was left"
        if stopped:
            outcome = Outcome(step.name, " ".join(step.command), "skipped", output_tail=stopped)
        else:
            outcome = run(step, min(step.limit, left))
        if step.needed and outcome.status != "passed":
            stopped = f"{step.name} did not pass"
        if step.result is not None and step.result.exists():
            record["results"][step.name] = json.loads(step.result.read_text())
        record["steps"].append(asdict(outcome))
        record["seconds"] = time.monotonic() - start
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{step.name}: {outcome.status} after {outcome.seconds:.0f} s", flush=True)
        if outcome.status != "passed":
            print(outcome.output_tail, flush=True)
    return all(s["status"] == "passed" for s in record["steps"])


def output_of(*command: str) -> str:
    """What a command prints, "" if it is not there."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def describe() -> dict:
    """Machine, versions and commit."""
    query = "--query-gpu=name,driver_version,memory.total"
    return {
        "gpu": output_of("nvidia-smi", query, "--format=csv,noheader"),
        "machine": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "nvcc": output_of("nvcc", "--version").splitlines()[-1:],
        "packages": {name: version_of(name) for name in ("torch", "transformers", "triton")},
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print the steps and their limits")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    parser.add_argument("--json", type=Path, help="the record (default: in bench/results/)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps = plan(sys.executable, Path(folder))
        if arguments.only:
            unknown = set(arguments.only) - {s.name for s in steps}
            if unknown:
                parser.error(f"no step {min(unknown)!r}: there are {[s.name for s in steps]}")
            steps = [s for s in steps if s.name in arguments.only]
        if arguments.dry_run:
            for step in steps:
                print(f"{step.name:10} at most {step.limit:4.0f} s: {' '.join(step.command)}")
            print(f"all of them at most {DEADLINE:.0f} s; nothing was run")
            return 0
        record = describe()
        if not record["gpu"]:
            print("no GPU here (nvidia-smi names none); --dry-run prints what would be run")
            return 2
        name = "_".join(record["gpu"].split(",")[0].lower().split())
        path = arguments.json or ROOT / f"bench/results/{name}_{record['commit']}.json"
        passed = run_all(steps, record, path, DEADLINE)
        print(f"{'all passed' if passed else 'NOT all passed'}: {path}")
        return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
