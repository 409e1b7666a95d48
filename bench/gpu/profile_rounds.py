"""Profiles what the device does in five rounds: kernels by time and by count.

    python bench/gpu/profile_rounds.py [--shape llama-3.1-8b] [--context 16384] [--json out.json]

The rounds are those of bench_decode's "shape" part: random weights, a draft of one layer, a prompt
of which a part is taken in and repeated. They have been captured when the profile begins. On a CPU
torch's operators take the place of kernels.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT)]

from bench_decode import Stretched, trees  # noqa: E402
from bench_record import Report, parse, parser  # noqa: E402

from specextend import SpecConfig, SpecExtend  # noqa: E402
from specextend.eval.synthetic import SHAPES, random_model  # noqa: E402

ROUNDS = 5
WARMUP = 16  # rounds: each part of a round runs once, is recorded, and is replayed from then on
SHOWN = 30  # kernels


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    made.add_argument("--context", type=int, default=16384)
    made.add_argument("--tree", type=trees, default=trees("31x5"), help="nodes x levels")
    return made


def main() -> None:
    arguments = parse(options())
    device, cuda = arguments.device, arguments.device == "cuda"
    ((nodes, depth),) = arguments.tree
    dtype = torch.bfloat16 if cuda else torch.float32
    results = Report(arguments, shape=arguments.shape, context=arguments.context, nodes=nodes)
    made = arguments.shape, arguments.context + 4096, device, dtype
    config = SpecConfig(
        gate="off", tree_shape="top_k", tree_width=8, tree_top_k=8, tree_nodes=nodes,
        tree_depth=depth, seed=0,
    )  # fmt: skip
    models = random_model(*made), random_model(*made, num_hidden_layers=1)
    spec = SpecExtend(*models, config, generation=Stretched, keep_contexts=0)
    prompt = torch.randint(1, 1000, (1, arguments.context), device=device)
    tokens = (WARMUP + ROUNDS + 2) * (depth + 1)
    stream = spec.stream(prompt, max_new_tokens=tokens, do_sample=False)
    next(stream)
    for _ in range(WARMUP):
        next(stream)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    start = time.perf_counter()
    with profile(activities=kinds) as seen:
        for _ in range(ROUNDS):
            next(stream)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    stream.close()

    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    rows = [
        (
            event.key,
            event.count,
            event.self_device_time_total if cuda else event.self_cpu_time_total,
        )
        for event in seen.key_averages()
        if event.device_type == wanted
    ]
    rows.sort(key=lambda row: -row[2])
    total, count = sum(us for *_, us in rows), sum(n for _, n, _ in rows)
    what = "kernels" if cuda else "operators"
    results.note(
        f"a round: {count / ROUNDS:.0f} {what}, {total / ROUNDS / 1e3:.2f} ms of them, "
        f"{seconds / ROUNDS * 1e3:.2f} ms on the clock, profiled",
        count=count / ROUNDS, busy=total / ROUNDS / 1e6, seconds=seconds / ROUNDS,
        rows=[dict(name=name, count=n / ROUNDS, us=us / ROUNDS) for name, n, us in rows],
    )  # fmt: skip
    print(f"{'us a round':>10} {'share':>6} {'count':>6} {'us each':>8}")
    for name, n, us in rows[:SHOWN]:
        print(
            f"{us / ROUNDS:10.1f} {100 * us / total:5.1f} % {n / ROUNDS:6.1f} {us / n:8.2f}  "
            f"{name[:110]}"
        )


if __name__ == "__main__":
    main()
