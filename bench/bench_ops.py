"""Times every op against what this machine can do, and tree attention against torch's SDPA.

    python bench/bench_ops.py [--quick] [--filter 32/8/128] [--threads 2] [--json out.json]

Of SDPA there are two columns. "torch" is the call that a user writes: the same inputs,
`enable_gqa`, the mask it needs, boolean or additive, whichever is faster. "packed" is what an
expert makes of it: the query rows of a KV head folded into one sequence by hand.

Numbers of one line come from one run, its contestants taking turns, so that ratios hold on a busy
machine too; compare absolute times only between quiet ones. Shares are of the read bandwidth and
the GEMM rate that torch reaches here, measured at the start.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cases import BENCH_PREFIXES, BENCH_TREES, LAYERS, Heads  # noqa: E402

from specextend import _C, ops  # noqa: E402
from specextend.testing import Timing, ancestor_mask, pack_mask, time_calls  # noqa: E402

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Machine:
    """What the machine reaches by torch's own means."""

    processor: str
    cores: int
    threads: int
    isa: str
    torch: str
    commit: str
    read_gbs: float = 0.0
    gemm_gflops: dict[str, float] | None = None

    @staticmethod
    def describe() -> "Machine":
        processor = platform.processor() or platform.machine()
        info = Path("/proc/cpuinfo")
        if info.exists():
            names = [
                x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x
            ]
            processor = names[0] if names else processor
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        cores = len(os.sched_getaffinity(0))
        return Machine(
            processor, cores, torch.get_num_threads(), _C.cpu_isa(), torch.__version__, commit
        )

    def measure(self, seconds: float) -> None:
        """Read bandwidth: a sum over 256 MiB. GEMM rate: square matrices of 2048, or as large as
        two seconds allow. The best decile."""
        x = torch.ones(64 << 20)
        self.read_gbs = x.numel() * 4 / time_calls(x.sum, seconds=seconds)[0].p10 / 1e9
        self.gemm_gflops = {}
        for name in ("fp32", "bf16"):
            for size in (512, 1024, 2048):  # without instructions for bf16, torch takes its time
                a, b = (torch.randn(size, size).to(DTYPES[name]) for _ in range(2))
                timing = time_calls(lambda a=a, b=b: a @ b, seconds=seconds, min_calls=3)[0]
                self.gemm_gflops[name] = 2 * size**3 / timing.p10 / 1e9
                if timing.median > 0.1:
                    break
        # Half precision is computed in fp32 where that is faster.
        self.gemm_gflops["bf16"] = max(self.gemm_gflops.values())
        self.gemm_gflops["fp16"] = self.gemm_gflops["fp32"]


@dataclass
class Line:
    """One case: what is timed, the traffic and arithmetic it needs, and its rivals."""

    op: str
    shape: str
    dtype: str
    run: Callable[[], object]
    bytes: int
    flops: int = 0
    torch: tuple[Callable[[], object], ...] = ()  # the same by torch, in the ways there are
    packed: tuple[Callable[[], object], ...] = ()  # by torch, rows packed by hand


def random_tree(nodes: int) -> Tensor:
    """[nodes] parents of a tree like those that drafts propose: half chains, half branches."""
    g = torch.Generator().manual_seed(nodes)
    parents = [-1]
    for node in range(1, nodes):
        parents.append(node - 1 if node % 2 else int(torch.randint(0, node, (1,), generator=g)))
    return torch.tensor(parents)


