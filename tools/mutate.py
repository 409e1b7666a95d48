"""Plants faults, one at a time, and says which of them the tests notice.

    python tools/mutate.py [--only SUBSTRING] [--list] [--again] [--jobs N]

The faults are listed in tools/mutants/. Each is run against the tests that it names, on this
machine's processor: CUDA kernels by the emulation, CPU kernels and the partition of attention work
by libraries built of the same sources, Python as it is. Nothing is written into the tree. A fault
in C++ lies in a folder from which tests/emulation compiles what it changes; one in Python lies in a
tree of links to this one.

Results are kept in build/mutants/results.json as they come: what was begun can be gone on with, and
only faults are run again whose file, tests or own text, or the emulation, have changed (--again:
all). Before that the tests have to pass without a fault.

The exit status is 1 where less than 95 % of the faults are found, or one of them is none: it does
not compile, or its tests cannot be run.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue

from mutants import ROOT, Area, Mutant, areas

FOLDER = ROOT / "build" / "mutants"
RESULTS = FOLDER / "results.json"
WANTED = 0.95
SECONDS = 300  # a fault's tests may take so long; they are over in much less, or hang
COMMON = ("tests/conftest.py", "tests/backends.py")  # all tests use them besides their own file


@dataclass
class Result:
    """Says what became of a fault.

    Attributes:
        outcome: "found", "survived" or "broken".
        by: the test that failed, and the first line of its error; or what is broken.
        seconds: how long it took, with what had to be compiled.
    """

    outcome: str
    by: str
    seconds: float


def say(text: str) -> None:
    print(f"mutate: {text}", flush=True)


def files_of(tests: tuple[str, ...]) -> list[str]:
    return sorted({test.split("::")[0] for test in tests})


@functools.cache
def emulation() -> list[str]:
    """List the files that kernels run on."""
    folder = ROOT / "tests" / "emulation"
    files = [path for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".h", ".cuh")]
    return sorted(str(path.relative_to(ROOT)) for path in files)


def digest(area: Area, mutant: Mutant) -> str:
    """Digest all that a result depends on."""
    said = {**asdict(mutant), "why_it_survives": ""}
    parts = [json.dumps([said, area.keyword, area.environment], sort_keys=True)]
    for file in (mutant.file, *files_of(mutant.tests), *COMMON, *emulation()):
        parts.append((ROOT / file).read_text(encoding="utf-8"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


class Kept:
    """Keeps results by digest, in a file that is whole at any time."""

    def __init__(self):
        self.results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        self._lock = threading.Lock()

    def get(self, key: str) -> Result | None:
        return Result(**self.results[key]) if key in self.results else None

    def forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.results.pop(key, None)

    def put(self, key: str, result: Result) -> None:
        with self._lock:
            self.results[key] = asdict(result)
            text = json.dumps(self.results, indent=1)
            RESULTS.with_suffix(".new").write_text(text)
            RESULTS.with_suffix(".new").replace(RESULTS)


# ---- planting ------------------------------------------------------------------------------------


def plant_in_cpp(mutant: Mutant, folder: Path) -> dict[str, str]:
    """Write the fault, and return variables by which the tests' libraries have it."""
    changed = folder / "overlay" / mutant.file
    changed.parent.mkdir(parents=True)
    changed.write_text(mutant.planted(), encoding="utf-8")
    # Headers find those beside them before all others, which therefore come along.
    for header in (ROOT / mutant.file).parent.glob("*.h"):
        if header.name != changed.name:
            (changed.parent / header.name).symlink_to(header)
    (folder / "sources").write_text("\n".join(mutant.sources))
    return {"SPECEXTEND_MUTANT": str(folder)}


def plant_in_python(mutant: Mutant, folder: Path) -> None:
    """Make a tree of links to this one, with one file changed."""
    link_tree(folder)
    changed = folder / mutant.file
    changed.unlink()
    changed.write_text(mutant.planted(), encoding="utf-8")


