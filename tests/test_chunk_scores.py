import math

import pytest
import torch
from backends import capture

from specextend import ops, reference

INF, NAN = torch.inf, torch.nan


def lse_of(logits: torch.Tensor, prefix: int, chunk_size: int, num_chunks: int):
    """Sum [..., keys] logits, the first `prefix` in chunks, to (chunk_lse [..., C], lse [...])."""
    padded = logits.new_full((*logits.shape[:-1], num_chunks * chunk_size), -INF)
    padded[..., :prefix] = logits[..., :prefix]
    chunk_lse = padded.unflatten(-1, (num_chunks, chunk_size)).logsumexp(-1)
    return chunk_lse, logits.logsumexp(-1)


def random_case(seed=0, batch=2, rows=3, heads=4, chunk_size=8, capacity=100, tree=3, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    prefix_lens = torch.randint(0, capacity - tree + 1, (batch,), generator=generator)
    num_chunks = -(-capacity // chunk_size)
    chunk_lse, lse = [], []
    for prefix in prefix_lens.tolist():
        logits = torch.randn(rows, heads, prefix + tree, generator=generator).double() * scale
        c, l = lse_of(logits, prefix, chunk_size, num_chunks)  # noqa: E741
        chunk_lse.append(c)
        lse.append(l)
    picked = torch.randint(0, rows, (batch,), generator=generator)
    return torch.stack(chunk_lse), torch.stack(lse), picked.int(), prefix_lens.int()


def score(chunk_lse, lse, rows, prefix_lens, device="cpu", **options):
    arguments = (chunk_lse.float(), lse.float(), rows, prefix_lens)
    return ops.chunk_scores(*(t.to(device) for t in arguments), **options).cpu()


@pytest.mark.sweep(49)
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("capacity", [3, 64, 100, 1000])
@pytest.mark.parametrize("chunk_size", [1, 7, 8, 64, 5000])
def test_random(capacity, chunk_size, reduce, device):
    for seed in range(6):
        case = random_case(seed, chunk_size=chunk_size, capacity=capacity, heads=1 + 5 * (seed % 2))
        got = score(*case, device=device, chunk_size=chunk_size, reduce=reduce)
        want = reference.chunk_scores(*case, chunk_size=chunk_size, reduce=reduce)
        plain = [t.float() if t.is_floating_point() else t for t in case]
        plain = reference.chunk_scores(*plain, chunk_size=chunk_size, reduce=reduce)
        error, allowed = (got - want).abs().max(), (plain - want).abs().max()
        assert error <= 2 * allowed + 1e-7
        if reduce == "mean":
            torch.testing.assert_close(got.sum(-1), torch.ones(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_against_the_dense_softmax(reduce, device):
    """O5: the softmax of the row over all keys; the tree's own keys count where they will lie."""
    generator = torch.Generator().manual_seed(1)
    for chunk_size, prefix, tree in [(1, 20, 1), (8, 61, 2), (8, 64, 5), (32, 70, 1), (16, 0, 4)]:
        logits = torch.randn(1, 2, 6, prefix + tree, generator=generator).double() * 2
        num_chunks = -(-(prefix + tree) // chunk_size) + 2
        chunk_lse, lse = lse_of(logits, prefix, chunk_size, num_chunks)
        rows = torch.tensor([1], dtype=torch.int32)
        prefix_lens = torch.tensor([prefix], dtype=torch.int32)
        got = score(chunk_lse, lse, rows, prefix_lens, device, chunk_size=chunk_size, reduce=reduce)
        probs = logits[0, 1].softmax(-1)
        mass = torch.zeros(6, num_chunks, dtype=torch.float64)
        for key in range(prefix + tree):
            mass[:, min(key, prefix) // chunk_size] += probs[:, key]
        want = mass.mean(0) if reduce == "mean" else mass.amax(0)
        torch.testing.assert_close(got[0].double(), want, rtol=0, atol=1e-6)


def test_selection_is_that_of_the_paper(device):
    """O6: last accepted row, mean over heads, mean per chunk; the same best chunks.

    The mean over a chunk's keys orders whole chunks as their mass does.
    """
    generator = torch.Generator().manual_seed(2)
    chunk_size, num_chunks, heads = 32, 64, 8
    logits = torch.randn(1, 4, heads, chunk_size * num_chunks, generator=generator).double() * 2
    chunk_lse, lse = lse_of(logits, logits.shape[-1], chunk_size, num_chunks)
    rows = torch.tensor([2], dtype=torch.int32)
    lens = torch.tensor([logits.shape[-1]], dtype=torch.int32)
    scores = score(chunk_lse, lse, rows, lens, device, chunk_size=chunk_size)
    papers = logits[0, 2].softmax(-1).mean(0).view(num_chunks, chunk_size).mean(-1)
    torch.testing.assert_close(scores[0].double() / chunk_size, papers, rtol=0, atol=1e-8)
    ids, _ = ops.select_chunks(scores.to(device), lens.to(device), chunk_size=32, budget=16)
    assert ids[0].tolist() == sorted(papers.topk(16).indices.tolist())


def test_from_tree_attention(device):
    generator = torch.Generator().manual_seed(3)
    batch, rows, heads, kv_heads, dim, capacity, chunk_size = 2, 3, 4, 2, 64, 90, 16
    q = torch.randn(batch, rows, heads, dim, generator=generator)
    k = torch.randn(batch, capacity, kv_heads, dim, generator=generator)
    prefix_lens = torch.tensor([70, 33], dtype=torch.int32)
    q, k, prefix_lens = (t.to(device) for t in (q, k, prefix_lens))
    _, lse, chunk_lse = ops.tree_attention(q, k, k, prefix_lens, chunk_size=chunk_size)
    picked = torch.tensor([2, 1], dtype=torch.int32, device=device)
    got = ops.chunk_scores(chunk_lse, lse, picked, prefix_lens, chunk_size=chunk_size).cpu()
    q, k = q.cpu(), k.cpu()
    for b, (prefix, row) in enumerate([(70, 2), (33, 1)]):
        keys = k[b, : prefix + row + 1].repeat_interleave(heads // kv_heads, 1).double()
        probs = torch.einsum("hd,khd->hk", q[b, row].double(), keys).div(math.sqrt(dim)).softmax(-1)
        want = torch.zeros(got.shape[1], dtype=torch.float64)
        for key, p in enumerate(probs.mean(0)):
            want[min(key, prefix) // chunk_size] += p
        torch.testing.assert_close(got[b].double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_what_is_behind_the_tree_is_not_read(reduce, device):
    chunk_lse, lse, rows, prefix_lens = random_case(4, capacity=200)
    clean = score(chunk_lse, lse, rows, prefix_lens, device, chunk_size=8, reduce=reduce)
    for b in range(2):
        chunk_lse[b, :, :, prefix_lens[b] // 8 + 1 :] = NAN
        for row in range(3):
            if row != rows[b]:
                chunk_lse[b, row] = NAN
                lse[b, row] = NAN
    poisoned = score(chunk_lse, lse, rows, prefix_lens, device, chunk_size=8, reduce=reduce)
    assert torch.equal(clean, poisoned)


def test_heads_and_chunks_that_see_nothing(device):
    log = math.log
    # Four heads over three chunks, prefix of 5 in chunks of 2: the third holds the first tree key.
    chunk_lse = torch.tensor(
        [[[[log(0.5), -INF, log(0.25)], [NAN, INF, -INF], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]]
    )
    lse = torch.tensor([[[0.0, 0.0, -INF, INF]]])
    arguments = (chunk_lse, lse, torch.zeros(1).int(), torch.tensor([5]).int())
    got = score(*arguments, device=device, chunk_size=2)
    torch.testing.assert_close(got, torch.tensor([[0.125, 0.0, 0.375]]))
    got = score(*arguments, device=device, chunk_size=2, reduce="max")
    torch.testing.assert_close(got, torch.tensor([[0.5, 0.0, 1.0]]))


def test_a_mass_above_one_by_rounding_leaves_nothing(device):
    chunk_lse = torch.tensor([[[[0.0, 1e-6, -INF]]]])
    lse = torch.tensor([[[math.log(2.0)]]])
    got = score(chunk_lse, lse, torch.zeros(1).int(), torch.tensor([4]).int(), device, chunk_size=2)
    assert got[0, 2] == 0 and got[0, 0] == pytest.approx(0.5)


@pytest.mark.parametrize("prefix", [-3, 0, 1, 15, 16, 17, 100, 2**31 - 1])
def test_the_chunk_of_the_first_tree_key(prefix, device):
    chunk_lse, lse = torch.full((1, 1, 2, 4), -INF), torch.zeros(1, 1, 2)
    prefix_lens = torch.tensor([prefix], dtype=torch.int32)
    got = score(chunk_lse, lse, torch.zeros(1).int(), prefix_lens, device, chunk_size=8)
    want = [0.0] * 4
    if max(prefix, 0) // 8 < 4:
        want[max(prefix, 0) // 8] = 1.0
    assert got[0].tolist() == want


@pytest.mark.parametrize(("row", "read"), [(-(2**31), 0), (-1, 0), (2, 2), (3, 2), (2**31 - 1, 2)])
def test_rows_are_clamped(row, read, device):
    chunk_lse, lse, _, prefix_lens = random_case(5)
    got = score(chunk_lse, lse, torch.full((2,), row).int(), prefix_lens, device, chunk_size=8)
    want = score(chunk_lse, lse, torch.full((2,), read).int(), prefix_lens, device, chunk_size=8)
    assert torch.equal(got, want)


def test_strides(device):
    chunk_lse, lse, rows, prefix_lens = random_case(6, heads=3, capacity=300)
    wide = torch.full((3, 5, 2, chunk_lse.shape[-1] + 3), NAN)
    view = wide.permute(2, 0, 1, 3)[:, :, 1:4, 2:-1]
    view.copy_(chunk_lse)
    wide_lse = torch.full((3, 2, 7), NAN)
    lse_view = wide_lse.transpose(0, 1)[:, :, 3:6]
    lse_view.copy_(lse)
    got = ops.chunk_scores(
        view.to(device), lse_view.to(device), rows.to(device), prefix_lens.to(device), chunk_size=8
    )
    assert torch.equal(got.cpu(), score(chunk_lse, lse, rows, prefix_lens, device, chunk_size=8))


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_a_sequence_alone_is_the_same_on_any_number_of_threads(reduce):
    case = random_case(7, batch=8, heads=8, chunk_size=1, capacity=5000, tree=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = score(*case, chunk_size=1, reduce=reduce)
        torch.set_num_threads(1)
        for b in range(8):
            alone = score(*(t[b : b + 1] for t in case), chunk_size=1, reduce=reduce)
            assert torch.equal(alone[0], together[b])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize(("heads", "capacity"), [(1, 33), (9, 1100), (70, 40)])
def test_many_heads_and_chunks(heads, capacity, reduce, device, schedule):
    """More heads than warps, more tiles of chunks than lanes; alone as in a batch."""
    case = random_case(9, batch=2, rows=1, heads=heads, chunk_size=1, capacity=capacity, tree=2)
    got = score(*case, device=device, chunk_size=1, reduce=reduce)
    want = reference.chunk_scores(*case, chunk_size=1, reduce=reduce)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
    for kind in ("ahead", "behind"):
        with schedule(kind=kind):
            for b in range(2):
                alone = [t[b : b + 1] for t in case]
                alone = score(*alone, device=device, chunk_size=1, reduce=reduce)
                assert torch.equal(alone[0], got[b])


def test_graph_replay_with_other_lengths(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    cases = [random_case(seed) for seed in range(4)]
    cases = [[t.float() if t.is_floating_point() else t for t in case] for case in cases]
    cases = [[t.to(device) for t in case] for case in cases]
    arguments = [t.clone() for t in cases[0]]
    graph, captured = capture(lambda: ops.chunk_scores(*arguments, chunk_size=8))
    for case in cases:
        for argument, value in zip(arguments, case, strict=True):
            argument.copy_(value)
        graph.replay()
        assert torch.equal(captured, ops.chunk_scores(*case, chunk_size=8))


def test_empty(device):
    got = score(
        torch.zeros(2, 1, 1, 0),
        torch.zeros(2, 1, 1),
        torch.zeros(2).int(),
        torch.zeros(2).int(),
        device,
        chunk_size=4,
    )
    assert got.shape == (2, 0)


@pytest.mark.not_emulated("the registered op is asked")
def test_opcheck(device):
    chunk_lse, lse, rows, prefix_lens = random_case(8)
    arguments = (chunk_lse.float(), lse.float(), rows, prefix_lens)
    torch.library.opcheck(
        torch.ops.specextend.chunk_scores.default,
        tuple(t.to(device) for t in arguments),
        {"chunk_size": 8, "reduce": "max"},
    )


CHUNK_LSE = torch.zeros(2, 3, 4, 5)
LSE = torch.zeros(2, 3, 4)
INTS = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("chunk_lse", "lse", "rows", "prefix_lens", "options", "message"),
    [
        (CHUNK_LSE[0], LSE, INTS, INTS, {}, r"chunk_lse must be \[B, M, Hq, C\], got \[3, 4, 5\]"),
        (CHUNK_LSE.half(), LSE, INTS, INTS, {}, "chunk_lse must be float32, got float16"),
        (CHUNK_LSE.mT, LSE, INTS, INTS, {}, "chunk_lse must have a last stride of 1, got 5"),
        (CHUNK_LSE[:, :0], LSE, INTS, INTS, {}, "the number of rows M must be in .*, got 0"),
        (CHUNK_LSE, LSE[:, :2], INTS, INTS, {}, r"lse must have shape .*, got \[2, 2, 4\]"),
        (CHUNK_LSE, LSE.double(), INTS, INTS, {}, "lse must be float32, got float64"),
        (CHUNK_LSE, LSE, INTS[:1], INTS, {}, r"rows must have shape \[2\], got \[1\]"),
        (CHUNK_LSE, LSE, INTS.long(), INTS, {}, "rows must be int32, got int64"),
        (CHUNK_LSE, LSE, INTS, INTS.long(), {}, "prefix_lens must be int32, got int64"),
        (CHUNK_LSE, LSE, INTS, INTS, {"chunk_size": 0}, r"chunk_size must be in \[1, .*\], got 0"),
        (CHUNK_LSE, LSE, INTS, INTS, {"reduce": "sum"}, "reduce must be mean or max, got sum"),
    ],
)
def test_errors(chunk_lse, lse, rows, prefix_lens, options, message):
    with pytest.raises(RuntimeError, match=f"chunk_scores: {message}"):
        ops.chunk_scores(chunk_lse, lse, rows, prefix_lens, **{"chunk_size": 8, **options})


def random_keys(
    seed, dtype=torch.float32, batch=2, rows=3, heads=4, kv_heads=2, dim=64, capacity=90
):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, rows, heads, dim, generator=generator).to(dtype)
    k = torch.randn(batch, capacity, kv_heads, dim, generator=generator).to(dtype)
    picked = torch.randint(0, rows, (batch,), generator=generator).int()
    lens = torch.randint(1, capacity + 1, (batch,), generator=generator).int()
    return q, k, picked, lens


def check_keys(q, k, rows, lens, device="cpu", **options):
    got = ops.chunk_scores_keys(*(t.to(device) for t in (q, k, rows, lens)), **options).cpu()
    want = reference.chunk_scores_keys(q.double(), k.double(), rows, lens, **options)
    plain = reference.chunk_scores_keys(q, k, rows, lens, **options)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= 2 * (plain - want).abs().max() + 1e-6
    return got


@pytest.mark.sweep(8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [1, 7, 32, 64, 1000])
def test_keys(chunk_size, dtype, device):
    for seed, (heads, kv_heads, dim, capacity) in enumerate(
        [
            (4, 2, 64, 90),
            (1, 1, 8, 3),
            (6, 2, 80, 1),
            (8, 1, 128, 1300),
            (3, 3, 256, 257),
            (4, 1, 576, 140),
        ]
    ):
        case = random_keys(seed, dtype, heads=heads, kv_heads=kv_heads, dim=dim, capacity=capacity)
        got = check_keys(*case, device=device, chunk_size=chunk_size)
        torch.testing.assert_close(got.sum(-1), torch.ones(2), rtol=0, atol=1e-4)
        check_keys(*case, device=device, chunk_size=chunk_size, reduce="max")


@pytest.mark.parametrize("window", [1, 16, 40, 500])
def test_keys_with_window_softcap_and_scale(window, device):
    case = random_keys(9)
    check_keys(*case, device=device, chunk_size=16, window=window, softcap=5.0, scale=0.3)
    got = check_keys(*case, device=device, chunk_size=16, window=window)
    for b, length in enumerate(case[3].tolist()):
        assert (got[b, : max(length - window, 0) // 16] == 0).all()


def test_keys_that_do_not_exist(device):
    """Behind the last key nothing is read and scores are 0; without keys they all are."""
    q, k, rows, _ = random_keys(10, batch=6, capacity=64)
    lens = torch.tensor([-5, 0, 1, 32, 63, 2**31 - 1], dtype=torch.int32)
    clean = check_keys(q, k, rows, lens, device, chunk_size=16)
    for b, length in enumerate(lens.clamp(0, 64).tolist()):
        k[b, length:] = NAN
        assert (clean[b, -(-length // 16) :] == 0).all()
        assert clean[b].sum() == pytest.approx(float(length > 0), abs=1e-5)
        q[b, [row for row in range(3) if row != rows[b]]] = NAN
    poisoned = ops.chunk_scores_keys(*(t.to(device) for t in (q, k, rows, lens)), chunk_size=16)
    assert torch.equal(poisoned.cpu(), clean)


@pytest.mark.parametrize(("row", "read"), [(-(2**31), 0), (-1, 0), (3, 2), (2**31 - 1, 2)])
def test_keys_seen_by_rows_that_do_not_exist(row, read, device):
    """The nearest row that does exist stands in."""
    q, k, rows, lens = random_keys(12)
    q, k, lens = (t.to(device) for t in (q, k, lens))
    got, want = (
        ops.chunk_scores_keys(q, k, torch.full_like(rows, r).to(device), lens, chunk_size=16)
        for r in (row, read)
    )
    assert torch.equal(got, want)


def test_keys_agree_with_the_by_product(device):
    """After compaction the keys are those that the accepted row saw in the tree."""
    q, k, _, _ = random_keys(11, batch=1, capacity=200)
    prefix_lens, rows = torch.tensor([150]).int(), torch.tensor([2]).int()
    q, k, prefix_lens, rows = (t.to(device) for t in (q, k, prefix_lens, rows))
    _, lse, chunk_lse = ops.tree_attention(q, k, k, prefix_lens, chunk_size=50)
    one = ops.chunk_scores(chunk_lse, lse, rows, prefix_lens, chunk_size=50)
    other = ops.chunk_scores_keys(q, k, rows, prefix_lens + 3, chunk_size=50)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_keys_strides(device):
    q, k, rows, lens = random_keys(12, torch.bfloat16)
    wide_q = torch.full((2, 4, 3, 70), NAN, dtype=q.dtype).transpose(1, 2)[..., 3:67]
    wide_k = torch.full((2, 2, 90, 70), NAN, dtype=q.dtype).transpose(1, 2)[..., 3:67]
    wide_q.copy_(q)
    wide_k.copy_(k)
    got = check_keys(wide_q, wide_k, rows, lens, device, chunk_size=16)
    assert torch.equal(got, check_keys(q, k, rows, lens, device, chunk_size=16))


def test_keys_of_a_sequence_alone_on_any_number_of_threads():
    case = random_keys(13, batch=3, capacity=3000, heads=8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = ops.chunk_scores_keys(*case, chunk_size=32)
        torch.set_num_threads(1)
        for b in range(3):
            alone = ops.chunk_scores_keys(*(t[b : b + 1] for t in case), chunk_size=32)
            assert torch.equal(alone[0], together[b])
    finally:
        torch.set_num_threads(threads)


def test_keys_graph_replay_with_other_lengths(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    cases = [[t.to(device) for t in random_keys(seed, torch.bfloat16)] for seed in range(4)]
    arguments = [t.clone() for t in cases[0]]
    graph, captured = capture(lambda: ops.chunk_scores_keys(*arguments, chunk_size=16))
    for case in cases:
        for argument, value in zip(arguments, case, strict=True):
            argument.copy_(value)
        graph.replay()
        assert torch.equal(captured, ops.chunk_scores_keys(*case, chunk_size=16))


@pytest.mark.not_emulated("the registered op is asked")
def test_keys_opcheck(device):
    torch.library.opcheck(
        torch.ops.specextend.chunk_scores.keys,
        tuple(t.to(device) for t in random_keys(14)),
        {"chunk_size": 16, "scale": 0.5},
    )


Q = torch.zeros(2, 3, 4, 16)
K = torch.zeros(2, 9, 2, 16)


@pytest.mark.parametrize(
    ("q", "k", "rows", "lens", "options", "message"),
    [
        (Q[0], K, INTS, INTS, {}, r"q must be \[B, M, Hq, D\], got \[3, 4, 16\]"),
        (Q, K[0], INTS, INTS, {}, r"k must be \[B, S, Hkv, D\], got \[9, 2, 16\]"),
        (Q.double(), K, INTS, INTS, {}, "q must be float32, float16 or bfloat16, got float64"),
        (Q, K.half(), INTS, INTS, {}, "k must be float32, got float16"),
        (Q, K[..., :8], INTS, INTS, {}, r"k must have shape \[2, 9, 2, 16\], got \[2, 9, 2, 8\]"),
        (Q[:, :0], K, INTS, INTS, {}, "the number of rows M must be in .*, got 0"),
        (
            Q[..., :4],
            K[..., :4],
            INTS,
            INTS,
            {},
            "the head dimension of q and k must be a .* 576.* 4",
        ),
        (Q[:, :, :3], K, INTS, INTS, {}, "the heads of q must be a multiple of .*, got 3 and 2"),
        (Q.mT.contiguous().mT, K, INTS, INTS, {}, "q must have a last stride of 1, got 4"),
        (Q, K.mT.contiguous().mT, INTS, INTS, {}, "k must have a last stride of 1, got 2"),
        (Q, K, INTS.long(), INTS, {}, "rows must be int32, got int64"),
        (Q, K, INTS, INTS[:1], {}, r"lens must have shape \[2\], got \[1\]"),
        (Q, K, INTS, INTS, {"chunk_size": 0}, r"chunk_size must be in \[1, .*\], got 0"),
        (Q, K, INTS, INTS, {"window": -1}, r"window must be in \[0, .*\], got -1"),
        (Q, K, INTS, INTS, {"softcap": -1.0}, "softcap must be finite and not negative, got -1"),
        (Q, K, INTS, INTS, {"scale": INF}, "scale must be finite, got inf"),
        (Q, K, INTS, INTS, {"reduce": "sum"}, "reduce must be mean or max, got sum"),
    ],
)
def test_keys_errors(q, k, rows, lens, options, message):
    with pytest.raises(RuntimeError, match=f"chunk_scores.keys: {message}"):
        ops.chunk_scores_keys(q, k, rows, lens, **{"chunk_size": 8, **options})
