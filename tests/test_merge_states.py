import math

import pytest
import torch
from backends import capture
from kv_cases import DTYPES, run_with_threads, same_bits

from specextend import ops, reference

INF = torch.inf


def attend(q, k, v):
    """Softmax attention of [rows, D] over [keys, D] in fp64: output and log-sum-exp."""
    logits = q @ k.mT
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def random_states(shape, dtype=torch.float32, device="cpu", seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    states = []
    for _ in range(2):
        states.append(torch.randn(shape, generator=generator).to(device, dtype))
        lse = spread * torch.randn(shape[:-1], generator=generator)
        states.append(lse.to(device))
    return states


def check(states):
    o, lse = ops.merge_states(*states)
    exact, exact_lse = reference.merge_states(*(t.double() for t in states))
    plain, plain_lse = reference.merge_states(*states)
    assert o.dtype == states[0].dtype and lse.dtype == torch.float32
    assert o.isfinite().all() and not lse.isnan().any()
    for got, want, roughly in ((o, exact, plain), (lse, exact_lse, plain_lse)):
        seen = want.isfinite()
        assert torch.equal(got[~seen].double(), want[~seen])
        if seen.any():
            error = (got.double() - want)[seen].abs().max()
            assert error <= 2 * (roughly.double() - want)[seen].abs().max() + 1e-6
    return o, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1,), (7,), (1, 1), (5, 3), (2, 3, 4, 64), (2, 9, 5, 80), (257, 128), (3, 1000)]
)
def test_random(shape, dtype, device):
    for seed, spread in enumerate([0.1, 3.0, 100.0, 1e4]):
        check(random_states(shape, dtype, device, seed, spread))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mark", [-INF, INF])
def test_empty_parts_are_not_read(mark, dtype, device):
    """One in ten is empty on either side, some on both; what they hold is NaN or infinite."""
    states = random_states((300, 16), dtype, device)
    generator = torch.Generator().manual_seed(1)
    empty = [torch.rand(300, generator=generator).to(device) < 0.1 for _ in range(2)]
    empty[0][:5] = empty[1][:5] = True
    for o, lse, mask in zip(states[::2], states[1::2], empty, strict=True):
        o[mask] = torch.tensor([torch.nan, INF, -INF, 1.0], dtype=dtype, device=device).repeat(4)
        lse[mask] = mark
    o, lse = check(states)
    both, only_a, only_b = empty[0] & empty[1], empty[1] & ~empty[0], empty[0] & ~empty[1]
    assert both.sum() >= 5 and only_a.sum() > 5 and only_b.sum() > 5
    assert (o[both] == 0).all() and (lse[both] == -INF).all()
    for only, i in ((only_a, 0), (only_b, 2)):
        assert same_bits(o[only], states[i][only]) and same_bits(lse[only], states[i + 1][only])


@pytest.mark.parametrize("marks", [(-INF, -INF), (INF, -INF), (-INF, INF), (INF, INF)])
def test_both_empty(marks, device):
    o = torch.full((2, 8), torch.nan, device=device)
    lse = [torch.full((2,), mark, device=device) for mark in marks]
    got, got_lse = ops.merge_states(o, lse[0], o, lse[1])
    assert (got == 0).all() and (got_lse == -INF).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_halves(dtype, device):
    o, lse, _, _ = random_states((40, 24), dtype, device)
    merged, merged_lse = ops.merge_states(o, lse, o, lse)
    assert same_bits(merged, o)
    torch.testing.assert_close(merged_lse, lse + math.log(2), rtol=0, atol=1e-6)


def test_order_does_not_matter(device):
    a, b, c, d = random_states((100, 33), torch.float16, device)
    for one, two in zip(ops.merge_states(a, b, c, d), ops.merge_states(c, d, a, b), strict=True):
        assert same_bits(one, two)


@pytest.mark.parametrize("split", [0, 1, 17, 49, 50])
def test_split_attention_is_attention(split, device):
    """A prefix and a tree, merged, are attention over both; also as the gate of SpecExtend."""
    generator = torch.Generator().manual_seed(split)
    q, k, v = (torch.randn(n, 16, generator=generator).double() for n in (9, 50, 50))
    want, want_lse = attend(q, k, v)
    parts = [*attend(q, k[:split], v[:split]), *attend(q, k[split:], v[split:])]
    o, lse = ops.merge_states(*(t.float().to(device) for t in parts))
    torch.testing.assert_close(o.cpu().double(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=0, atol=2e-6)
    if 0 < split < 50:
        gate = torch.sigmoid(parts[1] - parts[3])[:, None]  # O4
        gated = parts[0] * gate + parts[2] * (1 - gate)
        torch.testing.assert_close(o.cpu().double(), gated, rtol=0, atol=1e-6)


def test_many_parts_in_any_order(device):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 8, generator=generator).double() for n in (5, 60, 60))
    want, want_lse = attend(q, k, v)
    parts = [attend(q, k[i : i + 7], v[i : i + 7]) for i in range(0, 60, 7)]
    parts = [tuple(t.float().to(device) for t in part) for part in parts]
    while len(parts) > 1:
        parts.append(ops.merge_states(*parts.pop(0), *parts.pop(0)))
    torch.testing.assert_close(parts[0][0].cpu().double(), want, rtol=0, atol=2e-6)
    torch.testing.assert_close(parts[0][1].cpu().double(), want_lse, rtol=0, atol=5e-6)


