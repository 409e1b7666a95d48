import pytest
import torch
from backends import capture
from kv_cases import DTYPES, run_with_threads, same_bits
from row_cases import LAYOUTS, check_near, rows

from specextend import ops, reference

# Llama, Gemma, OLMo 2: offset, and what is rounded first.
KINDS = [(0.0, True), (1.0, False), (0.0, False)]
WIDTHS = [576, 896, 1536, 2048, 4096, 5120, 8192, 8193, 11111]


def by_torch(x, weight, eps, offset, round_first):
    """Say what a model of transformers says."""
    h = x.to(torch.float32)
    variance = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(variance + eps)
    if round_first:
        return weight * h.to(x.dtype)
    if offset:
        return (h * (offset + weight.float())).type_as(x)
    return (weight * h).to(x.dtype)


def check_bits(count, length, dtype, seed=0):
    x = rows("contiguous", (count, length), dtype, seed=seed, scale=3.0)
    residual = rows("contiguous", (count, length), dtype, seed=seed + 1)
    weight = rows("contiguous", (length,), dtype, seed=seed + 2)
    total = residual + x
    for offset, first in KINDS:
        options = dict(eps=1e-6, offset=offset, round_first=first)
        want = by_torch(x, weight, **options)
        assert same_bits(ops.rms_norm(x, weight, **options), want), (length, options)
        out, added = ops.add_rms_norm(x, residual, weight, **options)
        assert same_bits(added, total)
        assert same_bits(out, by_torch(total, weight, **options)), (length, options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cpu_has_the_bits_of_torch(dtype):
    """All lengths around what torch adds up apart: lanes, groups of them, partial sums."""
    for length in range(1, 301):
        check_bits(1 + length % 3, length, dtype)
    for length in WIDTHS:
        check_bits(2, length, dtype)
    for length in (16 * 16 * 32 - 1, 16 * 16 * 32, 16 * 16 * 32 + 1, 3 * 16 * 16 * 32 + 77):
        check_bits(2, length, dtype)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_cpu_has_the_bits_of_torch_by_any_number_of_threads(threads):
    def check():
        for count, length in ((1, 8192), (9, 4096), (33, 1536), (100, 896), (100, 901), (1000, 64)):
            check_bits(count, length, torch.bfloat16)

    run_with_threads(threads, check)


def test_rows_of_four_levels():
    check_bits(2, 16**3 * 32 + 5000, torch.float32)
    check_bits(2, 3 * 16**3 * 32 + 16**2 * 32 * 5 + 999, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, device):
    for shape in ((7,), (5, 24), (2, 3, 40), (2, 3, 4, 64), (1, 2, 1100), (3, 7, 2, 33)):
        x = rows(layout, shape, dtype, device)
        residual = rows(layout, shape, dtype, device, seed=1)
        plain = rows("contiguous", shape, dtype, device)
        weight = rows("contiguous", shape[-1:], dtype, device, seed=2)
        for offset, first in KINDS:
            options = dict(eps=1e-5, offset=offset, round_first=first)
            got = ops.rms_norm(x, weight, **options)
            near = reference.rms_norm(x, weight, **options)
            check_near(got, reference.rms_norm(x.double(), weight.double(), **options), near)
            assert same_bits(got, ops.rms_norm(plain, weight, **options))
            out, total = ops.add_rms_norm(x, residual, weight, **options)
            assert same_bits(total, (residual + x).contiguous())
            assert same_bits(out, ops.rms_norm(total, weight, **options))
            other = ops.add_rms_norm(x, residual.contiguous(), weight, **options)
            assert same_bits(out, other[0]) and same_bits(total, other[1])


@pytest.mark.parametrize("length", [1, 2, 8, 31, 64, 100, 256, 257, 513, 4100, 9001])
def test_lengths(length, device):
    for dtype in (torch.float32, torch.bfloat16):
        x = rows("contiguous", (3, length), dtype, device)
        weight = rows("contiguous", (length,), dtype, device, seed=1)
        got = ops.rms_norm(x, weight, eps=1e-6)
        exact = reference.rms_norm(x.double(), weight.double(), eps=1e-6)
        check_near(got, exact, reference.rms_norm(x, weight, eps=1e-6))
        out, total = ops.add_rms_norm(x, x.flip(0), weight, eps=1e-6)
        assert same_bits(total, x.flip(0) + x)
        assert same_bits(out, ops.rms_norm(total, weight, eps=1e-6))


@pytest.mark.parametrize("length", [40, 64, 896, 1031])
def test_rows_have_the_bits_that_they_have_alone(length, device):
    """Alone, among others, in other memory: also where no row begins at a multiple of 16 bytes."""
    for dtype in DTYPES:
        x = rows("contiguous", (9, length), dtype, device)
        weight = rows("contiguous", (length,), dtype, device, seed=1)
        together = ops.rms_norm(x, weight, eps=1e-6)
        for row in range(9):
            assert same_bits(ops.rms_norm(x[row], weight, eps=1e-6), together[row])
        for offset in range(1, 16 // dtype.itemsize):
            memory = torch.zeros(9 * length + offset, dtype=dtype, device=device)
            moved = memory[offset:].view(9, length).copy_(x)
            assert same_bits(ops.rms_norm(moved, weight, eps=1e-6), together), offset
            got = ops.rms_norm(x, memory[offset:][:length].copy_(weight), eps=1e-6)
            assert same_bits(got, together), offset


def test_extremes(device):
    """Zeros, subnormal squares, infinity and NaN stay in their rows; -0 keeps its sign."""
    for dtype in DTYPES:
        x = rows("contiguous", (6, 40), dtype, device)
        x[0], x[1], x[2, 7], x[3, 30] = 0, 1e-30, torch.inf, torch.nan
        weight = rows("contiguous", (40,), dtype, device, seed=1)
        weight[:5] = -0.0
        for offset, first in KINDS:
            options = dict(eps=1e-6, offset=offset, round_first=first)
            got, want = (f(x, weight, **options) for f in (ops.rms_norm, reference.rms_norm))
            assert torch.equal(got.isnan(), want.isnan()) and got[4:].isfinite().all()
            assert torch.equal(got[[0, 4]].signbit(), want[[0, 4]].signbit())
            torch.testing.assert_close(got, want, equal_nan=True, rtol=2e-2, atol=1e-6)


def test_graph_replay(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    x, residual = (rows("contiguous", (20, 896), torch.float16, device, i) for i in range(2))
    weight = rows("contiguous", (896,), torch.float16, device, seed=2)
    graph, captured = capture(lambda: ops.add_rms_norm(x, residual, weight, eps=1e-6))
    x.copy_(rows("contiguous", (20, 896), torch.float16, device, 5))
    graph.replay()
    for got, want in zip(captured, ops.add_rms_norm(x, residual, weight, eps=1e-6), strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (2, 0, 3, 8)])
def test_empty(shape, device):
    x, weight = torch.ones(shape, device=device), torch.ones(shape[-1], device=device)
    assert ops.rms_norm(x, weight, eps=1e-6).shape == shape
    assert [t.shape for t in ops.add_rms_norm(x, x, weight, eps=1e-6)] == [shape, shape]


@pytest.mark.not_emulated("the registered ops are asked")
def test_opcheck(device):
    for dtype in DTYPES:
        x, residual = (rows("merged", (2, 3, 16), dtype, device, i) for i in range(2))
        weight = rows("contiguous", (16,), dtype, device, seed=2)
        options = dict(eps=1e-6, offset=1.0, round_first=False)
        torch.library.opcheck(torch.ops.specextend.rms_norm.default, (x, weight), options)
        given = (x, residual, weight)
        torch.library.opcheck(torch.ops.specextend.add_rms_norm.default, given, options)


X, W = torch.zeros(2, 3, 8), torch.zeros(8)
ERRORS = [
    ({"x": torch.zeros(())}, r"x must be \[.., N\] of 1 to 4 dimensions, got \[\]"),
    ({"x": X[None, None]}, r"x must be \[.., N\] of 1 to 4 dimensions, got \[1, 1, 2, 3, 8\]"),
    ({"x": X.double()}, "x must be float32, float16 or bfloat16, got float64"),
    ({"x": X.mT.contiguous().mT}, "x must have a last stride of 1, got 3"),
    ({"weight": W[:7]}, r"weight must have shape \[8\], got \[7\]"),
    ({"weight": W.half()}, "weight must be float32, got float16"),
    ({"weight": torch.zeros(16)[::2]}, "weight must have a last stride of 1, got 2"),
    ({"offset": 1.0}, "offset must be 0 with round_first, got 1"),
    ({"x": torch.zeros(2**24)}, r"the length of a row N must be in \[0, 16777215\], got 16777216"),
]
ERRORS_OF_BOTH = [
    ({"residual": X[0]}, r"residual must have the shape of x \[2, 3, 8\], got \[3, 8\]"),
    ({"residual": X[:, :2]}, r"residual must have the shape of x \[2, 3, 8\], got \[2, 2, 8\]"),
    ({"residual": X.half()}, "residual must be float32, got float16"),
    ({"residual": X.mT.contiguous().mT}, "residual must have a last stride of 1, got 3"),
]


@pytest.mark.parametrize(("changed", "message"), ERRORS)
def test_errors(changed, message):
    with pytest.raises(RuntimeError, match=f"rms_norm: {message}"):
        ops.rms_norm(**{"x": X, "weight": W, "eps": 1e-6, **changed})


@pytest.mark.parametrize(("changed", "message"), [*ERRORS[4:8], *ERRORS_OF_BOTH])
def test_errors_with_a_residual(changed, message):
    arguments = {"x": X, "residual": X, "weight": W, "eps": 1e-6}
    with pytest.raises(RuntimeError, match=f"add_rms_norm: {message}"):
        ops.add_rms_norm(**{**arguments, **changed})
