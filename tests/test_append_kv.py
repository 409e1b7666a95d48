import pytest
import torch
from backends import capture
from kv_cases import DTYPES, LAYOUTS, Guarded, int32, run_with_threads, same_bits

from specextend import ops, reference

BATCH, CAPACITY, HEADS = 4, 24, 3


def check(cache_layout, row_layout, lens, rows, dims=(8, 5), dtype=torch.float32, device="cpu"):
    caches = [Guarded(cache_layout, BATCH, CAPACITY, HEADS, d, dtype, device, d) for d in dims]
    wanted = [cache.twin() for cache in caches]
    new = [Guarded(row_layout, BATCH, rows, HEADS, d, dtype, device, 100 + d) for d in dims]
    before = [rows.twin() for rows in new]
    lens = int32(lens, device)
    ops.append_kv(*(c.t for c in caches), *(n.t for n in new), lens)
    reference.append_kv(*(c.t for c in wanted), *(n.t for n in new), lens)
    for got, want in zip(caches + new, wanted + before, strict=True):
        assert same_bits(got.base, want.base)
    return [(c.t, n.t) for c, n in zip(caches, new, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_layout", LAYOUTS)
@pytest.mark.parametrize("cache_layout", LAYOUTS)
def test_layouts(cache_layout, row_layout, dtype, device):
    pairs = check(cache_layout, row_layout, [0, 7, 13, 19], 5, dtype=dtype, device=device)
    for cache, rows in pairs:
        for b, length in enumerate([0, 7, 13, 19]):
            assert torch.equal(cache[b, length : length + 5], rows[b])


@pytest.mark.parametrize("rows", [0, 1, 2, 23, 24, 25, 40])
def test_rows_that_do_not_fit_are_dropped(rows, device):
    for layout in LAYOUTS:
        check(layout, "bshd", [0, 1, 20, 23], rows, device=device)
        check(layout, "bhsd", [24, 25, 2**31 - 1, -1], rows, device=device)
        check(layout, "bhsd", [-(2**31), -3, 12, 24], rows, device=device)


@pytest.mark.parametrize("dim", [1, 2, 7, 8, 80, 128])
def test_head_dims(dim, device):
    check("sliced", "bhsd", [3, 2, 1, 0], 4, dims=(dim, 2 * dim), device=device)


@pytest.mark.parametrize("dims", [(192, 128), (96, 64), (576, 512), (64, 512)])
def test_keys_and_values_of_latent_attention(dims, device):
    for layout in ("bshd", "bhsd"):
        check(layout, "bshd", [3, 2, 1, 22], 4, dims, torch.bfloat16, device)


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
def test_alignments(offset, device):
    """Memory that begins a power of two of elements behind a multiple of 16 bytes."""
    lens = int32([0, 3], device)
    for dtype in (torch.uint8, torch.float16, torch.float32):
        tensors = []
        for rows in (9, 9, 5, 5):  # caches and new rows, keys and values
            memory = torch.zeros(2 * rows * 2 * 16 + offset, device=device).to(dtype)
            values = torch.randint(100, (2, rows, 2, 16), device=device).to(dtype)
            tensors.append(memory[offset:].view(2, rows, 2, 16).copy_(values))
        wanted = [t.clone() for t in tensors]
        ops.append_kv(*tensors, lens)
        reference.append_kv(*wanted, lens)
        for got, want in zip(tensors, wanted, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("heads", [1, 2, 40])
def test_rows_that_take_many_threads(heads, device):
    """Rows of several blocks, of one block and of a part of it."""
    for layout in ("bshd", "bhsd"):
        caches = [Guarded(layout, 2, 21, heads, 72, device=device, seed=i) for i in range(2)]
        wanted = [cache.twin() for cache in caches]
        rows = [Guarded("bhsd", 2, 19, heads, 72, device=device, seed=9 + i).t for i in range(2)]
        lens = int32([2, 5], device)
        ops.append_kv(*(c.t for c in caches), *rows, lens)
        reference.append_kv(*(c.t for c in wanted), *rows, lens)
        for got, want in zip(caches, wanted, strict=True):
            assert same_bits(got.base, want.base)


def test_keys_and_values_of_other_dtypes(device):
    k_cache = torch.zeros(1, 4, 2, 8, dtype=torch.float64, device=device)
    v_cache = torch.zeros(1, 4, 2, 8, dtype=torch.uint8, device=device)
    k, v = torch.rand_like(k_cache[:, :2]), torch.full_like(v_cache[:, :2], 7)
    ops.append_kv(k_cache, v_cache, k, v, int32([1], device))
    assert torch.equal(k_cache[:, 1:3], k) and torch.equal(v_cache[:, 1:3], v)


def test_broadcast_rows(device):
    cache = torch.zeros(2, 6, 2, 4, device=device)
    row = torch.rand(1, 1, 1, 4, device=device)
    ops.append_kv(
        cache, torch.zeros_like(cache), *[row.expand(2, 3, 2, 4)] * 2, int32([1, 2], device)
    )
    assert torch.equal(cache[0, 1:4], row[0].expand(3, 2, 4)) and cache[1, :2].abs().sum() == 0


def test_chunks_of_a_prompt_one_after_the_other(device):
    prompt = [torch.randn(2, 50, 2, 8, device=device) for _ in range(2)]
    caches = [torch.full((2, 64, 2, 8), torch.nan, device=device) for _ in range(2)]
    lens = int32([0, 0], device)
    for part in zip(*(t.split(7, 1) for t in prompt), strict=True):
        ops.append_kv(*caches, *part, lens)
        lens += part[0].shape[1]
    for cache, rows in zip(caches, prompt, strict=True):
        assert torch.equal(cache[:, :50], rows) and cache[:, 50:].isnan().all()


def test_thread_count_does_not_matter():
    def run():
        caches = [Guarded("bhsd", 2, 900, 4, 128, seed=i) for i in range(2)]
        rows = [Guarded("bshd", 2, 700, 4, 128, seed=2 + i).t for i in range(2)]
        ops.append_kv(*(c.t for c in caches), *rows, int32([100, 333]))
        return caches

    for one, two in zip(run_with_threads(1, run), run_with_threads(2, run), strict=True):
        assert same_bits(one.base, two.base)


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8), (2, 4, 2, 0)])
def test_empty(shape, device):
    cache = torch.zeros(shape, device=device)
    rows = torch.ones(shape[0], 3, *shape[2:], device=device)
    ops.append_kv(cache, cache.clone(), rows, rows, int32([0] * shape[0], device))


