import math

import pytest
import torch
from backends import capture
from emulation import KINDS
from isa_bits import hard_logits

from specextend import ops, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 2, 15, 16, 17, 100, 511, 512, 513, 2048, 5003]
INF = torch.inf


def random_logits(vocab: int, dtype=torch.float32, rows=(2, 3), scale=3.0):
    generator = torch.Generator().manual_seed(vocab)
    return (torch.randn(*rows, vocab, generator=generator) * scale).to(dtype)


def random_beam(*shape: int):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).abs().neg()


def check(logits, beam_logp, top_k, width, device="cpu"):
    """Against the reference: choices exactly, probabilities within twice fp32 torch's own error."""
    got = ops.expand_tree(logits.to(device), beam_logp.to(device), top_k=top_k, width=width)
    tokens, cand_logp, beam, beam_logp_out = (t.cpu() for t in got)
    assert [t.dtype for t in got] == [torch.int64, torch.float32, torch.int32, torch.float32]
    exact = reference.expand_tree(logits.double(), beam_logp.double(), top_k=top_k, width=width)
    plain = reference.expand_tree(logits.float(), beam_logp, top_k=top_k, width=width)
    assert torch.equal(tokens, exact[0])

    finite = exact[1] > -INF
    assert torch.equal(cand_logp > -INF, finite)
    allowed = 2 * (plain[1] - exact[1])[finite].abs().max() if finite.any() else 0.0
    error = (cand_logp - exact[1])[finite].abs()
    assert (error <= allowed + 1e-6 * (1 + exact[1][finite].abs())).all()
    assert (cand_logp[..., :-1] >= cand_logp[..., 1:]).all()

    # The beam follows from the candidates as they were rounded.
    ranked = cand_logp.flatten(1).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(beam.long(), ranked.indices[:, :width])
    assert torch.equal(beam_logp_out, ranked.values[:, :width])
    return tokens, cand_logp, beam, beam_logp_out


