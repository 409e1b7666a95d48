"""Predicts what the lines with goals should take on an H200, as a table.

    python bench/gpu/predict.py

How a call is laid out comes from the partition that the launch uses itself (`_C.plan_attention`):
padded rows, waves of blocks, partial results. Bytes and operations come from shapes. Everything
else is a guess, named below and nowhere else, to be corrected by the first measurement. No GPU is
needed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests"), str(ROOT)]

from bench_decode import GOAL  # noqa: E402
from bench_ops import GOAL_SHARE, GOALS_SHARE, GOALS_US, goal_cases  # noqa: E402
from cases import Heads  # noqa: E402

from specextend import _C, SpecConfig  # noqa: E402
from specextend.eval.synthetic import SHAPES  # noqa: E402

# Torch reaches so much on such a card: bytes per second, read and written, in a large copy, and
# bf16 operations per second in products of large matrices.
BANDWIDTH, PRODUCTS = 4.3e12, 790e12
MULTIPROCESSORS = 132

# These are guesses.
L2_BANDWIDTH = 5.5e12  # bytes per second
LAUNCH = 1.0  # us for a kernel of a graph
BEGIN = 2.5  # us from a block's first instruction to its first full tile
COMBINE = 1.0  # us besides what follows
TRIP = 0.25  # us for four partial results of a row, read one set after the other
ONE_SM = 0.11e12  # bytes per second that a multiprocessor takes at most
EFFICIENCY = {"hopper": 0.70, "portable": 0.45}  # share of PRODUCTS; mma.sync has about 0.6 to give
CHUNKS = {"hopper": 0.10, "portable": 0.03}  # log-sum-exps of chunks take so much more
SMALL_KERNEL = 1.8  # us for a norm, rotation or sum between products
SMALL_PER_LAYER = 30  # such kernels in a layer of a Llama by transformers; read, not counted
SMALL_PER_LEVEL = 40  # such kernels more around the draft's layer
PRODUCTS_PER_LAYER = 7
SKINNY = 0.90  # share of the bandwidth that products with few rows reach
SELECT = 5.0  # us for the passes of a radix sort in one block, one after the other


def attention(heads: Heads, prefix: int, rows: int, chunk: int) -> dict:
    """Predict a call with bf16 and one sequence: how it is laid out, its bytes, and us."""
    plan = _C.plan_attention(
        num_rows=rows, num_heads=heads.q, num_kv_heads=heads.kv, head_dim=heads.dim,
        prefix_len=prefix, chunk_size=chunk, multiprocessors=MULTIPROCESSORS,
    )  # fmt: skip
    keys = prefix + rows
    moved = 2 * (2 * keys * heads.kv * heads.dim + 2 * rows * heads.q * heads.dim)
    # The kernel ends when the cluster with the longest run has ended its own.
    positions = plan["units"] * (-(-keys // plan["tile_keys"]) + 2)
    longest = plan["run"] * (plan["busy"] // plan["cluster"]) / positions
    sms = min(plan["busy"], MULTIPROCESSORS)
    operations = 4 * plan["padded_rows"] * keys * heads.dim * heads.kv
    rate = PRODUCTS * EFFICIENCY[plan["family"]] * sms / MULTIPROCESSORS
    seconds = longest * max(moved / min(BANDWIDTH, sms * ONE_SM), operations / rate)
    us = LAUNCH + BEGIN + 1e6 * seconds * (1 + (CHUNKS[plan["family"]] if chunk else 0))
    if plan["partials"]:
        parts = 2 * plan["partial_rows"] * heads.dim * 4  # written and read
        us += COMBINE + TRIP * -(-plan["most_partials"] // 4) + 1e6 * parts / L2_BANDWIDTH
    return {**plan, "bytes": moved, "us": us}


def round_at(shape: str, context: int, nodes: int, levels: int) -> dict:
    """Predict a round of a Llama and a draft of one of its layers: its bytes, kernels, and us."""
    s = SHAPES[shape]
    hidden, kv = s["hidden_size"], 2 * s["num_key_value_heads"] * s["head_dim"]
    layer = hidden * (2 * s["num_attention_heads"] * s["head_dim"] + kv)
    layer += 3 * hidden * s["intermediate_size"]
    head, layers = hidden * s["vocab_size"], s["num_hidden_layers"]
    weights = 2 * (layers * layer + head + levels * (layer + head))
    keys = 2 * kv * (layers * context + levels * SpecConfig().budget)
    heads = Heads(s["num_attention_heads"], s["num_key_value_heads"], s["head_dim"])
    small = SMALL_PER_LAYER * (layers + levels) + SMALL_PER_LEVEL * levels
    us = 1e6 * weights / (SKINNY * BANDWIDTH) + SMALL_KERNEL * small
    us += layers * attention(heads, context, 1 + nodes, 0)["us"]
    us += levels * attention(heads, SpecConfig().budget, 8, 0)["us"]
    launches = small + (layers + levels) * (PRODUCTS_PER_LAYER + 3)  # append, attention, combine
    return {"bytes": weights + keys, "launches": launches, "us": us}


def goal_text(heads: Heads, prefix: int, rows: int, chunk: int, moved: int) -> str:
    us = GOALS_US.get((str(heads), prefix, rows))
    if chunk:
        return "8 % more"
    if rows <= GOALS_SHARE.get((str(heads), prefix), 0):
        us = 1e6 * moved / (GOAL_SHARE * BANDWIDTH)
    return "" if us is None else f"{us:.0f}"


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table() -> str:
    """Return the predictions as a table in Markdown."""
    names = ("heads, prefix, rows", "family", "rows computed", "MB", "waves", "partials")
    lines = [row(*names, "launches", "us", "goal"), row(*["---"] * 9)]
    for heads, prefix, rows, chunk in goal_cases():
        p = attention(heads, prefix, rows, chunk)
        lines.append(
            row(
                f"{heads}, {prefix:,}, {rows}" + ", chunks" * bool(chunk), p["family"],
                f"{p['padded_rows']} of {p['packed_rows']}", f"{p['bytes'] / 1e6:.1f}",
                f"{p['waves']:.2f}", p["partials"], 2, f"{p['us']:.0f}",
                goal_text(heads, prefix, rows, chunk, p["bytes"]),
            )
        )  # fmt: skip
    lines.append(row("`select_chunks`, 32 of 4,096", *[""] * 5, 1, f"{LAUNCH + SELECT:.0f}", 8))
    moved = 2 * 2 * 2 * 1024 * 8 * 128 * 2  # keys and values of two layers, read and written
    us = LAUNCH + BEGIN + 1e6 * moved / BANDWIDTH
    name, megabytes = "`gather_chunks`, 2 layers, 1,024 rows", f"{moved / 1e6:.1f}"
    lines.append(row(name, "", "", megabytes, "", "", 1, f"{us:.0f}", 8))
    for nodes in (31, 32):
        r = round_at("llama-3.1-8b", 16384, nodes, 5)
        least = 1e6 * r["bytes"] / BANDWIDTH
        lines.append(
            row(
                f"a round, 16,384, {nodes} nodes and the root", "", "", f"{r['bytes'] / 1e6:,.0f}",
                "", "", f"{r['launches']:,}", f"{r['us']:,.0f}",
                f"{GOAL * least:,.0f}" if nodes == 31 else "",
            )
        )  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
