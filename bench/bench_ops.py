"""Times every operator against what this machine can do, and tree attention against its rivals.

    python bench/bench_ops.py [--device cuda] [--quick] [--goals] [--filter 32/8/128]

SDPA gives two peers. "torch" is the call that a user writes: the same inputs, `enable_gqa`, the
mask it needs, boolean or additive, whichever is faster. "packed" is what an expert makes of it: the
query rows of a KV head are folded into one sequence by hand.

On a GPU, calls are timed in CUDA graphs of twenty or more, over buffers that rotate through more
than twice its L2 cache, and there are more peers: "split" is the papers' own way (flash attention
over the prefix with its log-sum-exp, the tree under its mask, a merge by sigmoid), "flex" is
FlexAttention, "flashinfer" its custom mask where that package is installed.
"""

import argparse
import importlib.util
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from bench_record import DTYPES, ROOT, Rates, Report, cache_emptier, digits, parse, parser
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(ROOT / "tests"))

from cases import BENCH_PREFIXES, BENCH_TREES, LAYERS, Heads  # noqa: E402

from specextend import ops  # noqa: E402
from specextend.testing import (  # noqa: E402
    Spread,
    ancestor_mask,
    pack_mask,
    time_calls,
    time_graphs,
)

Call = Callable[[], object]
MOST_ROWS = 128  # caches have room for so many rows of a tree
PLACED_BYTES = 128 << 20  # a case that moves less is measured on three sets of buffers (CPU)