def attention_line(
    heads: Heads, prefix: int, rows: int, dtype: str, layout: str, chunk: int
) -> Line:
    type_ = DTYPES[dtype]
    capacity = prefix + max(BENCH_TREES)
    q = torch.randn(1, rows, heads.q, heads.dim).to(type_)
    shape = (1, heads.kv, capacity, heads.dim)
    if layout == "bshd":
        k, v = (torch.randn(1, capacity, heads.kv, heads.dim).to(type_) for _ in range(2))
        k_bhsd, v_bhsd = k.transpose(1, 2), v.transpose(1, 2)
    else:
        k_bhsd, v_bhsd = (torch.randn(shape).to(type_) for _ in range(2))
        k, v = k_bhsd.transpose(1, 2), v_bhsd.transpose(1, 2)
    lens = torch.tensor([prefix], dtype=torch.int32)
    visible = ancestor_mask(random_tree(rows))
    tree_mask = pack_mask(visible)[None] if rows > 1 else None

    total, group = prefix + rows, heads.q // heads.kv
    keys, values = k_bhsd[:, :, :total], v_bhsd[:, :, :total]
    query = q.transpose(1, 2).contiguous()
    packed = query.view(1, heads.kv, group * rows, heads.dim)
    seen = torch.cat([torch.ones(rows, prefix, dtype=torch.bool), visible], 1)
    masks: list[Tensor | None] = [None]
    if rows > 1:
        masks = [seen, torch.zeros(seen.shape, dtype=type_).masked_fill(~seen, -torch.inf)]
    gqa = heads.q != heads.kv
    by_torch, by_hand = [], []
    for mask in masks:
        by_torch.append(
            lambda m=mask: F.scaled_dot_product_attention(query, keys, values, m, enable_gqa=gqa)
        )
        if gqa:
            m = None if mask is None else mask.repeat(group, 1)
            by_hand.append(lambda m=m: F.scaled_dot_product_attention(packed, keys, values, m))
    return Line(
        "tree_attention" + (f"+chunks/{chunk}" if chunk else ""),
        f"{heads} P={prefix} tree={rows}" + ("" if layout == "bhsd" else " [B,S,H,D]"),
        dtype,
        lambda: ops.tree_attention(q, k, v, lens, tree_mask, chunk_size=chunk),
        2 * total * heads.kv * heads.dim * type_.itemsize + 2 * q.numel() * type_.itemsize,
        4 * total * rows * heads.q * heads.dim,
        tuple(by_torch),
        tuple(by_hand),
    )


def attention_lines(quick: bool) -> Iterator[Callable[[], Line]]:
    prefixes = BENCH_PREFIXES[:2] if quick else BENCH_PREFIXES
    trees = [1, 32] if quick else BENCH_TREES

    def lazily(*arguments):
        return lambda: attention_line(*arguments)

    for heads in LAYERS[:1] if quick else LAYERS[:3]:
        for prefix in prefixes:
            for rows in trees:
                yield lazily(heads, prefix, rows, "bf16", "bhsd", 0)
    big = LAYERS[0]
    for rows in (1, 64):
        yield lazily(big, 16384, rows, "bf16", "bhsd", 32)
        for dtype in ("fp32", "fp16"):
            yield lazily(big, 16384, rows, dtype, "bhsd", 0)
    if not quick:
        for heads in LAYERS[:2]:
            for rows in (1, 32):
                yield lazily(heads, 16384, rows, "bf16", "bshd", 0)
    for dtype in ("bf16", "fp32"):
        for prefix in (256, 2048, 16384):
            for rows in (1, 9, 17, 33) if quick else (1, 4, 9, 17, 33):
                yield lazily(LAYERS[-1], prefix, rows, dtype, "bhsd", 0)