def link_tree(folder: Path) -> None:
    names = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(names, capture_output=True, text=True, check=True).stdout.split("\0")
    modules = [str(path.relative_to(ROOT)) for path in (ROOT / "specextend").glob("_C.*")]
    for name in {*filter(None, names), *modules}:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(ROOT / name)


# ---- running -------------------------------------------------------------------------------------


def run_tests(tests: list[str], keyword: str, tree: Path, variables: dict, seconds: float):
    """Run pytest and return (status, output); the status is None where it took too long.

    The tests come first in the tree that is given, also for the processes that they start.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", keyword]
    command += ["-m", "not smoke and (sweep or not long)"]  # sweeps whole, and nothing longer
    path = [str(tree), *filter(None, [variables.get("PYTHONPATH")])]
    variables = {
        # Tests have one thread each, and their processes need not compile torch's bytecode anew.
        "OMP_NUM_THREADS": "1",
        **variables,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "",
    }
    process = subprocess.Popen(
        [*command, *tests],
        cwd=tree,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what the tests have started, too
        return None, process.communicate()[0]


def judge(status: int | None, output: str) -> tuple[str, str]:
    """Return the outcome and its reason, from what pytest has returned and printed."""
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+(?: .*)?)$", output, re.MULTILINE)
    first = failed[0][:200] if failed else ""
    if "does not compile" in output:
        errors = re.findall(r"error: .*", output)
        return "broken", f"does not compile: {errors[0] if errors else first}"
    if status == 0:
        passed = re.search(r"(\d+) passed", output)
        return ("survived", f"{passed[1]} tests") if passed else ("broken", "all tests are skipped")
    if status is None:
        return "found", f"not over after {SECONDS} s"
    if status < 0:
        return "found", f"{signal.Signals(-status).name} in {crashed_in(output)}"
    if status == 1 and first:
        return "found", first
    return "broken", f"pytest ends with {status}: {(first or output.strip()[-200:])}"


def crashed_in(output: str) -> str:
    """Find the innermost frame of a test that faulthandler has shown."""
    frames = re.findall(r'File "[^"]*/(tests/[^"]+)", line (\d+)', output)
    return ":".join(frames[0]) if frames else "a test"


def stages(mutant: Mutant) -> list[list[str]]:
    """Return the tests that it names one by one, then its files: pytest has an order of its own."""
    single = [test for test in mutant.tests if "::" in test]
    return [tests for tests in (single, [t for t in mutant.tests if t not in single]) if tests]


def union(mutants: list[Mutant]) -> list[str]:
    """Return all tests that they name, none twice."""
    tests = dict.fromkeys(test for mutant in mutants for test in mutant.tests)
    return [test for test in tests if "::" not in test or test.split("::")[0] not in tests]


class Workers:
    """Runs faults, a few at a time, each worker in a folder of its own."""

    def __init__(self, jobs: int):
        self.pool = ThreadPoolExecutor(jobs)
        self._folders: SimpleQueue[Path] = SimpleQueue()
        for i in range(jobs):
            self._folders.put(FOLDER / f"worker_{i}")
        # The workers share the cores that compile.
        self._jobs = {"MAX_JOBS": str(max(1, (os.cpu_count() or 1) // jobs))}

    def check(self, area: Area, mutants: list[Mutant]) -> None:
        """Run the tests as they are: what fails without a fault finds none."""
        variables = {**self._jobs, **area.variables()}
        start = time.monotonic()
        status, output = run_tests(union(mutants), area.keyword, ROOT, variables, 3600)
        outcome, by = judge(status, output)
        if outcome != "survived":
            sys.exit(f"mutate: {area.name}: without a fault: {by}\n{output[-3000:]}")
        say(f"{area.name}: {by} pass without a fault ({time.monotonic() - start:.0f} s)")

    def run(self, area: Area, mutant: Mutant, kept: Kept, key: str) -> Result:
        folder = self._folders.get()
        start = time.monotonic()
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            variables = {**self._jobs, **area.variables()}
            if mutant.file.endswith(".py"):
                plant_in_python(mutant, folder)
                tree = folder
            else:
                variables |= plant_in_cpp(mutant, folder)
                tree = ROOT
            for tests in stages(mutant):
                ran = judge(*run_tests(tests, area.keyword, tree, variables, SECONDS))
                if ran[0] != "survived":
                    break
            result = Result(*ran, round(time.monotonic() - start, 1))
            if result.outcome != "broken":
                kept.put(key, result)
            return result
        finally:
            self._folders.put(folder)


# ---- what is printed -----------------------------------------------------------------------------


def line(area: Area, mutant: Mutant, result: Result) -> str:
    by = result.by
    if result.outcome == "survived" and mutant.why_it_survives:
        by = f"as is known: {mutant.why_it_survives}"
    name = f"{area.name:9s} {result.outcome:8s} {result.seconds:6.1f} s  {mutant.name}"
    return f"{name}\n{'':29s}{by}"


def summary(results: list[tuple[Area, Mutant, Result]]) -> float:
    """Print the totals, and return the part that was found."""
    names = list(dict.fromkeys(area.name for area, _, _ in results))
    print(f"\n{'area':10s} {'faults':>7s} {'found':>7s} {'survived':>9s} {'broken':>7s} {'':>7s}")
    for name in [*names, "all"]:
        own = [r.outcome for area, _, r in results if name in (area.name, "all")]
        counts = [own.count(outcome) for outcome in ("found", "survived", "broken")]
        part = counts[0] / len(own)
        print(f"{name:10s} {len(own):7d} {counts[0]:7d} {counts[1]:9d} {counts[2]:7d} {part:7.1%}")
    return part


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="SUBSTRING",
                        help="the faults with this in their area, file or name")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="name the faults and run none")
    parser.add_argument(
        "--again", action="store_true", help="forget earlier results of these faults"
    )
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1),
                        help="faults at a time (%(default)s)")  # fmt: skip
    options = parser.parse_args()

    chosen = [
        replace(area, mutants=mutants)
        for area in areas()
        if (mutants := [
            m for m in area.mutants if options.only in f"{area.name} {m.file} {m.name}"
        ])
    ]  # fmt: skip
    if not chosen:
        sys.exit(f"mutate: no fault has {options.only!r} in its area, file or name")
    if options.list:
        for area in chosen:
            for mutant in area.mutants:
                print(f"{area.name:9s} {mutant.file:38s} {mutant.name}")
        return 0

    FOLDER.mkdir(parents=True, exist_ok=True)
    lock = open(FOLDER / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # for as long as this process lives
    except OSError:
        sys.exit("mutate: another run is under way; --jobs says how many faults run at a time")
    kept, workers = Kept(), Workers(options.jobs)
    start, results = time.monotonic(), []
    keys = {(a.name, m.name): digest(a, m) for a in chosen for m in a.mutants}
    if options.again:
        kept.forget(keys.values())
    new = [
        (area, mutants)
        for area in chosen
        if (mutants := [m for m in area.mutants if kept.get(keys[area.name, m.name]) is None])
    ]
    checks = [workers.pool.submit(workers.check, *each) for each in new]
    try:
        for check in checks:
            check.result()
        under_way = {
            (key := keys[area.name, m.name]): workers.pool.submit(workers.run, area, m, kept, key)
            for area, mutants in new
            for m in mutants
        }
        for area in chosen:
            for mutant in area.mutants:
                key = keys[area.name, mutant.name]
                ran = under_way[key].result() if key in under_way else kept.get(key)
                results.append((area, mutant, ran))
                print(line(*results[-1]), flush=True)
    except BaseException:
        workers.pool.shutdown(cancel_futures=True)
        raise
    part = summary(results)
    say(f"{time.monotonic() - start:.0f} s; results are in {RESULTS}")
    broken = any(result.outcome == "broken" for _, _, result in results)
    return 1 if broken or part < WANTED else 0


if __name__ == "__main__":
    sys.exit(main())
