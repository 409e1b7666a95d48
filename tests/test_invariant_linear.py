import importlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import isa_bits
import pytest
import torch
from kv_cases import DTYPES, run_with_threads, same_bits

from specextend import ops, reference
from specextend.testing import assert_within_twice

# [M, N, K]: sizes of 1, and around those of a step, a tile, a panel and a block of rows.
SHAPES = [
    (1, 1, 1), (1, 7, 3), (2, 4, 8), (3, 5, 15), (4, 8, 16), (5, 9, 17), (1, 33, 31), (7, 31, 32),
    (8, 32, 33), (9, 63, 64), (16, 65, 100), (17, 12, 257), (65, 40, 48), (130, 3, 72),
]  # fmt: skip


def operands(rows, columns, depth, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, depth, generator=generator)
    w = torch.randn(columns, depth, generator=generator)
    bias = torch.randn(columns, generator=generator)
    return tuple(t.to(device, dtype) for t in (x, w, bias))


def as_laid_out(w, layout):
    """Copy w, in one of the ways in which it may lie; NaN surrounds it."""
    if layout == "rows":
        return w
    if layout == "columns":
        return w.mT.contiguous().mT
    transposed = "columns" in layout
    t = w.mT if transposed else w
    base = t.new_full((*t.shape[:-2], t.shape[-2] + 2, t.shape[-1] + 5), torch.nan)
    view = base[..., 1:-1, 3:-2]
    view.copy_(t)
    return view.mT if transposed else view


