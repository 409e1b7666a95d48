import pytest
import torch
from backends import capture
from kv_cases import DTYPES, run_with_threads, same_bits
from row_cases import LAYOUTS, check_near, rows, same_numbers
from torch.nn import functional as F

from specextend import ops, reference

HALVES = [torch.float16, torch.bfloat16]


def every_number(dtype, device="cpu"):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).to(device)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_has_torchs_bits(dtype):
    """In whole vectors, and behind them."""
    x = every_number(dtype)
    one = torch.ones_like(x)
    want = F.silu(x)
    assert same_numbers(ops.silu_mul(x, one), want)
    for length in (1, 3, 8, 21):
        count = len(x) // length * length
        got = ops.silu_mul(x[:count].view(-1, length), one[:count].view(-1, length))
        assert same_numbers(got.flatten(), want[:count]), length
    apart = x.new_zeros(len(x), 2)
    apart[:, 0] = x
    assert same_numbers(F.silu(apart[:, 0]), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_cpu_has_the_bits_of_torch(threads, dtype):
    def check():
        for shape in ((5,), (1, 1, 4864), (3, 77), (9, 4864), (33, 1000), (200, 513), (2, 3, 4, 7)):
            for layout in LAYOUTS:
                gate = rows(layout, shape, dtype, scale=4.0)
                up = rows(layout, shape, dtype, seed=1)
                got = ops.silu_mul(gate, up)
                assert got.is_contiguous() and same_numbers(got, F.silu(gate) * up), (shape, layout)

    run_with_threads(threads, check)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, device):
    for shape in ((7,), (5, 24), (2, 3, 40), (2, 3, 4, 64), (1, 2, 1100), (3, 7, 2, 33)):
        gate = rows(layout, shape, dtype, device, scale=4.0)
        up = rows(layout, shape, dtype, device, seed=1)
        got = ops.silu_mul(gate, up)
        exact = reference.silu_mul(gate.double(), up.double())
        check_near(got, exact, reference.silu_mul(gate, up))
        mixed = ops.silu_mul(gate.contiguous(), up)
        assert dtype == torch.float32 or same_bits(mixed, got)


@pytest.mark.parametrize("dtype", HALVES)
def test_unaligned_memory(dtype, device):
    """Every offset below 16 bytes of each input runs: a wide load may begin at some alone."""
    gate, up = (rows("contiguous", (6, 64), dtype, device, i) for i in range(2))
    want = ops.silu_mul(gate, up)
    for offset in range(1, 16 // dtype.itemsize):
        memory = torch.zeros(6 * 64 + offset, dtype=dtype, device=device)
        moved = memory[offset:].view(6, 64)
        assert same_bits(ops.silu_mul(moved.copy_(gate), up), want), offset
        assert same_bits(ops.silu_mul(gate, moved.copy_(up)), want), offset


def test_extremes(device):
    """Large numbers are themselves, -large ones 0, as long as they are finite."""
    for dtype in DTYPES:
        most = torch.finfo(dtype).max
        gate = torch.tensor([0.0, -0.0, most, -most, torch.inf, -torch.inf, torch.nan, 1.0])
        gate = gate.to(device, dtype)
        got = ops.silu_mul(gate, torch.ones_like(gate))
        assert same_numbers(got, F.silu(gate)), got
        infinite = torch.full_like(gate, torch.inf)
        assert same_numbers(ops.silu_mul(gate, infinite), F.silu(gate) * torch.inf)


@pytest.mark.parametrize("length", [5, 64, 1001])
def test_rows_have_the_bits_that_they_have_alone(length, device):
    for dtype in HALVES:
        gate, up = (rows("padded", (7, length), dtype, device, i, 3.0) for i in range(2))
        together = ops.silu_mul(gate, up)
        for row in range(7):
            assert same_bits(ops.silu_mul(gate[row], up[row]), together[row])


def test_graph_replay(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    merged = rows("contiguous", (20, 2 * 896), torch.float16, device)
    graph, captured = capture(lambda: ops.silu_mul(*merged.chunk(2, -1)))
    merged.copy_(rows("contiguous", (20, 2 * 896), torch.float16, device, 5))
    graph.replay()
    assert same_bits(captured, ops.silu_mul(*merged.chunk(2, -1)))


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (2, 0, 3, 8)])
def test_empty(shape, device):
    for dtype in DTYPES:
        x = torch.ones(shape, dtype=dtype, device=device)
        assert ops.silu_mul(x, x).shape == shape


@pytest.mark.not_emulated("the registered op is asked")
def test_opcheck(device):
    for dtype in DTYPES:
        gate, up = rows("contiguous", (2, 3, 32), dtype, device).chunk(2, -1)
        torch.library.opcheck(torch.ops.specextend.silu_mul.default, (gate, up))


X = torch.zeros(2, 3, 8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gate": torch.zeros(())}, r"gate must be \[.., N\] of 1 to 4 dimensions, got \[\]"),
        ({"gate": X.double()}, "gate must be float32, float16 or bfloat16, got float64"),
        ({"gate": X.mT.contiguous().mT}, "gate must have a last stride of 1, got 3"),
        ({"up": X[0]}, r"up must have the shape of gate \[2, 3, 8\], got \[3, 8\]"),
        ({"up": X[..., :7]}, r"up must have the shape of gate \[2, 3, 8\], got \[2, 3, 7\]"),
        ({"up": X.half()}, "up must be float32, got float16"),
        ({"up": X.mT.contiguous().mT}, "up must have a last stride of 1, got 3"),
    ],
)
def test_errors(changed, message):
    with pytest.raises(RuntimeError, match=f"silu_mul: {message}"):
        ops.silu_mul(**{"gate": X, "up": X, **changed})
