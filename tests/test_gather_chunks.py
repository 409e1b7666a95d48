import random

import pytest
import torch
from backends import capture, for_each
from kv_cases import DTYPES, LAYOUTS, Guarded, int32, run_with_threads, same_bits

from specextend import ops, reference


class Case:
    """Caches of some layers and a selection, to be gathered by the op and by the reference."""

    def __init__(
        self,
        *,
        lens=(150, 97),
        capacity=160,
        room=64,
        chunk_size=8,
        budget=6,
        dims=((2, 8, 8), (3, 16, 4)),  # Hkv, D of keys, D of values
        pairs=4,
        full_layout="bhsd",
        work_layout="bshd",
        dtype=torch.float32,
        device="cpu",
        seed=0,
        **options,
    ):
        rng = random.Random(seed)
        batch = len(lens)

        def cache(layout, rows, which, i):
            heads, *dim = dims[i]
            return Guarded(layout, batch, rows, heads, dim[which], dtype, device, 10 * i + which)

        layers = range(len(dims))
        self.full = [
            [cache(full_layout, capacity, w, i).poison(lens) for i in layers] for w in (0, 1)
        ]
        self.work = [[cache(work_layout, room, w, i) for i in layers] for w in (0, 1)]
        ids, counts = [], []
        for length in lens:
            last = (min(length, capacity) - 1) // chunk_size
            chosen = rng.sample(range(last), min(budget - 1, last)) if last > 0 else []
            chosen = sorted(chosen + [last] if length else [])
            ids.append(chosen + [rng.choice([-1, 2**31 - 1])] * (budget - len(chosen)))
            counts.append(len(chosen))
        self.ids, self.counts, self.lens = (int32(x, device) for x in (ids, counts, list(lens)))
        self.inv_freq = None
        if pairs:
            base = 10000 + 1000 * torch.arange(len(dims))[:, None]
            self.inv_freq = (base ** (-torch.arange(pairs) / pairs)).to(device)
        self.options = {"chunk_size": chunk_size, **options}

    def run(self, gather=ops.gather_chunks, inv_freq="own"):
        caches = [[c.t for c in layers] for layers in (*self.full, *self.work)]
        inv_freq = self.inv_freq if inv_freq == "own" else inv_freq
        return gather(*caches, self.ids, self.counts, self.lens, inv_freq, **self.options)

    def wanted(self):
        """Return (work_lens, K and V of the working caches in fp64, both in the op's dtype)."""
        results = []
        for dtype in (torch.float64, self.work[0][0].t.dtype):
            # Copies also of what has this dtype: the op has to fill the caches, not the reference.
            work = [[c.t.to(dtype, copy=True) for c in layers] for layers in self.work]
            full = [[c.t.to(dtype) for c in layers] for layers in self.full]
            lens = reference.gather_chunks(
                *full, *work, self.ids, self.counts, self.lens, self.inv_freq, **self.options
            )
            results.append(work)
        return lens, *results

    def check(self):
        want_lens, exact, plain = self.wanted()
        before = [[c.twin() for c in layers] for layers in self.work]
        full = [[c.twin() for c in layers] for layers in self.full]
        work_lens = self.run()
        assert torch.equal(work_lens, want_lens) and work_lens.dtype == torch.int32
        for got, twin in zip(sum(self.full, []), sum(full, []), strict=True):
            assert same_bits(got.base, twin.base)
        for k, want, roughly, twin in zip(self.work[0], exact[0], plain[0], before[0], strict=True):
            # The self-scaling bound, and half a unit in the last place besides fp32 rounding.
            error = (k.t.double() - want).abs()
            allowed = 2 * (roughly.double() - want).abs().amax() if error.numel() else 0
            assert (error <= allowed + 1e-6).all()
            eps = torch.finfo(k.t.dtype).eps
            assert (error <= eps / 2 * want.abs() + 1e-6).all()
            untouched(k, twin, want_lens)
        for v, want, twin in zip(self.work[1], plain[1], before[1], strict=True):
            assert same_bits(v.t.contiguous(), want.contiguous())
            untouched(v, twin, want_lens)
        return work_lens