@pytest.mark.sweep(7)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", SIZES)
def test_random(vocab, dtype, device, schedule):
    logits, beam_logp = random_logits(vocab, dtype), random_beam(2, 3)
    for top_k in sorted({1, min(3, vocab), min(10, vocab), min(64, vocab), vocab // 2 + 1, vocab}):
        if schedule.emulated and top_k > 600 and dtype != torch.float16:
            continue  # sorting takes long
        for width in sorted({1, top_k, min(50, 3 * top_k), 3 * top_k}):
            check(logits, beam_logp, top_k, width, device)


@pytest.mark.sweep(8)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [5, 100, 513, 3000])
def test_ties(vocab, dtype, device):
    for values in (1, 2, 4):
        logits = torch.randint(0, values, (1, 4, vocab), generator=torch.Generator().manual_seed(1))
        logits = logits.to(dtype)
        for top_k in (1, min(vocab, 7), min(vocab, 60), vocab):
            check(logits, torch.zeros(1, 4), top_k, min(4 * top_k, 50), device)
            check(-logits, torch.zeros(1, 4), top_k, min(4 * top_k, 50), device)  # 0 and -0


def test_the_largest_at_every_place(device, schedule):
    vocab = 1100
    ids = torch.arange(0, vocab, 7 if schedule.emulated else 1)
    logits = random_logits(vocab, rows=(1, 1)).expand(1, len(ids), -1).clone()
    logits[0, torch.arange(len(ids)), ids] = 50.0
    beam_logp = torch.zeros(1, len(ids), device=device)
    got = ops.expand_tree(logits.to(device), beam_logp, top_k=3, width=1)
    assert torch.equal(got[0][0, :, 0].cpu(), ids)


def test_clustered_and_sorted_rows(device):
    # All of the best in one block or one lane; ascending and descending rows.
    vocab = 4000
    logits = random_logits(vocab, rows=(1, 4))
    logits[0, 0, 1000:1100] += 40
    logits[0, 1, 7::16] += 40
    logits[0, 2] = torch.arange(vocab) * 0.01
    logits[0, 3] = torch.arange(vocab) * -0.01
    for top_k in (1, 10, 100, 260, 300):
        check(logits, random_beam(1, 4), top_k, min(50, 4 * top_k), device)


def test_probabilities_of_one_and_zero(device):
    logits = torch.full((1, 3, 600), -INF)
    logits[0, 0, 321] = 5.0
    logits[0, 1, 20] = 500.0
    logits[0, 1, 21:] = 0.0
    logits[0, 2, 3:9] = 0.0
    beam_logp = torch.tensor([[0.0, -0.5, -INF]])
    tokens, logp, beam, _ = check(logits, beam_logp, 4, 12, device)
    assert tokens[0].tolist() == [[321, 0, 1, 2], [20, 21, 22, 23], [3, 4, 5, 6]]
    assert logp[0, 0].tolist() == [0.0, -INF, -INF, -INF] and logp[0, 1, 0] == -0.5
    assert (logp[0, 2] == -INF).all()
    assert beam[0, :3].tolist() == [0, 4, 5]


def test_nan_and_infinite_logits(device):
    logits = torch.zeros(1, 4, 700)
    logits[0, 0, 1:600] = torch.nan  # counts as -inf
    logits[0, 1] = torch.nan
    logits[0, 2, [4, 650]] = INF
    logits[0, 3, 600:] = -INF
    tokens, logp, _, _ = check(logits, torch.zeros(1, 4), 3, 12, device)
    assert tokens[0].tolist() == [[0, 600, 601], [0, 1, 2], [4, 650, 0], [0, 1, 2]]
    assert logp[0, 0].tolist() == pytest.approx([-math.log(101)] * 3, rel=1e-6)
    assert (logp[0, 1] == -INF).all()
    assert logp[0, 2].tolist() == pytest.approx([-math.log(2), -math.log(2), -INF], rel=1e-6)
    bad = ops.expand_tree(
        torch.zeros(1, 1, 4, device=device),
        torch.full((1, 1), torch.nan, device=device),
        top_k=4,
        width=4,
    )
    assert bad[0].tolist() == [[[0, 1, 2, 3]]] and bad[2].tolist() == [[0, 1, 2, 3]]
    assert (bad[1] == -INF).all()


def test_underflow_does_not_reach_the_logarithm(device):
    logits = torch.tensor([[[0.0, -200.0, -5000.0]]])
    _, logp, _, _ = check(logits, torch.zeros(1, 1), 3, 3, device)
    assert logp[0, 0].tolist() == [0.0, -200.0, -5000.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_is_the_same(dtype, device):
    for vocab in (100, 5003):
        logits = random_logits(vocab, dtype, rows=(2, 9)).to(device)
        beam_logp = random_beam(2, 9).to(device)
        tokens, logp, _, _ = ops.expand_tree(logits, beam_logp, top_k=20, width=5)
        for b in range(2):
            for f in range(9):
                row = logits[b, f].clone()[None, None]
                alone = ops.expand_tree(row, beam_logp[b : b + 1, f : f + 1], top_k=20, width=5)
                assert torch.equal(alone[0][0, 0], tokens[b, f])
                assert torch.equal(alone[1][0, 0], logp[b, f])


def test_any_number_of_threads():
    logits, beam_logp = random_logits(33_000, rows=(2, 7)), random_beam(2, 7)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(ops.expand_tree(logits, beam_logp, top_k=50, width=50))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype, device):
    padded = torch.full((5, 4, 6000), torch.nan, dtype=dtype)
    logits = padded.transpose(0, 1)[1:3, 2:5, 3:5006]
    logits.copy_(random_logits(5003, dtype))
    check(logits, random_beam(2, 3), 30, 40, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_device_gives_the_same_bits(dtype, device, schedule):
    if device == "cpu" and not schedule.emulated:
        pytest.skip("the CPU's results are the expected ones")
    beam_logp = random_beam(2, 3)
    for vocab in (1, 5, 100, 512, 1500):
        logits = hard_logits(dtype, vocab)
        for top_k in sorted({1, min(vocab, 10), min(vocab, 200)}):
            got = ops.expand_tree(logits.to(device), beam_logp.to(device), top_k=top_k, width=top_k)
            want = torch.ops.specextend.expand_tree(logits, beam_logp, top_k=top_k, width=top_k)
            tokens, logp, beam, beam_out = (t.cpu() for t in got)
            assert torch.equal(tokens, want[0])
            if schedule.emulated:
                assert torch.equal(logp, want[1]) and torch.equal(beam, want[2])
                assert torch.equal(beam_out, want[3])
            else:  # the logarithm of the sum is another library's: once in 10^8 the last bit
                torch.testing.assert_close(logp, want[1], rtol=1.2e-7, atol=0)


def test_any_schedule(device, schedule):
    logits, beam_logp = random_logits(1500).round().to(device), random_beam(2, 3).to(device)
    expected = ops.expand_tree(logits, beam_logp, top_k=150, width=100)
    for kind in KINDS:
        with schedule(kind=kind, seed=3, multiprocessors=2):
            got = ops.expand_tree(logits, beam_logp, top_k=150, width=100)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_graph_replay(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    logits, beam_logp = random_logits(5003).to(device), random_beam(2, 3).to(device)
    graph, captured = capture(lambda: ops.expand_tree(logits, beam_logp, top_k=10, width=20))
    logits.copy_(logits.flip(-1))
    beam_logp -= 1
    graph.replay()
    expected = ops.expand_tree(logits, beam_logp, top_k=10, width=20)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_empty_batch(device):
    logits, beam_logp = torch.zeros(0, 3, 9, device=device), torch.zeros(0, 3, device=device)
    got = ops.expand_tree(logits, beam_logp, top_k=4, width=5)
    assert [t.shape for t in got] == [(0, 3, 4), (0, 3, 4), (0, 5), (0, 5)]


@pytest.mark.not_emulated("the registered op is asked")
def test_opcheck(device):
    torch.library.opcheck(
        torch.ops.specextend.expand_tree.default,
        (random_logits(50).to(device), random_beam(2, 3).to(device)),
        {"top_k": 4, "width": 7},
    )


LOGITS = torch.zeros(2, 3, 5)
BEAM = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("logits", "beam_logp", "top_k", "width", "message"),
    [
        (LOGITS[0], BEAM, 1, 1, r"logits must be \[B, F, V\], got \[3, 5\]"),
        (LOGITS.double(), BEAM, 1, 1, "logits must be float32, float16 or bfloat16, got float64"),
        (LOGITS.mT, BEAM, 1, 1, "logits must have a last stride of 1, got 5"),
        (LOGITS[:, :0], BEAM, 1, 1, "the number of frontier nodes F must be in .*, got 0"),
        (LOGITS, BEAM[:1], 1, 1, r"beam_logp must have shape \[2, 3\], got \[1, 3\]"),
        (LOGITS, BEAM.double(), 1, 1, "beam_logp must be float32, got float64"),
        (LOGITS, torch.zeros(3, 2).mT, 1, 1, "beam_logp must be contiguous"),
        (LOGITS, BEAM, 0, 1, r"top_k must be in \[1, 5\], got 0"),
        (LOGITS, BEAM, 6, 1, r"top_k must be in \[1, 5\], got 6"),
        (LOGITS, BEAM, 2, 0, r"width must be in \[1, 6\], got 0"),
        (LOGITS, BEAM, 2, 7, r"width must be in \[1, 6\], got 7"),
    ],
)
def test_errors(logits, beam_logp, top_k, width, message):
    with pytest.raises(RuntimeError, match=f"expand_tree: {message}"):
        ops.expand_tree(logits, beam_logp, top_k=top_k, width=width)