@pytest.mark.not_emulated("the registered op is asked")
def test_opcheck(device):
    k_cache, v_cache = Guarded("bhsd", 2, 9, 3, 8).t, Guarded("bshd", 2, 9, 3, 4).t
    k, v = Guarded("bhsd", 2, 3, 3, 8).t, Guarded("sliced", 2, 3, 3, 4).t
    arguments = [t.to(device) for t in (k_cache, v_cache, k, v, int32([1, 5]))]
    torch.library.opcheck(torch.ops.specextend.append_kv.default, arguments)


CACHE = torch.zeros(2, 8, 3, 4)
ROWS = torch.zeros(2, 5, 3, 4)
LENS = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k_cache": CACHE[0]}, r"k_cache must be \[B, S, Hkv, D\], got \[8, 3, 4\]"),
        ({"v": ROWS[0]}, r"v must be \[B, M, Hkv, D\], got \[5, 3, 4\]"),
        ({"v_cache": CACHE[:, :7]}, r"v_cache must have shape \[2, 8, 3, 4\], got \[2, 7, 3, 4\]"),
        (
            {"v_cache": CACHE[:, :, :2]},
            r"v_cache must have shape \[2, 8, 3, 4\], got \[2, 8, 2, 4\]",
        ),
        ({"k": ROWS[:1]}, r"k must have shape \[2, 5, 3, 4\], got \[1, 5, 3, 4\]"),
        ({"k": ROWS[..., :3]}, r"k must have shape \[2, 5, 3, 4\], got \[2, 5, 3, 3\]"),
        ({"v": ROWS[:, :4]}, r"v must have shape \[2, 5, 3, 4\], got \[2, 4, 3, 4\]"),
        ({"k": ROWS.half()}, "k must be float32, got float16"),
        ({"v_cache": CACHE.bfloat16()}, "v must be bfloat16, got float32"),
        ({"k_cache": CACHE.mT.contiguous().mT}, "k_cache must have a last stride of 1, got 3"),
        ({"v": ROWS.mT.contiguous().mT}, "v must have a last stride of 1, got 3"),
        (
            {"k_cache": CACHE[:1].expand(2, 8, 3, 4)},
            "k_cache is written to and must not be expanded, got stride 0 in dimension 0",
        ),
        ({"lens": LENS[:1]}, r"lens must have shape \[2\], got \[1\]"),
        ({"lens": LENS.long()}, "lens must be int32, got int64"),
        ({"lens": torch.zeros(4, dtype=torch.int32)[::2]}, "lens must be contiguous"),
    ],
)
def test_errors(changed, message):
    arguments = {"k_cache": CACHE, "v_cache": CACHE.clone(), "k": ROWS, "v": ROWS, "lens": LENS}
    with pytest.raises(RuntimeError, match=f"append_kv: {message}"):
        ops.append_kv(**{**arguments, **changed})
    assert CACHE.abs().sum() == 0


def test_rows_too_long():
    cache = torch.zeros(2**15).as_strided((1, 1, 2**16, 2**15), (0, 0, 0, 1))
    with pytest.raises(RuntimeError, match=r"append_kv: k_cache must have rows of at most 2\^31"):
        ops.append_kv(cache, cache, cache, cache, LENS[:1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_graph_replay_with_other_lengths(layout, device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    caches = [Guarded(layout, 2, 40, 2, 64, torch.float16, device, i) for i in range(2)]
    wanted = [cache.twin() for cache in caches]
    rows = [Guarded("bhsd", 2, 7, 2, 64, torch.float16, device, 5 + i).t for i in range(2)]
    lens = int32([-1, -1], device)
    # As lengths are now, nothing is written.
    graph, _ = capture(lambda: ops.append_kv(*(c.t for c in caches), *rows, lens))
    for values in ([0, 12], [35, 40], [7, 19]):
        lens.copy_(int32(values, device))
        graph.replay()
        reference.append_kv(*(c.t for c in wanted), *rows, lens)
        for got, want in zip(caches, wanted, strict=True):
            assert same_bits(got.base, want.base)


def test_lengths_on_the_host(device):
    if device == "cpu":
        pytest.skip("needs two devices")
    cache, rows = CACHE.to(device), ROWS.to(device)
    with pytest.raises(RuntimeError, match=r"append_kv: lens must be on the device of k_cache"):
        ops.append_kv(cache, cache.clone(), rows, rows, LENS)