def test_far_apart(device):
    """The weight of the smaller part underflows; nothing overflows."""
    o = torch.tensor([[1.0], [2.0], [3.0]], device=device)
    near, far = torch.tensor([3e38, 0.0, -3e38], device=device), torch.zeros(3, device=device)
    got, lse = ops.merge_states(o, near, -o, far)
    assert got.flatten().tolist() == [1.0, 0.0, -3.0]
    torch.testing.assert_close(lse, torch.tensor([3e38, math.log(2), 0.0], device=device))


def test_rows_do_not_depend_on_each_other(device):
    states = random_states((60, 48), torch.bfloat16, device)
    o, lse = ops.merge_states(*states)
    for row in range(60):
        alone, alone_lse = ops.merge_states(*(t[row : row + 1].clone() for t in states))
        assert same_bits(alone[0], o[row]) and same_bits(alone_lse[0], lse[row])


def moved(t, elements):
    """Copy it, contiguous, that many elements behind memory that is aligned."""
    memory = torch.empty(t.numel() + elements, dtype=t.dtype, device=t.device)
    return memory[elements:].view(t.shape).copy_(t)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_memory(dtype, device):
    """Every offset below 16 bytes of each input runs: a wide load may begin at some alone."""
    states = random_states((50, 64), dtype, device)
    expected = ops.merge_states(*states)
    for offset in range(16 // dtype.itemsize):
        for places in ([offset, 1, 0, 0], [0, 0, offset, 1], [offset, 0, offset, 0]):
            got = ops.merge_states(*map(moved, states, places))
            assert all(map(same_bits, got, expected)), places


def test_graph_replay(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    states = random_states((20, 64), torch.float16, device)
    graph, captured = capture(lambda: ops.merge_states(*states))
    for state, other in zip(states, random_states((20, 64), torch.float16, device, 1), strict=True):
        state.copy_(other)
    graph.replay()
    for got, want in zip(captured, ops.merge_states(*states), strict=True):
        assert same_bits(got, want)


def test_thread_count_does_not_matter():
    states = random_states((3, 500, 8, 64))
    one = run_with_threads(1, lambda: ops.merge_states(*states))
    two = run_with_threads(2, lambda: ops.merge_states(*states))
    assert all(same_bits(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8)])
def test_no_elements(shape, device):
    o, lse = ops.merge_states(*random_states(shape, device=device))
    assert o.shape == shape and lse.shape == shape[:-1]
    if shape == (3, 0):
        assert lse.isfinite().all()


@pytest.mark.not_emulated("the registered op is asked")
def test_opcheck(device):
    for dtype in DTYPES:
        states = random_states((3, 5, 16), dtype, device)
        torch.library.opcheck(torch.ops.specextend.merge_states.default, states)


OUT, LSE = torch.zeros(3, 4, 8), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"o_a": torch.zeros(())}, r"o_a must be \[\.\.\., D\], got \[\]"),
        ({"o_a": OUT.double()}, "o_a must be float32, float16 or bfloat16, got float64"),
        ({"o_b": OUT.half()}, "o_b must be float32, got float16"),
        ({"o_b": OUT[:2]}, r"o_b must have the shape of o_a \[3, 4, 8\], got \[2, 4, 8\]"),
        ({"o_a": OUT.mT.contiguous().mT}, "o_a must be contiguous"),
        ({"o_b": OUT.mT.contiguous().mT}, "o_b must be contiguous"),
        ({"lse_a": LSE.double()}, "lse_a must be float32, got float64"),
        ({"lse_b": LSE.half()}, "lse_b must be float32, got float16"),
        ({"lse_a": LSE.mT.contiguous().mT}, "lse_a must be contiguous"),
        (
            {"lse_a": LSE[:2]},
            r"lse_a must have the shape of o_a without its last dimension \[3, 4, 8\], "
            r"got \[2, 4\]",
        ),
        (
            {"lse_b": OUT},
            r"lse_b must have the shape of o_b without its last dimension \[3, 4, 8\], "
            r"got \[3, 4, 8\]",
        ),
    ],
)
def test_errors(changed, message):
    arguments = {"o_a": OUT, "lse_a": LSE, "o_b": OUT, "lse_b": LSE}
    with pytest.raises(RuntimeError, match=f"merge_states: {message}"):
        ops.merge_states(**{**arguments, **changed})
