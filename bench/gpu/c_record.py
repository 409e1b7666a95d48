"""Runs on a machine with a GPU the sanitizers, all peers, the demonstration (C of A to C).

    python bench/gpu/c_record.py OUTPUT [--rehearse]

It takes ten minutes at most, offline, after a_right.py. It runs small cases under
compute-sanitizer's memcheck and synccheck, and under racecheck but for the kernels of tensor
copies, of whose barriers that tool knows too little; bench_ops with its peers; the demonstration.
OUTPUT gets c.log, as it comes, and c.json, the record, with machine, driver, versions, commit and
command.
"""

import os
import shutil
import sys
from pathlib import Path

from steps import Step, main


def sanitizer() -> str:
    """Find compute-sanitizer, on PATH or in the toolkit."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{home}/bin:{home}/compute-sanitizer"
    )
    return found or "compute-sanitizer"


def plan(results: Path, device: str) -> list[Step]:
    python, cuda = sys.executable, device == "cuda"

    def checked(tool: str, limit: float, *more: str, **switches: str) -> Step:
        options = ["--tool", tool, "--kernel-name", "kns=specextend", "--error-exitcode", "99"]
        options += ["--report-api-errors", "no"]  # torch asks for what it does not know to be there
        options += more
        under = [sanitizer(), *options] if cuda else []
        small = [python, "bench/small_cases.py", "--device", device, "--few"]
        small += [] if cuda else ["--filter", "merge"]
        return Step(tool, [*under, *small], limit, env=switches)

    def writes(name: str, limit: float, *command: str) -> Step:
        path = results / f"{name}.json"
        return Step(name, [python, *command, "--device", device, "--json", str(path)], limit, path)

    ops = ["bench/bench_ops.py", "--quick"]
    ops += [] if cuda else ["--seconds", "0.01", "--filter", "8/8/64 P=256 tree=1 bf16"]
    demo = [python, "-m", "specextend", "demo", "--device", device]
    demo += ["--dtype", "bfloat16"] if cuda else ["--tokens", "200", "--max-new-tokens", "8"]
    return [
        checked("memcheck", 90),
        checked("synccheck", 60),
        checked(
            "racecheck", 80, "--kernel-name-exclude", "kns=sm90", SPECEXTEND_ATTENTION="portable"
        ),
        writes("ops", 240, *ops),
        Step("demonstration", demo, 90),
    ]


if __name__ == "__main__":
    sys.exit(main(__doc__, "c", plan))