def untouched(got, before, lens):
    """All memory besides the first lens[b] rows has the bits it had."""
    for b, length in enumerate(lens.tolist()):
        before.t[b, :length] = got.t[b, :length]
    assert same_bits(got.base, before.base)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("dtype", DTYPES)
@for_each(
    work_layout=LAYOUTS,
    full_layout=LAYOUTS,
    interleaved=[False, True],
    right_aligned=[False, True],
)
def test_layouts(work_layout, full_layout, dtype, interleaved, right_aligned, device):
    case = Case(
        full_layout=full_layout,
        work_layout=work_layout,
        dtype=dtype,
        device=device,
        interleaved=interleaved,
        right_aligned=right_aligned,
    )
    assert case.check().tolist() == [46, 41]


@pytest.mark.sweep(40)
@pytest.mark.parametrize("pairs", [0, 1, 3, 4, 8, 15, 16, 17, 33, 40])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_dims(pairs, dtype, interleaved, device):
    dims = ((1, 80, 3), (2, max(2 * pairs, 1), 5))
    Case(pairs=pairs, dims=dims, dtype=dtype, device=device, interleaved=interleaved).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_of_latent_attention(dtype, device):
    dims = ((2, 192, 128), (1, 576, 512), (1, 64, 512), (2, 96, 64))
    Case(pairs=32, dims=dims, dtype=dtype, device=device, right_aligned=True).check()


@pytest.mark.parametrize("right_aligned", [False, True])
@for_each(seed=range(12))
def test_random(seed, right_aligned, device):
    rng = random.Random(seed)
    chunk_size = rng.choice([1, 2, 7, 32])
    capacity = rng.choice([1, 31, 200])
    Case(
        lens=[rng.choice([0, 1, capacity, rng.randint(0, capacity)]) for _ in range(4)],
        capacity=capacity,
        room=rng.choice([1, 40, 150, 400]),
        chunk_size=chunk_size,
        budget=rng.choice([1, 2, 9]),
        right_aligned=right_aligned,
        device=device,
        seed=seed,
    ).check()


@pytest.mark.sweep(8)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_loads(dtype, interleaved, device):
    """Rows at multiples of 16 bytes: all rotated, a rest of odd length, rows of many blocks."""
    for dims, pairs in [
        (((2, 32, 16), (1, 48, 8)), 16),
        (((2, 40, 24), (3, 56, 40)), 8),
        (((9, 512, 8), (1, 16, 520)), 8),
    ]:
        Case(
            lens=(70, 33),
            capacity=80,
            room=40,
            chunk_size=9,
            budget=4,
            dims=dims,
            pairs=pairs,
            dtype=dtype,
            device=device,
            interleaved=interleaved,
        ).check()


def test_chunks_of_many_blocks(device, schedule):
    """One chunk is more than the threads of a block move at a time, in keys and values."""
    options = {"lens": (300, 555), "capacity": 560, "room": 512, "chunk_size": 250, "budget": 2}
    case = Case(**options, dims=((4, 32, 32),), pairs=16, dtype=torch.float16, device=device)
    case.check()
    bases = [c.base.clone() for c in sum(case.work, [])]
    for kind in ("ahead", "behind"):
        with schedule(kind=kind):
            case.run()
        for base, cache in zip(bases, sum(case.work, []), strict=True):
            assert same_bits(base, cache.base)


