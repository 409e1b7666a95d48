"""Checks on a machine with a GPU whether kernels are right, and goals in sight (A of A to C).

    python bench/gpu/a_right.py OUTPUT [--rehearse]

It takes ten minutes at most, offline. The compiled module that `tools/carry.py` made is put in its
place, or built. Then run: small cases of every operator, a process each, against the references;
the tests of the Hopper kernels; forks that share memory; the lines of bench_ops that have goals;
three shapes under Nsight Compute, where that is installed. OUTPUT gets a.log, as it comes, and
a.json.
"""

import sys
from pathlib import Path

from steps import Step, main

# The names of cases in bench/small_cases.py begin with these.
CASES = (
    "merge_states", "invariant_linear", "chunk_scores", "select_chunks", "gather_chunks",
    "compact_kv", "append_kv", "expand_tree", "finalize_tree", "sample_nodes", "verify_tree",
    "rms_norm", "rotary_append", "silu_mul",
)  # fmt: skip
PROFILED = (("16384", "8"), ("16384", "32"), ("65536", "64"))  # prefix, rows; and the combine
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "LaunchStats", "Occupancy")


def plan(results: Path, device: str) -> list[Step]:
    python, cuda = sys.executable, device == "cuda"
    small = [python, "bench/small_cases.py", "--device", device]
    blocking = {"CUDA_LAUNCH_BLOCKING": "1"}

    def cases(name: str, text: str, limit: float, *options: str, **switches: str) -> Step:
        command = [*small, "--filter", text, *options]
        return Step(f"cases {name}", command, limit, env={**blocking, **switches})

    steps = [
        Step("module", [python, "bench/gpu/module.py", "--device", device], 280, None, True),
        cases("tree_attention, portable", "tree_attention", 40, SPECEXTEND_ATTENTION="portable"),
        cases("tree_attention, Hopper", "tree_attention/hopper", 30, SPECEXTEND_ATTENTION="hopper"),
        cases("no early launches", "tree_attention", 20, "--few", SPECEXTEND_PDL="0"),
    ]
    if cuda:
        steps += [cases(name, name, 14) for name in CASES]
    else:
        steps.append(cases("the others", "", 60, "--few"))
    hopper = "cuda" if cuda else "test_one_block and random and heads0"
    tests = [python, "-m", "pytest", "-x", "-m", "not smoke", "tests/test_hopper.py", "-k", hopper]
    ops = results / "goals.json"
    goals = [python, "bench/bench_ops.py", "--device", device, "--goals", "--json", str(ops)]
    goals += ["--seconds", "0.2"] if cuda else ["--seconds", "0.01", "--quick"]
    steps += [
        Step("Hopper tests", tests, 54 if cuda else 120),
        Step("forks", [python, "bench/gpu/forks.py", "--device", device], 15 if cuda else 40),
        Step("goals", goals, 110, ops),
    ]
    for prefix, rows in PROFILED if cuda else PROFILED[:1]:
        call = [python, "bench/gpu/call.py", prefix, rows, "--device", device]
        profiler = ["ncu", "--clock-control", "none", "--launch-count", "2"]
        profiler += ["--kernel-name", "regex:attention", "--launch-skip", "4"]
        profiler += [word for section in SECTIONS for word in ("--section", section)]
        steps.append(
            Step(f"profile of {prefix} x {rows}", [*profiler, *call] if cuda else call, 40)
        )
    return steps


if __name__ == "__main__":
    sys.exit(main(__doc__, "a", plan))
