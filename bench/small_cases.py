"""Checks small cases of every operator against its reference in fp64, for compute-sanitizer.

    python bench/small_cases.py [--device cuda] [--few] [--filter attention]

Shapes straddle the borders of words, tiles and segments. The tests look closer; these are quick
enough to be run with every memory access checked. Each case is named before it runs. Cases of
tree_attention that go to the Hopper kernels on such a GPU are named tree_attention/hopper. The exit
status is 1 if a result differs, or no case was run.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from specextend import _C, ops, reference
from specextend.testing import ancestor_mask, pack_mask

_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass
class Case:
    """Holds an operator and its arguments, on the CPU."""

    name: str
    op: Callable
    args: tuple
    options: dict


def ints(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def tree(nodes: int) -> Tensor:
    """Return [nodes] parents: half of the nodes form a chain, the others its branches."""
    return torch.tensor([-1, *((i - 1 if i % 2 else i // 2) for i in range(1, nodes))])


def attention_cases(few: bool) -> Iterator[Case]:
    def case(dtype, heads, rows, lens, dim=64, value_dim=None, capacity=1000, **options):
        hq, hkv = heads
        q = torch.randn(len(lens), rows, hq, dim).to(dtype)
        values = dim if value_dim is None else value_dim
        k, v = (
            torch.randn(len(lens), hkv, capacity, d).to(dtype).transpose(1, 2)
            for d in (dim, values)
        )
        mask = pack_mask(ancestor_mask(tree(rows))).expand(len(lens), -1, -1).contiguous()
        text = " ".join(f"{n}={x}" for n, x in options.items() if not isinstance(x, Tensor))
        family = "portable"
        if "softcap" not in options:
            plan = _C.plan_attention(
                num_rows=rows, num_heads=hq, num_kv_heads=hkv, head_dim=dim, value_dim=values,
                prefix_len=max(lens), dtype=_NAMES[dtype], chunk_size=options.get("chunk_size", 0),
            )  # fmt: skip
            family = plan["family"]  # on a Hopper GPU
        size = dim if values == dim else f"{dim},{values}"
        shape = f"{_NAMES[dtype]} {hq}/{hkv}/{size} rows={rows} lens={lens}"
        name = f"tree_attention/{family} {shape} {text}"
        return Case(name, ops.tree_attention, (q, k, v, ints(*lens), mask), options)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for rows in (1, 17, 65) if few else (1, 8, 16, 17, 33, 64, 65, 128):
        for dtype in (bf16,) if few else (bf16, fp16, fp32):
            yield case(dtype, (4, 1), rows, [0, 65, 700])
            yield case(dtype, (4, 1), rows, [63, 320], chunk_size=32)
    depths = tree_depths(9)[None]
    for dim in (64, 128, 256) if few else (64, 80, 96, 128, 192, 256):
        yield case(bf16, (2, 2), 9, [130], dim)
    for dims in ((192, 128), (512, 512), (576, 512)):
        for dtype in (bf16,) if few else (bf16, fp16, fp32):
            yield case(dtype, (4, 2), 7, [130, 33], *dims, chunk_size=16)
            yield case(dtype, (4, 1), 9, [70], *dims)
    yield case(bf16, (4, 2), 9, [200], window=40, q_depths=depths, k_depths=depths)
    yield case(bf16, (4, 2), 9, [200], attention_chunk=90, q_depths=depths, k_depths=depths)
    yield case(bf16, (4, 2), 9, [200], softcap=20.0, sinks=torch.randn(4))
    yield case(bf16, (7, 1), 5, [129], 128, chunk_size=16)
    if not few:
        yield case(bf16, (4, 1), 300, [100])  # a piece of a prefill
        yield case(bf16, (8, 8), 64, [900] * 3, 128)


def tree_depths(nodes: int) -> Tensor:
    return (ancestor_mask(tree(nodes)).sum(-1) - 1).int()


def other_cases(few: bool) -> Iterator[Case]:
    bf16, vocab = torch.bfloat16, 1003

    def kv(count, rows, heads=2, dim=64, dtype=bf16):
        return [torch.randn(2, heads, rows, dim).to(dtype).transpose(1, 2) for _ in range(count)]

    o, lse = torch.randn(7, 3, 64), torch.randn(7, 3)
    for dtype in (torch.float32, bf16, torch.float16):
        a, b = o.to(dtype), o.flip(0).to(dtype)
        yield Case(f"merge_states {dtype}", ops.merge_states, (a, lse, b, lse.flip(1)), {})
        x, w, bias = (torch.randn(n).to(dtype) for n in ((70, 200), (33, 200), (33,)))
        yield Case(f"invariant_linear {dtype}", ops.invariant_linear, (x, w, bias), {})
    chunk_lse = torch.randn(2, 5, 4, 33)
    given = (chunk_lse, chunk_lse.logsumexp(-1), ints(1, 4), ints(33 * 16, 100))
    for reduce in ("mean", "max"):
        options = dict(chunk_size=16, reduce=reduce)
        yield Case(f"chunk_scores {reduce}", ops.chunk_scores, given, options)
        given_k = (torch.randn(2, 5, 4, 64).to(bf16), kv(1, 530)[0], ints(1, 4), ints(530, 100))
        yield Case(f"chunk_scores_keys {reduce}", ops.chunk_scores_keys, given_k, options)
    for chunks in (33, 4096):
        options = dict(chunk_size=16, budget=16, num_sinks=1, num_recent=2)
        given = (torch.rand(2, chunks), ints(chunks * 16 - 3, 100))
        yield Case(f"select_chunks {chunks}", ops.select_chunks, given, options)
    full, work = kv(4, 300), kv(4, 70)
    ids = ints(0, 3, 9, 18).expand(2, -1).contiguous()
    for interleaved in (False, True):
        given = (full[:2], full[2:], work[:2], work[2:], ids, ints(4, 2), ints(300, 70))
        given = (*given, torch.rand(2, 16))
        options = dict(chunk_size=16, interleaved=interleaved, right_aligned=True)
        yield Case(f"gather_chunks {interleaved}", ops.gather_chunks, given, options)
    path = ints(0, 2, 5, 9, -1)[None].expand(2, -1).contiguous()
    yield Case("compact_kv", ops.compact_kv, (kv(6, 40), ints(20, 31), path, ints(3, 1)), {})
    cache, new = kv(2, 40), kv(2, 9)
    yield Case("append_kv", ops.append_kv, (*cache, *new, ints(20, 35)), {})
    yield from forward_cases()
    for dtype in (torch.float32, bf16):
        logits = torch.randn(2, 3, vocab).to(dtype)
        options = dict(top_k=7, width=5)
        given = (logits, -torch.rand(2, 3))
        yield Case(f"expand_tree {dtype}", ops.expand_tree, given, options)
        yield Case(f"sample_nodes {dtype}", ops.sample_nodes, (logits,), {})
        uniforms = torch.rand(2, 3, dtype=torch.float64)
        yield Case(f"sample_nodes {dtype} drawn", ops.sample_nodes, (logits, uniforms), {})
    parents = tree(80)[None].expand(2, -1).int().contiguous()
    logp = -tree_depths(80)[None] - torch.rand(2, 80)
    yield Case("finalize_tree", ops.finalize_tree, (logp, parents), dict(num_nodes=66))
    tokens = torch.randint(0, 4, (2, 80))
    yield Case("verify_tree", ops.verify_tree, (tokens, parents, tokens.roll(1, 1)), {})


def forward_cases() -> Iterator[Case]:
    """Yield the operators of a layer around its attention."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for length in (40, 128, 900, 5001):
            merged = torch.randn(2, 3, 2 * length).to(dtype)
            x, residual = merged.chunk(2, -1)
            given = (x, residual, residual[0, 0])
            options = dict(eps=1e-6, offset=float(length > 128), round_first=length <= 128)
            name = f"{length} {dtype}"
            yield Case(f"rms_norm {name}", ops.rms_norm, given[::2], options)
            yield Case(f"rms_norm, added, {name}", ops.add_rms_norm, given, options)
            yield Case(f"silu_mul {name}", ops.silu_mul, (x, residual), {})
        for dim, rotated in ((64, 64), (80, 20), (6, 2)):
            rows = [torch.randn(2, 9, heads, dim).to(dtype) for heads in (6, 2, 2)]
            cos, sin = torch.randn(2, 1, 9, rotated).to(dtype)
            caches = torch.randn(2, 2, 2, 40, dim).to(dtype).transpose(2, 3).unbind()
            given = (*rows, cos, sin, *caches, ints(20, 35))
            yield Case(f"rotary_append {dim} {rotated} {dtype}", ops.rotary_append, given, {})