@dataclass
class Line:
    """Holds one case: what is timed, the traffic and arithmetic it needs, and its peers.

    Attributes:
        peers: the same work by others, each in the ways there are; the fastest way counts.
    """

    op: str
    shape: str
    dtype: str
    run: Call
    bytes: int
    flops: int = 0
    peers: dict[str, list[Call]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {self.dtype}"


def random_tree(nodes: int) -> Tensor:
    """Make [nodes] parents of a tree as drafts propose them: half chains, half branches."""
    g = torch.Generator("cpu").manual_seed(nodes)
    parents = [-1]
    for node in range(1, nodes):
        any_before = torch.randint(0, node, (1,), generator=g, device="cpu")
        parents.append(node - 1 if node % 2 else int(any_before))
    return torch.tensor(parents, device="cpu")


def attention_line(
    heads: Heads, prefix: int, rows: int, dtype: str, layout: str, chunk: int, flex: bool = False
) -> Line:
    type_ = DTYPES[dtype]
    capacity = prefix + MOST_ROWS
    q = torch.randn(1, rows, heads.q, heads.dim).to(type_)
    shape = (1, heads.kv, capacity, heads.dim)
    if layout == "bshd":
        k, v = (torch.randn(1, capacity, heads.kv, heads.dim).to(type_) for _ in range(2))
        k_bhsd, v_bhsd = k.transpose(1, 2), v.transpose(1, 2)
    else:
        k_bhsd, v_bhsd = (torch.randn(shape).to(type_) for _ in range(2))
        k, v = k_bhsd.transpose(1, 2), v_bhsd.transpose(1, 2)
    lens = torch.tensor([prefix], dtype=torch.int32)
    visible = ancestor_mask(random_tree(rows)).to(q.device)
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
    sdpa = F.scaled_dot_product_attention
    peers = {"torch": [lambda m=m: sdpa(query, keys, values, m, enable_gqa=gqa) for m in masks]}
    if gqa:
        tall = [None if m is None else m.repeat(group, 1) for m in masks]
        peers["packed"] = [lambda m=m: sdpa(packed, keys, values, m) for m in tall]
    if q.is_cuda and dtype != "fp32" and not chunk:
        for name, call in gpu_peers(q, k_bhsd, v_bhsd, prefix, visible, flex):
            peers[name] = [call]
    return Line(
        "tree_attention" + (f"+chunks/{chunk}" if chunk else ""),
        f"{heads} P={prefix} tree={rows}" + ("" if layout == "bhsd" else " [B,S,H,D]"),
        dtype,
        lambda: ops.tree_attention(q, k, v, lens, tree_mask, chunk_size=chunk),
        2 * total * heads.kv * heads.dim * type_.itemsize + 2 * q.numel() * type_.itemsize,
        4 * total * rows * heads.q * heads.dim,
        peers,
    )


def gpu_peers(
    q: Tensor, k: Tensor, v: Tensor, prefix: int, visible: Tensor, flex: bool
) -> Iterator[tuple[str, Call]]:
    """Yield how others attend to prefix and tree: q [1, M, Hq, D], k and v [1, Hkv, S, D]."""
    rows, group = q.shape[1], q.shape[2] // k.shape[1]
    total, scale = prefix + rows, q.shape[-1] ** -0.5
    k_rows, v_rows = k.transpose(1, 2), v.transpose(1, 2)
    tree_k = k[0, :, prefix:total].repeat_interleave(group, 0)
    tree_v = v[0, :, prefix:total].repeat_interleave(group, 0)

    def split():
        flash = torch.ops.aten._flash_attention_forward(
            q, k_rows[:, :prefix], v_rows[:, :prefix], None, None, rows, prefix, 0.0, False, False,
            scale=scale,
        )  # fmt: skip
        logits = (q[0].transpose(0, 1) @ tree_k.transpose(1, 2)).float() * scale
        logits = logits.masked_fill(~visible, -torch.inf)
        tree = (logits.softmax(-1).to(q.dtype) @ tree_v).transpose(0, 1)
        share = torch.sigmoid(flash[1][0] - logits.logsumexp(-1)).T[..., None].to(q.dtype)
        return flash[0][0] * share + tree * (1 - share)

    yield "split", split
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def seen(b, h, row, key):
            in_tree = (key - prefix).clamp(0, rows - 1)
            return (key < prefix) | visible[row.clamp(max=rows - 1), in_tree]

        blocks = create_block_mask(seen, None, None, rows, total, device=q.device.type)
        compiled = torch.compile(flex_attention)
        query, keys, values = q.transpose(1, 2), k[:, :, :total], v[:, :, :total]
        yield (
            "flex",
            lambda: compiled(query, keys, values, block_mask=blocks, enable_gqa=group > 1),
        )
    if importlib.util.find_spec("flashinfer"):
        import flashinfer

        seen_all = torch.cat([visible.new_ones(rows, prefix), visible], 1)
        yield (
            "flashinfer",
            lambda: flashinfer.single_prefill_with_kv_cache(
                q[0], k_rows[0, :total], v_rows[0, :total], custom_mask=seen_all
            ),
        )


# An H200 is to reach these microseconds, or this share of the bound, by heads, prefix, tree.
GOALS_US = {
    ("32/8/128", 16384, 8): 21.0, ("32/8/128", 16384, 32): 22.0, ("32/8/128", 2048, 32): 9.0,
    ("32/8/128", 65536, 32): 70.0, ("32/8/128", 65536, 64): 118.0, ("32/8/128", 65536, 128): 235.0,
}  # fmt: skip
GOALS_SHARE = {
    ("32/8/128", 65536): 8, ("32/32/128", 16384): 64, ("32/32/128", 65536): 64,
    ("28/4/128", 131072): 8,
}  # fmt: skip
GOAL_SHARE = 0.85  # trees up to those sizes are to reach so much of the bandwidth


def goal(op: str, shape: str) -> tuple[str, float] | None:
    """Return the goal of a line, ("us" or "share", value), or None."""
    found = re.fullmatch(r"(\S+) P=(\d+) tree=(\d+)", shape)
    if op in ("select_chunks", "gather_chunks"):
        return "us", 8.0
    if op != "tree_attention" or found is None:
        return None
    heads, prefix, rows = found[1], int(found[2]), int(found[3])
    if rows <= GOALS_SHARE.get((heads, prefix), 0):
        return "share", GOAL_SHARE
    us = GOALS_US.get((heads, prefix, rows))
    return None if us is None else ("us", us)


def goal_cases(quick: bool = False) -> list[tuple[Heads, int, int, int]]:
    """Return heads, prefix, rows and chunk size of the lines with goals, and of the same with a row
    more than the kernels' tiles hold; with ``quick`` two that need little memory."""
    llama, vicuna, qwen = LAYERS[:3]
    if quick:
        return [(llama, 2048, 8, 0), (llama, 2048, 32, 32)]
    cases = [(llama, prefix, rows, 0) for prefix in (2048, 16384, 65536) for rows in (8, 32)]
    cases += [(llama, 65536, rows, 0) for rows in (1, 64, 128)]
    cases += [(vicuna, 16384, 8, 0), (vicuna, 16384, 64, 0), (qwen, 131072, 8, 0)]
    cases += [(llama, 16384, 32, 32), (llama, 65536, 8, 32), (llama, 65536, 64, 32)]
    return cases + [(llama, prefix, rows, 0) for prefix in (16384, 65536) for rows in (33, 65)]


def goal_lines(quick: bool) -> Iterator[Callable[[], Line]]:
    """Yield the lines with goals, without peers."""
    for heads, prefix, rows, chunk in goal_cases(quick):
        yield lambda a=(heads, prefix, rows, "bf16", "bhsd", chunk): replace(
            attention_line(*a), peers={}
        )
    yield from (
        make for make in other_lines() if make.__name__ in ("select_chunks", "gather_chunks")
    )


def gpu_attention_lines(quick: bool, flex: bool) -> Iterator[Callable[[], Line]]:
    """Yield the lines with goals, and around them lines that show where time goes."""
    llama, vicuna, qwen = LAYERS[:3]
    cases = goal_cases()
    if not quick:
        cases += [(vicuna, 65536, rows, 0) for rows in (8, 64)]
        cases += [(heads, 16384, rows, 0) for heads in (vicuna, qwen) for rows in (1, 16, 32, 128)]
        cases += [(llama, 16384, rows, 0) for rows in (1, 4, 16, 64, 128)]
        cases += [(llama, 16384, rows, 32) for rows in (8, 64)]
    for heads, prefix, rows, chunk in cases:
        arguments = heads, prefix, rows, "bf16", "bhsd", chunk, flex and rows == 32
        yield lambda arguments=arguments: attention_line(*arguments)
    for dtype in ("fp16", "fp32"):
        yield lambda dtype=dtype: attention_line(llama, 16384, 32, dtype, "bhsd", 0)


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
    """Yield the operators around attention, at the sizes of an 8B target with a prefix of 16K."""
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

    def invariant_linear(rows, order, dtype="bf16"):
        size_k, size_n, size = 4096, 4096, DTYPES[dtype].itemsize
        x, w = (torch.randn(n, size_k).to(DTYPES[dtype]) for n in (rows, size_n))
        w = w if order == "[N, K]" else w.T.contiguous().T
        return Line(
            "invariant_linear", f"{rows} x {size_k} x {size_n}, {order}", dtype,
            lambda: ops.invariant_linear(x, w), w.numel() * size, 2 * rows * w.numel(),
            peers={"torch": [lambda: F.linear(x, w)]},
        )  # fmt: skip

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
        scores, lens = torch.rand(1, 4096), ints(4096 * 32)
        return Line(
            "select_chunks", "32 of 4096", "fp32",
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

    def sample_nodes(drawn):
        logits = torch.randn(1, 64, vocab).to(bf16)
        uniforms = torch.rand(1, 64) if drawn else None
        return Line(
            "sample_nodes", f"64 x {vocab}, {'drawn' if drawn else 'argmax'}", "bf16",
            lambda: ops.sample_nodes(logits, uniforms), logits.numel() * size,
            peers={} if drawn else {"torch": [lambda: logits.argmax(-1)]},
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
    for dtype in ("bf16", "fp16", "fp32"):
        for rows in (1, 9, 33, 512):
            yield lambda rows=rows, dtype=dtype: invariant_linear(rows, "[N, K]", dtype)
    yield lambda: invariant_linear(9, "[K, N]")
    yield from (expand_tree, finalize_tree, verify_tree)
    yield from (lambda: sample_nodes(False), lambda: sample_nodes(True), compact_kv, append_kv)


def forward_lines() -> Iterator[Callable[[], Line]]:
    """Yield the operators of a layer around its attention and its products, beside torch's own."""
    bf16, size = torch.bfloat16, 2

    def rows(count, length, *, times=1):
        return [torch.randn(1, count, length).to(bf16) for _ in range(times)]

    def plain_norm(x, weight):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * h.to(x.dtype)

    def rms_norm(count, length):
        (x,), weight = rows(count, length), torch.randn(length).to(bf16)
        return Line(
            "rms_norm", f"{count} x {length}", "bf16",
            lambda: ops.rms_norm(x, weight, eps=1e-6), 2 * x.numel() * size,
            peers={"torch": [lambda: plain_norm(x, weight)]},
        )  # fmt: skip

    def add_rms_norm(count, length):
        (x, residual), weight = rows(count, length, times=2), torch.randn(length).to(bf16)
        return Line(
            "add_rms_norm", f"{count} x {length}", "bf16",
            lambda: ops.add_rms_norm(x, residual, weight, eps=1e-6), 4 * x.numel() * size,
            peers={"torch": [lambda: plain_norm(residual + x, weight)]},
        )  # fmt: skip

    def silu_mul(count, length):
        gate, up = rows(count, length, times=2)
        return Line(
            "silu_mul", f"{count} x {length}", "bf16",
            lambda: ops.silu_mul(gate, up), 3 * gate.numel() * size,
            peers={"torch": [lambda: F.silu(gate) * up]},
        )  # fmt: skip

    def rotary_append(count, heads):
        q, k, v = (
            rows(count, h * heads.dim)[0].view(1, count, h, heads.dim)
            for h in (heads.q, heads.kv, heads.kv)
        )
        cos, sin = rows(count, heads.dim, times=2)
        shape = (2, 1, heads.kv, 1024 + count, heads.dim)
        k_cache, v_cache = torch.zeros(shape, dtype=bf16).transpose(2, 3)
        lens = torch.tensor([1000], dtype=torch.int32)

        def turn(x):
            a, b = x.chunk(2, -1)
            return x * cos[:, :, None] + torch.cat([-b, a], -1) * sin[:, :, None]

        def plain():
            ops.append_kv(k_cache, v_cache, turn(k), v, lens)
            return turn(q)

        return Line(
            "rotary_append", f"{heads}, {count} rows", "bf16",
            lambda: ops.rotary_append(q, k, v, cos, sin, k_cache, v_cache, lens),
            2 * (q.numel() + 2 * k.numel()) * size, peers={"torch": [plain]},
        )  # fmt: skip

    for count in (1, 9, 33, 1024):
        for make in (rms_norm, add_rms_norm, silu_mul):
            for length in (896, 1536, 4096):
                yield lambda make=make, length=length, count=count: make(count, length)
        for heads in LAYERS[:1]:
            yield lambda heads=heads, count=count: rotary_append(count, heads)


def alternately(calls: Sequence[Call]) -> Call:
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def measure(
    line: Line, make: Callable[[], Line], rates: Rates, seconds: float, before: Call
) -> tuple[Spread, dict[str, Spread], Rates]:
    """Time ours, the fastest way of each peer, and the rates meanwhile.

    ``make`` makes the line again, with other buffers; ``before`` empties the caches of a CPU.
    """

    def contestants(line: Line) -> list[Call]:
        return [line.run, *(call for ways in line.peers.values() for call in ways)]

    if torch.get_default_device().type == "cpu":
        names = ["bandwidth", line.dtype] if line.flops else ["bandwidth"]
        sticks = {name: rates.yardsticks[name] for name in names}
        # Times depend on where in memory the buffers happen to lie.
        sets = [line, make(), make()] if line.bytes < PLACED_BYTES else [line]
        calls = [alternately(calls) for calls in zip(*map(contestants, sets), strict=True)]
        own, *others = time_calls(
            *calls, *(stick.call for stick in sticks.values()),
            seconds=seconds, min_calls=3, before=before,
        )  # fmt: skip
        spreads = others[-len(sticks) :]
        now = {n: sticks[n].amount / s.median for n, s in zip(names, spreads, strict=True)}
        rates = Rates(now.pop("bandwidth"), now)
    else:
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        copies = min(max(-(-2 * l2_bytes // max(line.bytes, 1)), 1), 32)
        each = [contestants(line), *(contestants(make()) for _ in range(copies - 1))]
        own, *others = time_graphs(*map(list, zip(*each, strict=True)), seconds=seconds)
    peers = {}
    for name, ways in line.peers.items():
        mine, others = others[: len(ways)], others[len(ways) :]
        peers[name] = min(mine, key=lambda spread: spread.median)
    return own, peers, rates


def report(
    line: Line, make: Callable[[], Line], results: Report, seconds: float, before: Call
) -> dict:
    own, peers, rates = measure(line, make, results.rates, seconds, before)
    bandwidth, speed = line.bytes / own.median, line.flops / own.median
    remarks = f"{digits(bandwidth / 1e9)} GB/s ({100 * bandwidth / rates.bandwidth:.0f} %)"
    if line.flops:
        share = 100 * speed / rates.arithmetic[line.dtype]
        remarks += f", {digits(speed / 1e9)} GFLOP/s ({share:.0f} %)"
    gpu = results.record["header"]["machine"]["gpu"] or ""
    wanted, met = goal(line.op, line.shape) if "H200" in gpu else None, None
    if wanted is not None:
        kind, value = wanted
        got = own.median * 1e6 if kind == "us" else bandwidth / rates.bandwidth
        met = got <= value if kind == "us" else got >= value
        limit = f"<= {value:g} us" if kind == "us" else f">= {100 * value:.0f} % of bandwidth"
        remarks += f" | {limit}: {'met' if met else 'MISSED'}"
    return results.add(
        line.name, own, "us", rates.bound(line.bytes, line.flops, line.dtype) if line.bytes else
        None, peers, remarks, op=line.op, shape=line.shape, dtype=line.dtype,
        bytes_per_second=bandwidth, operations_per_second=speed, rates=rates.record(), goal=wanted,
        goal_met=met,
    )  # fmt: skip


def chunk_overhead(results: Report) -> None:
    """Note what the log-sum-exps of chunks cost: lines with them against the same without."""
    cases = results.record["cases"]
    plain = {(r["shape"], r["dtype"]): r for r in cases if r["op"] == "tree_attention"}
    for r in cases:
        without = plain.get((r["shape"], r["dtype"]))
        if r["op"].startswith("tree_attention+chunks") and without:
            r["chunk_overhead"] = r["median"] / without["median"] - 1
            results.note(f"{r['shape']}: chunks cost {100 * r['chunk_overhead']:+.1f} %")


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--flex", action="store_true", help="FlexAttention, too; it compiles long")
    made.add_argument("--goals", action="store_true", help="only lines with goals, without peers")
    made.add_argument("--seconds", type=float, help="per line (default 2, quick 0.5)")
    return made


def main() -> None:
    arguments = parse(options())
    seconds = arguments.seconds or (0.5 if arguments.quick else 2.0)
    torch.set_default_device(arguments.device)
    results = Report(arguments, seconds=seconds)
    gpu = arguments.device == "cuda"
    before = (lambda: None) if gpu else cache_emptier()
    quick = arguments.quick
    attention = gpu_attention_lines(quick, arguments.flex) if gpu else attention_lines(quick)
    for make in (
        goal_lines(quick)
        if arguments.goals
        else (
            *attention,
            *other_lines(),
            *forward_lines(),
        )
    ):
        line = make()
        if results.wants(line.name):
            report(line, make, results, seconds, before)
        del line
    chunk_overhead(results)


if __name__ == "__main__":
    main()
