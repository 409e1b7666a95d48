"""Calls tree_attention a few times at one shape, for a profiler to look at.

    ncu --launch-skip 4 --launch-count 2 --kernel-name regex:attention \\
        python bench/gpu/call.py 16384 8

Each call is two kernels: attention, and the combine of its partial results.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT)]

from bench_ops import attention_line  # noqa: E402
from cases import LAYERS  # noqa: E402

CALLS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prefix", type=int, help="keys before the tree")
    parser.add_argument("rows", type=int, help="of the tree, the root included")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    torch.set_default_device(arguments.device)
    torch.manual_seed(0)
    line = attention_line(LAYERS[0], arguments.prefix, arguments.rows, "bf16", "bhsd", 0)
    for _ in range(CALLS):
        out, lse, _ = line.run()
    print(f"{line.name}: {float(out.float().abs().mean()):.4f}, {float(lse.mean()):.4f}")


if __name__ == "__main__":
    main()