LAYOUTS = ["rows", "columns", "sliced rows", "sliced columns"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error(layout, dtype):
    for i, shape in enumerate(SHAPES):
        x, w, bias = operands(*shape, dtype, seed=i)
        x = as_laid_out(x, "sliced rows")
        for b in (None, bias):
            given = [None if t is None else t.double() for t in (x, w, b)]
            exact, plain = reference.invariant_linear(*given), reference.invariant_linear(x, w, b)
            got = ops.invariant_linear(x, as_laid_out(w, layout), b)
            assert got.dtype == dtype and got.is_contiguous()
            # Two sums of few terms may both be lucky or not: what bf16 rounds off counts as well.
            assert_within_twice(got, exact, plain, eps=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_the_bits_that_they_have_alone(dtype):
    """For any number of rows, at any place, in all layouts of the weight."""
    for columns, depth in ((37, 200), (64, 129), (4, 1031)):
        x, w, bias = operands(70, columns, depth, dtype)
        alone = torch.cat([ops.invariant_linear(x[i : i + 1], w, bias) for i in range(70)])
        for rows in (*range(1, 41), 63, 64, 65, 70):
            first = (11 * rows) % (71 - rows)
            got = ops.invariant_linear(x[first : first + rows], w, bias)
            assert same_bits(got, alone[first : first + rows]), rows
        mixed = torch.randperm(70, generator=torch.Generator().manual_seed(1))
        assert same_bits(ops.invariant_linear(x[mixed], w, bias), alone[mixed])
        for layout in LAYOUTS:
            assert same_bits(ops.invariant_linear(x, as_laid_out(w, layout), bias), alone), layout
        # Columns are as independent, and the two operands may change places.
        assert same_bits(ops.invariant_linear(x, w[2:3], bias[2:3]), alone[:, 2:3])
        swapped = ops.invariant_linear(w, x)
        assert same_bits(swapped.mT.contiguous(), ops.invariant_linear(x, w))


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_have_the_bits_of_their_products(dtype):
    products = [operands(9, 34, 80, dtype, seed=i) for i in range(5)]
    x, w, bias = map(torch.stack, zip(*products, strict=True))
    for layout in LAYOUTS:
        together = ops.invariant_linear(x, as_laid_out(w, layout), bias[0])
        apart = [ops.invariant_linear(x[b], w[b], bias[0]) for b in range(5)]
        assert same_bits(together, torch.stack(apart)), layout
    shared = ops.invariant_linear(x, w[:1].expand(5, -1, -1))
    assert same_bits(shared, ops.invariant_linear(x, w[0]))


def test_threads_do_not_change_bits():
    for dtype in DTYPES:
        x, w, bias = operands(17, 1000, 513, dtype)
        for layout in ("rows", "columns"):
            laid = as_laid_out(w, layout)
            one, *others = (
                run_with_threads(n, partial(ops.invariant_linear, x, laid, bias))
                for n in (1, 2, 3, 7)
            )
            assert all(same_bits(one, other) for other in others)


def check_instruction_set():
    """Run what the kernels of one instruction set have to pass."""
    for dtype in DTYPES:
        for layout in LAYOUTS:
            test_error(layout, dtype)
        test_rows_have_the_bits_that_they_have_alone(dtype)
        test_batches_have_the_bits_of_their_products(dtype)
        test_large_and_special_numbers(dtype)


@pytest.mark.parametrize("isa", isa_bits.runnable()[:-1])
def test_every_instruction_set(isa):
    ran = subprocess.run(
        [sys.executable, "-c", f"import {Path(__file__).stem} as t; t.check_instruction_set()"],
        env={**os.environ, "SPECEXTEND_CPU_ISA": isa, "OMP_NUM_THREADS": "1",
             "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_special_numbers(dtype):
    """A row with infinities or NaN keeps them to itself; large sums become infinite."""
    x, w, _ = operands(6, 20, 70, dtype)
    clean = ops.invariant_linear(x, w)
    x[2, 5], x[4, 69] = torch.inf, torch.nan
    got = ops.invariant_linear(x, w)
    rest = [0, 1, 3, 5]
    assert same_bits(got[rest], clean[rest])
    assert torch.equal(got[2], torch.inf * w[:, 5].sign()) and got[4].isnan().all()
    most = torch.finfo(dtype).max
    assert (ops.invariant_linear(x.new_full((1, 40), most), x.new_ones(3, 40)) == torch.inf).all()


def test_empty():
    for shape in ((0, 5, 8), (3, 0, 8), (0, 0, 0)):
        x, w, bias = operands(*shape, torch.bfloat16)
        assert ops.invariant_linear(x, w, bias).shape == shape[:2]
    x, w, bias = operands(3, 5, 0, torch.float32)
    assert torch.equal(ops.invariant_linear(x, w, bias), bias.expand(3, 5))
    assert torch.equal(ops.invariant_linear(x, w), torch.zeros(3, 5))
    assert ops.invariant_linear(x.new_zeros(0, 3, 4), x.new_zeros(0, 2, 4)).shape == (0, 3, 2)


def test_shapes_of_x():
    x, w, _ = operands(24, 10, 40, torch.bfloat16)
    want = ops.invariant_linear(x, w)
    assert same_bits(ops.invariant_linear(x.view(2, 3, 4, 40), w).view(24, 10), want)
    assert same_bits(ops.invariant_linear(x[7], w), want[7])


def test_opcheck():
    for dtype in DTYPES:
        x, w, bias = operands(3, 5, 20, dtype)
        for given in ((x, w), (x, w, bias), (x[None].expand(2, -1, -1), w[None].expand(2, -1, -1))):
            torch.library.opcheck(torch.ops.specextend.invariant_linear.default, given)


def test_blocks_of_a_gpu():
    """What pads rows on a GPU, run where there is none: one shape, whatever the number of rows."""
    by_blocks = importlib.import_module("specextend.ops.invariant_linear")._by_blocks
    seen = []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("mm", "bmm"):
                seen.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    x, w, bias = operands(130, 7, 24, torch.float32)
    for rows in (0, 1, 63, 64, 65, 130):
        for dims in ((), (2,)):
            given = (x[:rows].expand(*dims, -1, -1), w.expand(*dims, -1, -1), bias)
            with Shapes():
                y = by_blocks(*given)
            torch.testing.assert_close(y, reference.invariant_linear(*given))
    assert {shape[-2:] for shape in seen if shape[-2]} == {(64, 24)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_on_a_gpu(dtype):
    x, w, bias = operands(130, 1000, 513, dtype, "cuda")
    alone = torch.cat([ops.invariant_linear(x[i : i + 1], w, bias) for i in range(130)])
    for rows in (2, 9, 63, 64, 65, 130):
        assert same_bits(ops.invariant_linear(x[-rows:], w, bias), alone[-rows:]), rows


BAD = [
    (dict(x=torch.zeros(8)), r"x must be \[M, K\] or \[B, M, K\], got \[8\]"),
    (dict(w=torch.zeros(2, 5, 8)), r"w must be \[N, K\], as x is \[M, K\], got \[2, 5, 8\]"),
    (dict(w=torch.zeros(5, 9)), r"w must have shape \[5, 8\], got \[5, 9\]"),
    (dict(x=torch.zeros(3, 2, 8), w=torch.zeros(2, 5, 8)), r"w must have shape \[3, 5, 8\]"),
    (dict(x=torch.zeros(3, 8).double()), "x must be float32, float16 or bfloat16, got float64"),
    (dict(w=torch.zeros(5, 8).half()), "w must be float32, got float16"),
    (dict(x=torch.zeros(3, 16)[:, ::2]), "x must have a last stride of 1, got 2"),
    (dict(w=torch.zeros(10, 16)[::2, ::2]), "w must have a last stride of 1, or .*, got 32 and 2"),
    (dict(bias=torch.zeros(6)), r"bias must have shape \[5\], got \[6\]"),
    (dict(bias=torch.zeros(5).half()), "bias must be float32, got float16"),
    (dict(bias=torch.zeros(10)[::2]), "bias must have a last stride of 1, got 2"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[m for _, m in BAD])
def test_refusals(changes, message):
    given = dict(x=torch.zeros(3, 8), w=torch.zeros(5, 8), bias=torch.zeros(5)) | changes
    with pytest.raises(RuntimeError, match=f"invariant_linear: {message}"):
        torch.ops.specextend.invariant_linear(*given.values())
