"""Runs the steps of a script for a machine with a GPU, on which time is short.

Every step is a process with a limit of its own, at which it ends with all of its children. One that
fails or hangs is named, and the next one runs. What steps print goes to one file as it comes, and a
record in JSON is written again after each of them, both into a folder that the command names:
whatever ends the script, they are there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 585.0  # seconds for all steps of a script
TAIL = 3000  # the record keeps so many characters of a step's output; they show if it fails


@dataclass
class Step:
    """Describes one command.

    Attributes:
        limit: seconds that it may take.
        result: JSON that it writes, for the record.
        needed: whether nothing after it makes sense if it fails.
        env: variables of the environment to add.
    """

    name: str
    command: list[str]
    limit: float
    result: Path | None = None
    needed: bool = False
    env: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """Says what became of a step: passed, failed, timed out or skipped."""

    name: str
    command: str
    status: str
    seconds: float = 0.0
    exit_status: int | None = None
    output_tail: str = ""


def run(step: Step, limit: float, log: Path) -> Outcome:
    """Run one step, and write its output to the end of ``log``."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **step.env}
    shown = " ".join([*(f"{k}={v}" for k, v in step.env.items()), *map(str, step.command)])
    if shutil.which(step.command[0]) is None:
        return Outcome(step.name, shown, "skipped", output_tail=f"no {step.command[0]} here")
    start = time.monotonic()
    with log.open("ab+") as output:
        output.write(f"\n==== {step.name}: {shown}\n".encode())
        output.flush()
        begin = output.tell()
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
        end = output.seek(0, os.SEEK_END)
        output.seek(max(begin, end - TAIL))
        tail = output.read().decode(errors="replace")
    return Outcome(step.name, shown, status, time.monotonic() - start, process.returncode, tail)


def run_all(
    steps: list[Step], record: dict, folder: Path, name: str, deadline: float = DEADLINE
) -> bool:
    """Run steps in order until the deadline; ``folder`` gets ``name``.log and ``name``.json.

    Returns:
        Whether none of them failed or was out of time.
    """
    start, stopped = time.monotonic(), ""
    record["steps"], record["results"] = [], {}
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    log.write_text(json.dumps(record) + "\n")
    for step in steps:
        left = deadline - (time.monotonic() - start)
        if left < 5 and not stopped:
            stopped = "no time was left"
        if stopped:
            outcome = Outcome(
                step.name, " ".join(map(str, step.command)), "skipped", 0.0, None, stopped
            )
        else:
            outcome = run(step, min(step.limit, left), log)
        if step.needed and outcome.status != "passed":
            stopped = f"{step.name} did not pass"
        if step.result is not None and step.result.exists():
            record["results"][step.name] = json.loads(step.result.read_text())
        record["steps"].append(asdict(outcome))
        record["seconds"] = time.monotonic() - start
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{step.name}: {outcome.status} after {outcome.seconds:.0f} s", flush=True)
        if outcome.status != "passed":
            print(outcome.output_tail, flush=True)
    # What is not here, a profiler for instance, is no fault; to have had no time is one.
    return not stopped and all(s["status"] in ("passed", "skipped") for s in record["steps"])


def output_of(*command: str) -> str:
    """Return what a command prints, "" if it is not there."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def describe(commit: str | None) -> dict:
    """Return machine, driver, versions, commit, command, and the commit of a carried module."""
    carried = ROOT / "build" / "carry" / "module" / "commit"  # written by tools/carry.py
    query = "--query-gpu=name,driver_version,memory.total"
    return {
        "gpu": output_of("nvidia-smi", query, "--format=csv,noheader"),
        "machine": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "nvcc": output_of("nvcc", "--version").splitlines()[-1:],
        "packages": {name: version_of(name) for name in ("torch", "transformers", "triton")},
        "commit": commit or output_of("git", "describe", "--always", "--dirty"),
        "carried": carried.read_text().strip() if carried.exists() else "",
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main(doc: str, name: str, plan: Callable[[Path, str], list[Step]]) -> int:
    """Run the command line of a script.

    Args:
        doc: its docstring.
        name: of its files.
        plan: its steps, from a folder for their results and the device: "cuda", or "cpu" when the
            script is rehearsed, which takes small cases.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for the log and the record")
    parser.add_argument(
        "--rehearse", action="store_true",
        help="without a GPU: every step in a small form, on the CPU or on the emulation",
    )  # fmt: skip
    parser.add_argument("--commit", help="what is measured, where git does not say")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="steps whose names begin so")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as results:
        steps = plan(Path(results), "cpu" if arguments.rehearse else "cuda")
        if arguments.only:
            steps = [s for s in steps if s.name.startswith(tuple(arguments.only))]
        passed = run_all(steps, describe(arguments.commit), arguments.output, name)
    print(f"{'nothing failed' if passed else 'NOT all passed'}: {arguments.output / name}.json")
    return 0 if passed else 1
