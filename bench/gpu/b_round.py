"""Measures on a machine with a GPU what a round costs, and where its time goes (B of A to C).

    python bench/gpu/b_round.py OUTPUT [--rehearse]

It takes ten minutes at most, offline, after a_right.py. It runs rounds from CUDA graphs at the
shape of Llama-3.1-8B, behind 16,384 tokens, with trees of 31 nodes and of 32; a profile of five of
them, kernels by time and count; the tests of the graphs, and those of every operator. OUTPUT gets
b.log, as it comes, and b.json.
"""

import importlib.util
import sys
from pathlib import Path

from steps import ROOT, Step, main


def plan(results: Path, device: str) -> list[Step]:
    python, cuda = sys.executable, device == "cuda"
    shape, context = ("llama-3.1-8b", "16384") if cuda else ("small", "256")

    def writes(name: str, limit: float, *command: str) -> Step:
        path = results / f"{name}.json"
        return Step(name, [python, *command, "--device", device, "--json", str(path)], limit, path)

    rounds = ["bench/bench_decode.py", "--quick", "--parts", "shape", "--shape", shape]
    rounds += ["--contexts", context, "--trees", "31x5,32x5"]
    profile = ["bench/gpu/profile_rounds.py", "--shape", shape, "--context", context]
    workers = ["-n", "8"] if cuda and importlib.util.find_spec("xdist") else []

    def tests(file: str, limit: float, chosen: str = "cuda") -> Step:
        command = [python, "-m", "pytest", "-m", "not smoke", f"tests/test_{file}.py", "-k", chosen]
        return Step(f"tests of {file}", [*command, "--maxfail=10", *workers], limit)

    steps = [writes("rounds", 130, *rounds), writes("profile", 80, *profile)]
    if not cuda:
        return [*steps, tests("graphs", 60, "test_buckets or TestRecorder")]
    ops = sorted(path.stem for path in (ROOT / "csrc/ops").glob("*.cpp"))
    limits = dict.fromkeys(ops, 18) | {"tree_attention": 60}
    return [*steps, tests("graphs", 60), *(tests(op, limits[op]) for op in ops)]


if __name__ == "__main__":
    sys.exit(main(__doc__, "b", plan))
