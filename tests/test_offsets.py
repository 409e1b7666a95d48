"""Offsets beyond 32 bits, of every op: strides of more than 2^32 elements in virtual memory.

An argument may have such strides in all dimensions but the last, or it has to be contiguous: then
it is far from its begin only where it is as large, and nothing here is. ``CALLS`` has all arguments
of all ops, and says which is which.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from kv_cases import int32, same_bits
from torch import Tensor
from virtual_memory import spread

from specextend import ops
from specextend.testing import ancestor_mask, pack_mask


@dataclass
class Call:
    """Calls one op on small tensors.

    Attributes:
        arguments: by name; of a list all tensors are spread at once.
        strided: the names of those with strides.
        transposed: of those, which may have one in the last dimension instead of the one before.
        written: of those, what is a result.
        options: of the op.
    """

    arguments: dict[str, Tensor | list[Tensor] | None]
    strided: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)

    def dims(self) -> list[tuple[str, int, bool]]:
        """List where there is a stride: argument, dimension, and whether it may be any."""
        found = []
        for name, value in self.arguments.items():
            t = value[0] if isinstance(value, list) else value
            for dim in range(0 if t is None else t.dim()):
                if t.shape[dim] > 1:
                    free = dim < t.dim() - 1 or name in self.transposed
                    found.append((name, dim, name in self.strided and free))
        return found

    def run(self, op, device: str, name: str | None = None, dim: int = 0) -> list[Tensor]:
        """Return the results, with the argument ``name`` spread along ``dim``."""

        def place(key: str, value):
            if isinstance(value, list):
                return [place(key, t) for t in value]
            if key == name:
                return spread(value, dim, device)
            return None if value is None else value.clone().to(device)

        arguments = {key: place(key, value) for key, value in self.arguments.items()}
        got = op(**arguments, **self.options)
        got = [] if got is None else [got] if isinstance(got, Tensor) else [*got]
        for key in self.written:
            value = arguments[key]
            got += value if isinstance(value, list) else [value]
        return [t.cpu() for t in got]


def normal(*shape: int, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def attention(dtype, rows: int) -> Call:
    """Attend to a block of 128 keys, and to fewer; few rows and many have kernels of their own."""
    parents = torch.arange(rows) // 2 - 1
    return Call(
        {
            "q": normal(2, rows, 4, 64, dtype=dtype),
            "k": normal(2, 150 + rows, 2, 64, dtype=dtype),
            "v": normal(2, 150 + rows, 2, 64, dtype=dtype) + 1,
            "prefix_lens": int32([150, 33]),
            "tree_mask": pack_mask(ancestor_mask(parents)).repeat(2, 1, 1),
            "q_depths": int32([[0] * rows] * 2),
            "k_depths": int32([[0] * rows] * 2),
            "sinks": torch.zeros(4),
        },
        strided=("q", "k", "v"),
    )


def scores(dtype) -> Call:
    chunk_lse = normal(2, 3, 4, 5)
    arguments = {"chunk_lse": chunk_lse, "lse": chunk_lse.logsumexp(-1)}
    return Call(
        {**arguments, "rows": int32([2, 1]), "prefix_lens": int32([40, 20])},
        strided=("chunk_lse", "lse"),
        options={"chunk_size": 8},
    )


def scores_of_keys(dtype) -> Call:
    return Call(
        {
            "q": normal(2, 3, 4, 64, dtype=dtype),
            "k": normal(2, 150, 2, 64, dtype=dtype),
            "rows": int32([2, 1]),
            "lens": int32([150, 33]),
        },
        strided=("q", "k"),
        options={"chunk_size": 16},
    )


def linear(dtype) -> Call:
    arguments = {"x": normal(2, 3, 70, dtype=dtype), "w": normal(2, 5, 70, dtype=dtype)}
    return Call(
        {**arguments, "bias": normal(5, dtype=dtype)}, strided=("x", "w"), transposed=("w",)
    )


def append(dtype) -> Call:
    return Call(
        {
            "k_cache": normal(2, 9, 3, 16, dtype=dtype),
            "v_cache": normal(2, 9, 3, 8, dtype=dtype),
            "k": normal(2, 4, 3, 16, dtype=dtype),
            "v": normal(2, 4, 3, 8, dtype=dtype),
            "lens": int32([2, 5]),
        },
        strided=("k_cache", "v_cache", "k", "v"),
        written=("k_cache", "v_cache"),
    )


def rotated_append(dtype) -> Call:
    appended = append(dtype).arguments
    appended["v_cache"], appended["v"] = (
        normal(*appended[name].shape, dtype=dtype) for name in ("v_cache", "v")
    )
    factors = {name: normal(2, 4, 16, dtype=dtype) + 1 for name in ("cos", "sin")}
    q = normal(2, 4, 6, 16, dtype=dtype)
    strided = ("q", "k", "v", "cos", "sin", "k_cache", "v_cache")
    return Call({"q": q, **factors, **appended}, strided=strided, written=("k_cache", "v_cache"))


def norm(dtype, residual: bool) -> Call:
    arguments = {"x": normal(2, 3, 5, 40, dtype=dtype), "weight": normal(40, dtype=dtype)}
    if residual:
        arguments["residual"] = normal(2, 3, 5, 40, dtype=dtype) + 1
    return Call(arguments, strided=("x", "residual"), options={"eps": 1e-6})


def silu(dtype) -> Call:
    gate = normal(2, 3, 5, 64, dtype=dtype)
    return Call({"gate": gate, "up": gate + 1}, strided=("gate", "up"))


def compact(dtype) -> Call:
    return Call(
        {
            "caches": [normal(2, 12, 3, 16, dtype=dtype), normal(2, 12, 3, 8, dtype=dtype)],
            "prefix_lens": int32([4, 1]),
            "path": int32([[0, 2, 5], [0, 3, 4]]),
            "num_accepted": int32([2, 2]),
        },
        strided=("caches",),
        written=("caches",),
    )


def gather(dtype) -> Call:
    def caches(rows: int, dim: int) -> list[Tensor]:
        return [normal(2, rows, heads, dim, dtype=dtype) for heads in (2, 3)]

    return Call(
        {
            "k_full": caches(20, 16),
            "v_full": caches(20, 8),
            "k_work": caches(9, 16),
            "v_work": caches(9, 8),
            "ids": int32([[1, 4], [0, 2]]),
            "counts": int32([2, 2]),
            "lens": int32([19, 12]),
            "inv_freq": torch.tensor([[1.0, 0.1, 0.01], [1.0, 0.2, 0.04]]),
        },
        strided=("k_full", "v_full", "k_work", "v_work"),
        written=("k_work", "v_work"),
        options={"chunk_size": 4},
    )


def sample(dtype, uniforms: Tensor | None) -> Call:
    logits = normal(2, 3, 600, dtype=dtype)
    return Call({"logits": logits, "uniforms": uniforms}, strided=("logits",))


def expand(dtype) -> Call:
    return Call(
        {"logits": normal(2, 3, 600, dtype=dtype), "beam_logp": -normal(2, 3).abs()},
        strided=("logits",),
        options={"top_k": 5, "width": 7},
    )


def contiguous(arguments: dict[str, Tensor], **options) -> Callable[[torch.dtype], Call]:
    """Say so of an op whose arguments all have to be."""
    return lambda dtype: Call(arguments, options=options)


ANY, FLOAT = (torch.float32, torch.bfloat16), (torch.float32,)
PARENTS, TOKENS = int32([[-1, 0, 0, 1]] * 2), torch.zeros(2, 4).long()
TREE = {"tokens": TOKENS, "parents": PARENTS, "target_tokens": TOKENS}
SCORES = {"scores": normal(2, 5), "lens": int32([40, 20])}
STATES = {name: normal(2, 3, *[8] * (name[0] == "o")) for name in ("o_a", "lse_a", "o_b", "lse_b")}
UNIFORMS = torch.linspace(0, 0.9, 6).view(2, 3)
CALLS: list[tuple[str, tuple[torch.dtype, ...], Callable[[torch.dtype], Call]]] = [
    ("add_rms_norm", ANY, lambda dtype: norm(dtype, True)),
    ("append_kv", ANY, append),
    ("chunk_scores", FLOAT, scores),
    ("chunk_scores_keys", ANY, scores_of_keys),
    ("compact_kv", ANY, compact),
    ("expand_tree", ANY, expand),
    ("finalize_tree", FLOAT, contiguous({"logp": normal(2, 4), "parents": PARENTS}, num_nodes=3)),
    ("gather_chunks", ANY, gather),
    ("invariant_linear", ANY, linear),
    ("merge_states", FLOAT, contiguous(STATES)),
    ("rms_norm", ANY, lambda dtype: norm(dtype, False)),
    ("rotary_append", ANY, rotated_append),
    ("sample_nodes", ANY, lambda dtype: sample(dtype, None)),
    ("sample_nodes", ANY, lambda dtype: sample(dtype, UNIFORMS)),
    ("select_chunks", FLOAT, contiguous(SCORES, chunk_size=8, budget=2)),
    ("silu_mul", ANY, silu),
    ("tree_attention", ANY, lambda dtype: attention(dtype, 3)),
    ("tree_attention", ANY, lambda dtype: attention(dtype, 20)),
    ("verify_tree", FLOAT, contiguous(TREE)),
]
CASES = [
    pytest.param(name, make(dtype), id=f"{name}-{str(dtype)[6:]}")
    for name, dtypes, make in CALLS
    for dtype in dtypes
]


def test_every_argument_of_every_op_is_here():
    here = {name: set() for name, *_ in CALLS}
    for name, dtypes, make in CALLS:
        here[name] |= set(make(dtypes[0]).arguments)
    there = {
        name: {
            argument
            for argument, parameter in inspect.signature(getattr(ops, name)).parameters.items()
            if "Tensor" in str(parameter.annotation)
        }
        for name in ops.__all__
    }
    assert here == there


@pytest.mark.sweep(33)
@pytest.mark.parametrize(("name", "call"), CASES)
def test_strides_beyond_32_bits(name, call, device):
    """Results have the same bits; what has to be contiguous is refused."""
    op = getattr(ops, name)
    expected = call.run(op, device)
    for argument, dim, may_be_any in call.dims():
        if may_be_any:
            got = call.run(op, device, argument, dim)
            same = [same_bits(a.contiguous(), b) for a, b in zip(got, expected, strict=True)]
            assert all(same), f"{argument}, dimension {dim}: results are {same}"
        else:
            with pytest.raises(RuntimeError, match="must be contiguous|must have a last stride"):
                call.run(op, device, argument, dim)