def other_lines() -> Iterator[Callable[[], Line]]:
    """The ops around the attention, at the sizes of an 8B target with a prefix of 16K."""
    layers, capacity, heads, dim, vocab = 32, 16384, 8, 128, 128256
    bf16, size = torch.bfloat16, 2

    def ints(*values):
        return torch.tensor(values, dtype=torch.int32)

    def caches(count, rows):
        return [torch.zeros(1, heads, rows, dim, dtype=bf16).transpose(1, 2) for _ in range(count)]

    def merge_states():
        o, lse = torch.randn(64, 32, dim).to(bf16), torch.randn(64, 32)
        return Line(
            "merge_states",
            "64x32x128",
            "bf16",
            lambda: ops.merge_states(o, lse, o, lse),
            3 * o.numel() * size,
        )

    def chunk_scores():
        chunks = capacity // 32
        lse = torch.randn(1, 64, 32, chunks)
        total, rows, lens = lse.logsumexp(-1), ints(5), ints(capacity - 64)
        return Line(
            "chunk_scores", f"32 heads, {chunks} chunks", "fp32",
            lambda: ops.chunk_scores(lse, total, rows, lens, chunk_size=32), 32 * chunks * 4,
        )  # fmt: skip

    def chunk_scores_keys():
        (k,) = caches(1, capacity)
        q, rows, lens = torch.randn(1, 64, 32, dim).to(bf16), ints(5), ints(capacity)
        return Line(
            "chunk_scores.keys", f"32/8/128, {capacity} keys", "bf16",
            lambda: ops.chunk_scores_keys(q, k, rows, lens, chunk_size=32), k.numel() * size,
        )  # fmt: skip

    def select_chunks():
        scores, lens = torch.rand(1, capacity // 32), ints(capacity)
        return Line(
            "select_chunks", "32 of 512", "fp32",
            lambda: ops.select_chunks(
                scores, lens, chunk_size=32, budget=32, num_sinks=1, num_recent=4
            ),
            scores.numel() * 4,
        )  # fmt: skip

    def gather_chunks():
        full, work, count = caches(4, capacity), caches(4, 1024), 32
        ids = torch.arange(0, 512, 16, dtype=torch.int32)[None]
        counts, lens, inv_freq = ints(count), ints(capacity), torch.rand(2, dim // 2)
        return Line(
            "gather_chunks", "2 layers, 1024 rows", "bf16",
            lambda: ops.gather_chunks(
                full[:2], full[2:], work[:2], work[2:], ids, counts, lens, inv_freq, chunk_size=32
            ),
            2 * 4 * 1024 * heads * dim * size,
        )  # fmt: skip

    def expand_tree():
        logits, logp = torch.randn(1, 8, vocab).to(bf16), torch.zeros(1, 8)
        return Line(
            "expand_tree", f"8 x {vocab}, top 8", "bf16",
            lambda: ops.expand_tree(logits, logp, top_k=8, width=8), logits.numel() * size,
        )  # fmt: skip

    def finalize_tree():
        parents = random_tree(400)[None].int()
        logp = -torch.rand(1, 400)
        return Line(
            "finalize_tree", "63 of 400", "fp32",
            lambda: ops.finalize_tree(logp, parents, num_nodes=63), 400 * 8,
        )  # fmt: skip

    def verify_tree():
        tokens, parents = torch.randint(0, 9, (1, 64)), random_tree(64)[None].int()
        return Line(
            "verify_tree", "64 nodes", "int64",
            lambda: ops.verify_tree(tokens, parents, tokens), 64 * 20,
        )  # fmt: skip

    def verify_tree_rejection():
        tokens, parents = torch.randint(0, 9, (1, 16)), random_tree(16)[None].int()
        probs = torch.rand(1, 16, vocab).softmax(-1)
        uniforms = torch.rand(1, 16)
        return Line(
            "verify_tree.rejection", f"16 x {vocab}", "fp32",
            lambda: ops.verify_tree_rejection(tokens, parents, probs, probs, uniforms, uniforms), 0,
        )  # fmt: skip

    def sample_nodes(drawn):
        logits = torch.randn(1, 64, vocab).to(bf16)
        uniforms = torch.rand(1, 64) if drawn else None
        return Line(
            "sample_nodes", f"64 x {vocab}, {'drawn' if drawn else 'argmax'}", "bf16",
            lambda: ops.sample_nodes(logits, uniforms), logits.numel() * size,
            torch=() if drawn else (lambda: logits.argmax(-1),),
        )  # fmt: skip

    def compact_kv():
        tensors, lens, accepted = caches(2 * layers, 1024), ints(900), ints(4)
        path = torch.full((1, 64), -1, dtype=torch.int32)
        path[0, :5] = ints(0, 2, 9, 20, 41)
        return Line(
            "compact_kv", f"{layers} layers, 4 rows", "bf16",
            lambda: ops.compact_kv(tensors, lens, path, accepted),
            2 * len(tensors) * 4 * heads * dim * size,
        )  # fmt: skip

    def append_kv():
        (k_cache, v_cache), lens = caches(2, capacity), ints(8000)
        new = torch.zeros(1, heads, 64, dim, dtype=bf16).transpose(1, 2)
        return Line(
            "append_kv", "64 rows", "bf16",
            lambda: ops.append_kv(k_cache, v_cache, new, new, lens), 4 * new.numel() * size,
        )  # fmt: skip

    yield from (merge_states, chunk_scores, chunk_scores_keys, select_chunks, gather_chunks)
    yield from (expand_tree, finalize_tree, verify_tree, verify_tree_rejection)
    yield from (lambda: sample_nodes(False), lambda: sample_nodes(True), compact_kv, append_kv)


def report(line: Line, machine: Machine, seconds: float) -> dict:
    own, *rivals = time_calls(line.run, *line.torch, *line.packed, seconds=seconds, min_calls=3)

    def best(timings: list[Timing]) -> float | None:
        return min((t.median for t in timings), default=None)

    by_torch, by_hand = best(rivals[: len(line.torch)]), best(rivals[len(line.torch) :])
    gbs, gflops = line.bytes / own.median / 1e9, line.flops / own.median / 1e9
    peak = (machine.gemm_gflops or {}).get(line.dtype, 0.0)
    result = {
        "op": line.op,
        "shape": line.shape,
        "dtype": line.dtype,
        "us": own.median * 1e6,
        "us_p10": own.p10 * 1e6,
        "us_p90": own.p90 * 1e6,
        "gb_per_s": gbs,
        "gflop_per_s": gflops,
        "bandwidth_share": gbs / machine.read_gbs,
        "gemm_share": gflops / peak if peak else None,
        "torch_us": by_torch and by_torch * 1e6,
        "packed_us": by_hand and by_hand * 1e6,
        "ratio_to_torch": by_torch and by_torch / own.median,
        "ratio_to_packed": by_hand and by_hand / own.median,
    }
    cells = [
        f"{line.op:24}",
        f"{line.shape:32}",
        f"{line.dtype:5}",
        f"{own.median * 1e6:9.1f} ({own.p10 * 1e6:.1f}..{own.p90 * 1e6:.1f})".ljust(32),
        f"{gbs:6.1f}",
        f"{gflops:6.0f}" if line.flops else "     -",
        f"{100 * gbs / machine.read_gbs:4.0f} %",
        f"{100 * gflops / peak:4.0f} %" if line.flops else "     -",
        *(f"{t / own.median:6.1f}" if t else "     -" for t in (by_torch, by_hand)),
    ]
    print(" | ".join(cells), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filter", default="", help="only lines that contain this text")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, less time for each")
    parser.add_argument("--seconds", type=float, help="per line (default 2, quick 0.5)")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    arguments = parser.parse_args()
    seconds = arguments.seconds or (0.5 if arguments.quick else 2.0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    machine = Machine.describe()
    machine.measure(seconds)
    print(f"{machine.processor}, {machine.cores} cores, {machine.threads} threads, {machine.isa}")
    print(f"torch {machine.torch}, specextend {machine.commit}")
    rates = ", ".join(f"{n} {r:.0f}" for n, r in machine.gemm_gflops.items())
    print(f"read {machine.read_gbs:.1f} GB/s; GEMM {rates} GFLOP/s\n")
    print(
        f"{'op':24} | {'shape':32} | dtype | {'us (p10..p90)':32} |   GB/s | GFLOP/s | band. | "
        " GEMM |  torch | packed"
    )
    results = []
    for make in (*attention_lines(arguments.quick), *other_lines()):
        line = make()
        if arguments.filter in f"{line.op} {line.shape} {line.dtype}":
            results.append(report(line, machine, seconds))
    if arguments.json:
        text = json.dumps({"machine": asdict(machine), "results": results}, indent=2)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