@pytest.mark.sweep(7)
@pytest.mark.parametrize("layers", [23, 24, 25, 50])
def test_more_layers_than_one_launch_takes(layers, device):
    case = Case(dims=((1, 8, 4),) * layers, budget=3, room=20, device=device)
    assert case.check().tolist() == [20, 17]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_the_cpu(dtype, interleaved, device, schedule):
    """Nothing is fused on either side. (On a GPU a sine may differ in its last bit.)"""
    if not schedule.emulated:
        pytest.skip("of the emulated kernels")
    for pairs in (3, 16):
        options = {"dims": ((2, 32, 8),), "pairs": pairs, "interleaved": interleaved}
        case, other = (Case(dtype=dtype, **options) for _ in range(2))
        case.run()
        other.run(torch.ops.specextend.gather_chunks)
        for ours, theirs in zip(sum(case.work, []), sum(other.work, []), strict=True):
            assert same_bits(ours.base, theirs.base)


def test_graph_replay_with_other_chunks(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    case = Case(device=device)
    graph, work_lens = capture(case.run)
    for seed in range(1, 4):
        other = Case(device=device, seed=seed)
        case.ids.copy_(other.ids)
        case.counts.copy_(other.counts)
        graph.replay()
        assert torch.equal(work_lens, other.run())
        for ours, theirs in zip(sum(case.work, []), sum(other.work, []), strict=True):
            for b, length in enumerate(work_lens.tolist()):
                assert same_bits(ours.t[b, :length], theirs.t[b, :length])


def hf_rotate(x, positions, inv_freq):
    """Llama's rotary embedding as `transformers` computes it, in the dtype of x."""
    angles = positions[:, None].to(x.dtype) * inv_freq.to(x.dtype)
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


@pytest.mark.parametrize("right_aligned", [False, True])
def test_keys_as_if_embedded_at_their_new_positions(right_aligned, device):
    """O8: index_select of keys without position, then rotary embedding at the new positions."""
    chunk_size, heads, dim, length = 16, 2, 32, 500
    inv_freq = 10000 ** (-torch.arange(0, dim, 2) / dim)
    plain = torch.randn(length, heads, dim, dtype=torch.float64)
    full = hf_rotate(plain, torch.arange(length), inv_freq).float().to(device)[None]
    work = torch.zeros(1, 128, heads, dim, device=device)
    ids = [0, 3, 4, 17, 30, 31]
    lens = ops.gather_chunks(
        [full],
        [full.clone()],
        [work],
        [torch.zeros_like(work)],
        int32([ids], device),
        int32([6], device),
        int32([length], device),
        inv_freq[None].to(device),
        chunk_size=chunk_size,
        right_aligned=right_aligned,
    )
    assert lens.item() == 5 * 16 + 4
    rows = torch.cat([torch.arange(i * 16, min(i * 16 + 16, length)) for i in ids])
    positions = torch.arange(len(rows)) + (length - len(rows) if right_aligned else 0)
    want = hf_rotate(plain[rows], positions, inv_freq)
    torch.testing.assert_close(work[0, : len(rows)].cpu().double(), want, rtol=0, atol=2e-5)
    if right_aligned:  # the last two chunks keep their positions and their bits
        assert same_bits(work[0, 64:84], full[0, 480:500])


def test_only_distances_matter(device):
    """O8: q . k within the working cache is that of keys and queries at any common offset."""
    inv_freq = 10000 ** (-torch.arange(0, 32, 2) / 32)
    scores = []
    for right_aligned in (False, True):
        case = Case(
            dims=((2, 32, 32),),
            pairs=16,
            room=48,
            right_aligned=right_aligned,
            device=device,
            seed=5,
        )
        length = case.run()[0].item()
        first = case.lens[0].item() - length if right_aligned else 0
        query = hf_rotate(
            torch.ones(1, 2, 32, dtype=torch.float64), torch.tensor([first + length]), inv_freq
        )
        keys = case.work[0][0].t[0, :length].cpu().double()
        scores.append((keys * query).sum(-1))
    torch.testing.assert_close(*scores, rtol=0, atol=1e-4)
    assert scores[0].std() > 0.5


@pytest.mark.parametrize("length", [0, 1, 7, 8, 63, 64])
@pytest.mark.parametrize("right_aligned", [False, True])
def test_all_chunks_are_an_exact_copy(length, right_aligned, device):
    """O8: positions do not change, so no bit does."""
    case = Case(
        lens=(length,),
        capacity=64,
        room=64,
        budget=8,
        dtype=torch.bfloat16,
        right_aligned=right_aligned,
        device=device,
    )
    assert case.run().tolist() == [length]
    for full, work in zip(sum(case.full, []), sum(case.work, []), strict=True):
        assert same_bits(work.t[:, :length].contiguous(), full.t[:, :length].contiguous())


def test_no_frequencies_no_rotation(device):
    case, other = Case(pairs=0, device=device), Case(device=device)
    other.inv_freq = torch.zeros_like(other.inv_freq)
    for k, same in zip(case.full[0] + case.work[0], other.full[0] + other.work[0], strict=True):
        assert same_bits(k.base, same.base)
    case.run()
    other.run(inv_freq=None)
    for k, same in zip(case.work[0], other.work[0], strict=True):
        assert same_bits(k.base, same.base)


@pytest.mark.parametrize("interleaved", [False, True])
def test_far_positions(interleaved, device):
    """At a distance of 2^21, angles in fp32 would be off by an eighth of a radian."""
    chunk_size, distance = 4, 2**19
    length = (distance + 1) * chunk_size
    full = torch.randn(1, 1, 1, 8, device=device).expand(1, length, 1, 8)  # one row of memory
    work = torch.zeros(1, 8, 1, 8, device=device)
    inv_freq = torch.tensor([[1.0, 0.7, 0.1, 1e-3]], device=device)
    ops.gather_chunks(
        [full],
        [full],
        [work],
        [torch.zeros_like(work)],
        int32([[0, distance]], device),
        int32([2], device),
        int32([length], device),
        inv_freq,
        chunk_size=chunk_size,
        interleaved=interleaved,
    )
    angles = (1 - distance) * chunk_size * inv_freq[0].double()
    want = reference._rotate(full[0, :4].double(), angles, interleaved)
    torch.testing.assert_close(work[0, 4:].double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ties_round_to_even(dtype, device):
    """A rotation whose cosine is 3/4 takes every other number to the middle between two."""
    inv_freq = torch.full((1, 16), 0.75).acos()
    assert (inv_freq.double().cos().float() == 0.75).all()
    keys = torch.zeros(1, 2, 1, 32, dtype=dtype, device=device)
    keys[..., :16] = 1 + torch.arange(16, device=device) * torch.finfo(dtype).eps
    work = torch.zeros(1, 1, 1, 32, dtype=dtype, device=device)
    ids, counts, lens = (int32(x, device) for x in ([[1]], [1], [2]))
    ops.gather_chunks(
        [keys],
        [keys],
        [work],
        [work.clone()],
        ids,
        counts,
        lens,
        inv_freq.to(device),
        chunk_size=1,
    )
    want = keys[:, :1, :, :16].float() * 0.75
    assert (want != want.to(dtype)).any() and same_bits(work[..., :16].contiguous(), want.to(dtype))


@pytest.mark.parametrize(
    ("ids", "count", "length", "work_len"),
    [
        ([0, 3, 5], 3, 44, 20),  # the last chunk is partial
        ([0, 3, 5], 2, 44, 16),
        ([0, 3, 5], 0, 44, 0),
        ([0, 3, 5], -2, 44, 0),
        ([0, 3, 5], 9, 44, 20),
        ([0, 3, 5], 3, 40, 16),  # past the end
        ([0, 3, 5], 3, -1, 16),
        ([0, -1, 5], 3, 44, 20),
        ([0, 3, 2**31 - 1], 3, 44, 16),
        ([-(2**31), 3, -1], 3, 44, 16),
        ([0, 3, 5], 3, 2**31 - 1, 24),  # more tokens than rows
    ],
)
@pytest.mark.parametrize("right_aligned", [False, True])
def test_nothing_outside_is_touched(ids, count, length, work_len, right_aligned, device):
    case = Case(
        lens=(48,), capacity=48, room=30, budget=3, right_aligned=right_aligned, device=device
    )
    case.ids, case.counts, case.lens = (int32(x, device) for x in ([ids], [count], [length]))
    want_lens, exact, _ = case.wanted()
    before = [[c.twin() for c in layers] for layers in case.work]
    assert case.run().tolist() == want_lens.tolist() == [work_len]
    for got, want, twin in zip(sum(case.work, []), sum(exact, []), sum(before, []), strict=True):
        torch.testing.assert_close(got.t.double(), want, rtol=0, atol=1e-5)
        untouched(got, twin, want_lens)


@pytest.mark.parametrize("room", [0, 1, 7, 8, 9, 20, 45, 46, 47])
def test_rows_that_do_not_fit_are_dropped(room, device):
    work_lens = Case(room=room, device=device).check()
    assert work_lens.tolist() == [min(room, 46), min(room, 41)]


def test_a_sequence_alone_is_the_same(device):
    case = Case(device=device)
    case.run()
    for b in range(2):
        alone = Case(device=device)
        work = [[torch.empty_like(c.t[b : b + 1]) for c in layers] for layers in alone.work]
        full = [[c.t[b : b + 1] for c in layers] for layers in alone.full]
        small = [t[b : b + 1] for t in (alone.ids, alone.counts, alone.lens)]
        lens = ops.gather_chunks(*full, *work, *small, alone.inv_freq, **alone.options)
        for ours, theirs in zip(sum(work, []), sum(case.work, []), strict=True):
            assert same_bits(ours[0, : lens[0]], theirs.t[b, : lens[0]])


def test_gathered_twice_is_gathered_once(device):
    """Chunks come from the full cache each time: an earlier selection leaves no trace."""
    case, other = Case(seed=1, device=device), Case(seed=2, device=device)
    case.ids, case.counts = other.ids, other.counts
    first = case.run()
    assert torch.equal(first, case.run())
    other.run()
    for ours, theirs in zip(sum(case.work, []), sum(other.work, []), strict=True):
        assert same_bits(ours.base, theirs.base)


def test_thread_count_does_not_matter():
    def run():
        case = Case(
            lens=(4000, 3333),
            capacity=4000,
            room=1024,
            chunk_size=32,
            budget=32,
            dims=((4, 64, 64), (4, 64, 64)),
            pairs=32,
            dtype=torch.bfloat16,
        )
        return [case.run(), *(c.base for c in sum(case.work, []))]

    for one, two in zip(run_with_threads(1, run), run_with_threads(2, run), strict=True):
        assert same_bits(one, two)


@pytest.mark.parametrize("budget", [0, 3])
@pytest.mark.parametrize("shape", [(0, 8, 2, 4), (2, 0, 2, 4), (2, 8, 0, 4), (2, 8, 2, 0)])
def test_empty(shape, budget, device):
    full, work = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    ids = torch.zeros(shape[0], budget, dtype=torch.int32, device=device)
    lens = torch.full((shape[0],), shape[1], dtype=torch.int32, device=device)
    inv_freq = torch.zeros(1, 0, device=device)
    got = ops.gather_chunks(
        [full], [full.clone()], [work], [work.clone()], ids, lens, lens, inv_freq, chunk_size=4
    )
    assert got.shape == (shape[0],)


@pytest.mark.not_emulated("the registered op is asked")
@pytest.mark.parametrize("rotated", [False, True])
def test_opcheck(rotated, device):
    case = Case(device=device, room=40)
    caches = [[c.t for c in layers] for layers in (*case.full, *case.work)]
    inv_freq = case.inv_freq if rotated else None
    arguments = (*caches, case.ids, case.counts, case.lens, inv_freq)
    torch.library.opcheck(torch.ops.specextend.gather_chunks.default, arguments, case.options)


FULL, WORK = torch.zeros(2, 8, 3, 4), torch.zeros(2, 6, 3, 4)
IDS, LENS = torch.zeros(2, 5, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k_full": []}, "k_full must hold at least one layer, got an empty list"),
        (
            {"v_work": [WORK]},
            r"v_work must have one tensor per layer as k_full has \(2\), got 1",
        ),
        ({"k_full": [FULL, FULL[0]]}, r"k_full\[1\] must be \[B, S, Hkv, D\], got \[8, 3, 4\]"),
        ({"k_work": [WORK[0], WORK]}, r"k_work\[0\] must be \[B, Sw, Hkv, D\], got \[6, 3, 4\]"),
        (
            {"k_full": [FULL.double(), FULL]},
            r"k_full\[0\] must be float32, float16 or bfloat16, got float64",
        ),
        ({"v_full": [FULL, FULL.half()]}, r"v_full\[1\] must be float32, got float16"),
        (
            {"v_full": [FULL[:, :7]] * 2},
            r"v_full\[0\] must have shape \[2, 8, 3, 4\], got \[2, 7, 3, 4\]",
        ),
        (
            {"k_full": [FULL, FULL[:, :7]]},
            r"k_full\[1\] must have shape \[2, 8, 3, 4\], got \[2, 7, 3, 4\]",
        ),
        (
            {"v_work": [WORK[:, :5]] * 2},
            r"v_work\[0\] must have shape \[2, 6, 3, 4\], got \[2, 5, 3, 4\]",
        ),
        (
            {"k_work": [WORK, WORK[:, :, :2]]},
            r"k_work\[1\] must have shape \[2, 6, 3, 4\], got \[2, 6, 2, 4\]",
        ),
        (
            {"k_work": [WORK.mT.contiguous().mT, WORK]},
            r"k_work\[0\] must have a last stride of 1, got 3",
        ),
        (
            {"v_work": [WORK, WORK[:1].expand(2, 6, 3, 4)]},
            r"v_work\[1\] is written to and must not be expanded, got stride 0 in dimension 0",
        ),
        (
            {"k_work": [FULL, FULL], "v_work": [FULL.clone(), FULL.clone()]},
            r"k_work\[0\] must not share memory with the full cache",
        ),
        ({"ids": IDS[0]}, r"ids must be \[B, budget\], got \[5\]"),
        ({"ids": IDS.long()}, "ids must be int32, got int64"),
        ({"ids": IDS[:, ::2]}, "ids must be contiguous"),
        ({"counts": LENS[:1]}, r"counts must have shape \[2\], got \[1\]"),
        ({"lens": LENS.float()}, "lens must be int32, got float32"),
        ({"chunk_size": 0}, r"chunk_size must be in \[1, .*\], got 0"),
        ({"inv_freq": torch.zeros(2)}, r"inv_freq must be \[L, R / 2\], got \[2\]"),
        ({"inv_freq": torch.zeros(1, 2)}, r"inv_freq must have shape \[2, 2\], got \[1, 2\]"),
        ({"inv_freq": torch.zeros(2, 2).double()}, "inv_freq must be float32, got float64"),
        ({"inv_freq": torch.zeros(2, 4)[:, :2]}, "inv_freq must be contiguous"),
        (
            {"inv_freq": torch.zeros(2, 4097)},
            r"the rotated pairs R / 2 must be in \[0, 4096\], got 4097",
        ),
        (
            {"inv_freq": torch.zeros(2, 3)},
            r"inv_freq \[L, R / 2\] must rotate at most the D = 4 dimensions of k_full\[0\], "
            "got R = 6",
        ),
    ],
)
def test_errors(changed, message):
    arguments = {
        "k_full": [FULL, FULL.clone()],
        "v_full": [FULL, FULL],
        "k_work": [WORK, WORK.clone()],
        "v_work": [WORK.clone(), WORK.clone()],
        "ids": IDS,
        "counts": LENS,
        "lens": LENS,
        "inv_freq": torch.zeros(2, 2),
        "chunk_size": 2,
    }
    with pytest.raises(RuntimeError, match=f"gather_chunks: {message}"):
        ops.gather_chunks(**{**arguments, **changed})