def cases(few: bool) -> Iterator[Case]:
    torch.manual_seed(0)
    yield from attention_cases(few)
    yield from other_cases(few)


def on(device: str, values, dtype: torch.dtype | None = None):
    """Copy all tensors, with their strides; those of floating point to ``dtype``."""

    def copy(x):
        if not isinstance(x, Tensor):
            return x
        type_ = dtype if dtype is not None and x.is_floating_point() else x.dtype
        there = torch.empty_strided(x.shape, x.stride(), dtype=type_, device=device)
        return there.copy_(x)

    return tree_map(copy, values)


def close(got: Tensor, expected: Tensor) -> bool:
    if not got.is_floating_point():
        return torch.equal(got, expected)
    tolerance = 1e-4 if got.dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(
        got.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def agrees(case: Case, device: str) -> bool:
    """Tell whether an operator returns and writes on ``device`` what its reference does in fp64."""
    args, options = on("cpu", (case.args, case.options), torch.float64)
    expected = tree_leaves((getattr(reference, case.op.__name__)(*args, **options), args))
    args, options = on(device, (case.args, case.options))
    got = tree_leaves((case.op(*args, **options), args))
    pairs = zip(got, expected, strict=True)
    return all(close(a.cpu(), b) for a, b in pairs if isinstance(a, Tensor))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = "cuda" if _C.has_cuda and torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here)
    parser.add_argument("--few", action="store_true", help="fewer shapes, for a slow tool")
    parser.add_argument("--filter", default="", help="only cases whose name contains this text")
    arguments = parser.parse_args()
    passed = failed = 0
    for case in cases(arguments.few):
        if arguments.filter not in case.name:
            continue
        print(case.name, end=": ", flush=True)  # before it runs: it may hang, or end the process
        same = agrees(case, arguments.device)
        print("as the reference" if same else "DIFFERS from the reference", flush=True)
        passed, failed = passed + same, failed + (not same)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
