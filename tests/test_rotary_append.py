from functools import partial

import pytest
import torch
from backends import capture
from kv_cases import DTYPES, LAYOUTS, Guarded, int32, run_with_threads, same_bits
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from specextend import ops, reference

BATCH, CAPACITY, HEADS = 2, 24, 3


def factors(batch, rows, dim, dtype, device="cpu", seed=9):
    """Return cosines and sines, which need not be those of angles, nor alike in their halves."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, batch, rows, dim, generator=generator)
    return values.to(device, dtype).unbind()


def check(
    cache_layout, row_layout, lens, rows, *, dims=(16, 16), rotary=16, group=2, factors_of=None,
    dtype=torch.float32, device="cpu",
):  # fmt: skip
    """Compare with the reference, what must not be written included."""
    make = partial(Guarded, dtype=dtype, device=device)
    k_dim, v_dim = dims
    batch = len(lens)
    caches = [make(cache_layout, batch, CAPACITY, HEADS, d, seed=d + i) for i, d in enumerate(dims)]
    wanted = [cache.twin() for cache in caches]
    q = make(row_layout, batch, rows, HEADS * group, k_dim, seed=1)
    k = make(row_layout, batch, rows, HEADS, k_dim, seed=2)
    v = make(row_layout, batch, rows, HEADS, v_dim, seed=3)
    before = [t.twin() for t in (q, k, v)]
    cos, sin = factors(factors_of or batch, rows, rotary, dtype, device)
    lens = int32(lens, device)
    got = ops.rotary_append(q.t, k.t, v.t, cos, sin, *(c.t for c in caches), lens)
    want = reference.rotary_append(q.t, k.t, v.t, cos, sin, *(c.t for c in wanted), lens)
    assert got.is_contiguous() and same_bits(got, want.contiguous())
    for t, w in zip([*caches, q, k, v], [*wanted, *before], strict=True):
        assert same_bits(t.base, w.base)
    return got, caches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 10, 64, 80, 128, 256])
def test_bits_of_transformers(dim, dtype, device):
    """As its models call it: heads before rows, the halves of cos and sin alike."""
    q, k, v = (torch.randn(2, 5, heads, dim).to(device, dtype) for heads in (6, 3, 3))
    angles = torch.randn(1, 5, dim // 2).to(device) * 100
    cos, sin = (f(torch.cat([angles, angles], -1)).to(dtype) for f in (torch.cos, torch.sin))
    k_cache, v_cache = torch.zeros(2, 2, 9, 3, dim, dtype=dtype, device=device).unbind()
    got = ops.rotary_append(q, k, v, cos, sin, k_cache, v_cache, int32([1, 4], device))
    want = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    assert same_bits(got, want[0].transpose(1, 2).contiguous())
    for b, length in enumerate([1, 4]):
        assert same_bits(k_cache[b, length : length + 5], want[1][b].transpose(0, 1).contiguous())
        assert same_bits(v_cache[b, length : length + 5], v[b])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_layout", LAYOUTS)
@pytest.mark.parametrize("cache_layout", LAYOUTS)
def test_layouts(cache_layout, row_layout, dtype, device):
    for factors_of in (1, 2):
        check(
            cache_layout, row_layout, [7, 19], 5, factors_of=factors_of, dtype=dtype, device=device
        )


@pytest.mark.parametrize("rows", [0, 1, 2, 23, 24, 25, 40])
def test_rows_that_do_not_fit_are_dropped(rows, device):
    for layout in LAYOUTS:
        for lens in ([0, 1], [20, 23], [24, 25], [2**31 - 1, -1], [-(2**31), 12]):
            check(layout, "bshd", lens, rows, device=device)


@pytest.mark.parametrize(
    ("dims", "rotary"),
    [
        ((2, 2), 2), ((7, 3), 0), ((7, 7), 6), ((8, 16), 4), ((64, 64), 8), ((64, 64), 32),
        ((80, 80), 80), ((96, 64), 48), ((128, 128), 64), ((128, 32), 128), ((72, 72), 20),
        ((256, 256), 256), ((192, 128), 64), ((576, 512), 64), ((512, 512), 512),
    ],
)  # fmt: skip
def test_partial_rotation(dims, rotary, device):
    for dtype in (torch.float32, torch.bfloat16):
        check("bhsd", "bshd", [3, 9], 3, dims=dims, rotary=rotary, dtype=dtype, device=device)


@pytest.mark.parametrize("group", [1, 4, 7])
def test_groups(group, device):
    check("bshd", "bhsd", [0, 5], 9, group=group, device=device)


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_alignments(offset, device):
    """Of every argument, memory that begins a power of two of elements behind 16 bytes."""
    for dtype in (torch.float16, torch.float32):
        sizes = dict(q=(2, 5, 4, 32), k=(2, 5, 2, 32), v=(2, 5, 2, 32), cos=(2, 5, 32))
        sizes |= dict(sin=(2, 5, 32), k_cache=(2, 9, 2, 32), v_cache=(2, 9, 2, 32))
        given = {n: torch.randn(s).to(device, dtype) for n, s in sizes.items()}
        lens = int32([0, 3], device)
        wanted = {n: t.clone() for n, t in given.items()}
        want = ops.rotary_append(**wanted, lens=lens)
        for name, t in given.items():
            memory = torch.zeros(t.numel() + offset, dtype=dtype, device=device)
            moved = {n: x.clone() for n, x in given.items()}
            moved[name] = memory[offset:].view(t.shape).copy_(t)
            assert same_bits(ops.rotary_append(**moved, lens=lens), want), name
            for cache in ("k_cache", "v_cache"):
                assert same_bits(moved[cache], wanted[cache]), name


def test_merged_projection(device):
    """q, k and v are views of one tensor, as of a merged projection."""
    merged = torch.randn(2, 4, (6 + 3 + 3) * 16, device=device)
    q, k, v = (t.unflatten(-1, (-1, 16)) for t in merged.split([96, 48, 48], -1))
    cos, sin = factors(1, 4, 16, torch.float32, device)
    given = [torch.zeros(2, 9, 3, 16, device=device) for _ in range(4)]
    lens = int32([2, 7], device)
    got = ops.rotary_append(q, k, v, cos, sin, *given[:2], lens)
    want = ops.rotary_append(*(t.contiguous() for t in (q, k, v)), cos, sin, *given[2:], lens)
    assert same_bits(got, want)
    assert same_bits(given[0], given[2]) and same_bits(given[1], given[3])


def test_thread_count_does_not_matter():
    def run():
        got, caches = check("bhsd", "bshd", [0, 3], 20, dims=(128, 128), rotary=128, group=8)
        return [got, *(cache.base for cache in caches)]

    for one, two in zip(run_with_threads(1, run), run_with_threads(2, run), strict=True):
        assert same_bits(one, two)


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8), (2, 4, 2, 0)])
def test_empty(shape, device):
    batch, _, heads, dim = shape
    cache = torch.zeros(shape, device=device)
    row = torch.ones(batch, 3, heads, dim, device=device)
    cos = torch.ones(1, 3, dim, device=device)
    lens = int32([0] * batch, device)
    got = ops.rotary_append(row, row, row, cos, cos, cache, cache.clone(), lens)
    assert got.shape == row.shape


@pytest.mark.not_emulated("the registered op is asked")
def test_opcheck(device):
    caches = [Guarded("bhsd", 2, 9, 3, 8).t, Guarded("bshd", 2, 9, 3, 8).t]
    rows = [Guarded("sliced", 2, 3, heads, 8).t for heads in (6, 3, 3)]
    given = [*rows, *factors(1, 3, 4, torch.float32), *caches, int32([1, 5])]
    arguments = [t.to(device) for t in given]
    torch.library.opcheck(torch.ops.specextend.rotary_append.default, arguments)


CACHE, ROWS, Q = torch.zeros(2, 8, 3, 4), torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 6, 4)
COS, LENS = torch.zeros(2, 5, 4), torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k_cache": CACHE[0]}, r"k_cache must be \[B, S, Hkv, D\], got \[8, 3, 4\]"),
        ({"v": ROWS[:, :4]}, r"v must have shape \[2, 5, 3, 4\], got \[2, 4, 3, 4\]"),
        ({"k": ROWS.half()}, "k must be float32, got float16"),
        ({"k_cache": CACHE[:1].expand(2, 8, 3, 4)}, "k_cache is written to and must not be expand"),
        ({"lens": LENS.long()}, "lens must be int32, got int64"),
        ({"q": Q[0]}, r"q must be \[B, M, Hq, D\], got \[5, 6, 4\]"),
        ({"q": Q[:, :4]}, r"q must have shape \[2, 5, 6, 4\], got \[2, 4, 6, 4\]"),
        ({"q": Q[..., :3]}, r"q must have shape \[2, 5, 6, 4\], got \[2, 5, 6, 3\]"),
        ({"q": Q.double()}, "q must be float32, float16 or bfloat16, got float64"),
        ({"q": Q.half()}, "k must be float16, got float32"),
        ({"q": Q.mT.contiguous().mT}, "q must have a last stride of 1, got 6"),
        ({"v": ROWS.half(), "v_cache": CACHE.half()}, "v must be float32, got float16"),
        ({"cos": COS[0]}, r"cos must be \[B or 1, M, R\], got \[5, 4\]"),
        ({"cos": torch.zeros(3, 5, 4)}, r"cos must have shape \[2, 5, 4\], got \[3, 5, 4\]"),
        ({"sin": COS[..., :2]}, r"sin must have shape \[2, 5, 4\], got \[2, 5, 2\]"),
        ({"sin": COS[:, :1]}, r"sin must have shape \[2, 5, 4\], got \[2, 1, 4\]"),
        ({"cos": COS.half()}, "cos must be float32, got float16"),
        ({"sin": torch.zeros(2, 4, 5).mT}, "sin must have a last stride of 1, got 5"),
        (
            {"cos": COS[..., :3], "sin": COS[..., :3]},
            "cos must have an even number R of columns, no more than D = 4, got 3",
        ),
        (
            {"cos": torch.zeros(2, 5, 6), "sin": torch.zeros(2, 5, 6)},
            "cos must have an even number R of columns, no more than D = 4, got 6",
        ),
    ],
)
def test_errors(changed, message):
    arguments = dict(
        q=Q, k=ROWS + 1, v=ROWS + 1, cos=COS, sin=COS, k_cache=CACHE, v_cache=CACHE.clone(),
        lens=LENS,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=f"rotary_append: {message}"):
        ops.rotary_append(**{**arguments, **changed})
    assert CACHE.abs().sum() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_graph_replay_with_other_lengths(layout, device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    caches = [Guarded(layout, 2, 40, 2, 64, torch.float16, device, i) for i in range(2)]
    wanted = [cache.twin() for cache in caches]
    rows = [Guarded("bhsd", 2, 7, h, 64, torch.float16, device, h).t for h in (4, 2, 2)]
    given = [*rows, *factors(1, 7, 64, torch.float16, device)]
    lens = int32([-1, -1], device)
    # As lengths are now, nothing is written.
    graph, got = capture(lambda: ops.rotary_append(*given, *(c.t for c in caches), lens))
    for values in ([0, 12], [35, 40], [7, 19]):
        lens.copy_(int32(values, device))
        graph.replay()
        want = reference.rotary_append(*given, *(c.t for c in wanted), lens)
        assert same_bits(got, want.contiguous())
        for cache, want in zip(caches, wanted, strict=True):
            assert same_bits(cache.base, want.base)
