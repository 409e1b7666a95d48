import random

import emulation
import pytest
import torch
from backends import build_or_skip, capture, emulated, for_each
from kv_cases import DTYPES, LAYOUTS, Guarded, int32, run_with_threads, same_bits
from tree_cases import ancestors, random_parents
from virtual_memory import spread

from specextend import ops, reference


def random_paths(rng, batch, num_nodes, longest):
    """Strictly increasing slots from 0, a tail that must not be read, and how many count."""
    path, num_accepted = [], []
    for _ in range(batch):
        accepted = rng.randint(0, min(longest, num_nodes) - 1)
        nodes = [0, *sorted(rng.sample(range(1, num_nodes), accepted))]
        path.append(nodes + [rng.choice([-1, 2**31 - 1]) for _ in range(longest - len(nodes))])
        num_accepted.append(accepted)
    return path, num_accepted


def check(caches, prefix_lens, path, num_accepted, device="cpu"):
    wanted = [cache.twin() for cache in caches]
    arguments = [int32(x, device) for x in (prefix_lens, path, num_accepted)]
    ops.compact_kv([cache.t for cache in caches], *arguments)
    reference.compact_kv([cache.t for cache in wanted], *arguments)
    for got, want in zip(caches, wanted, strict=True):
        assert same_bits(got.base, want.base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@for_each(seed=range(6))
def test_random(seed, layout, dtype, device):
    rng = random.Random(seed)
    batch, num_nodes = rng.randint(1, 4), rng.choice([1, 2, 7, 20, 64])
    heads, dim = rng.choice([1, 3, 8]), rng.choice([1, 7, 64, 80])
    prefix_lens = [rng.choice([0, 1, rng.randint(0, 40)]) for _ in range(batch)]
    path, num_accepted = random_paths(rng, batch, num_nodes, rng.choice([num_nodes, 9, 20]))
    caches = [
        Guarded(layout, batch, 40 + num_nodes, heads, dim, dtype, device, i).poison(
            [prefix + num_nodes for prefix in prefix_lens]
        )
        for i in range(3)
    ]
    check(caches, prefix_lens, path, num_accepted, device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_index_select(layout, device):
    """O15, first half."""
    cache = Guarded(layout, 1, 30, 2, 8, device=device)
    rows = torch.arange(30, device=device)
    rows[10:14] = 10 + torch.tensor([0, 2, 3, 9], device=device)
    want = cache.t.index_select(1, rows)
    ops.compact_kv([cache.t], *(int32(x, device) for x in ([10], [[0, 2, 3, 9]], [3])))
    assert same_bits(cache.t.contiguous(), want)


@pytest.mark.parametrize("length", [2, 3, 8, 9, 16, 17, 33, 100])
def test_every_row_moves_onto_one_that_moved(length, device):
    """Row P + i + 1 to row P + i, all along the path."""
    path = [0, *range(2, length + 1)]
    for layout in LAYOUTS:
        caches = [Guarded(layout, 2, length + 9, 2, 16, device=device, seed=length)]
        check(caches, [3, 8], [path, path], [length - 1, length - 1], device)


def test_a_path_in_place_moves_nothing(device):
    cache = Guarded("bhsd", 2, 20, 2, 8, device=device)
    before = cache.twin()
    ops.compact_kv([cache.t], *(int32(x, device) for x in ([0, 11], [[*range(9)]] * 2, [8, 8])))
    assert same_bits(cache.base, before.base)


@pytest.mark.parametrize(
    ("prefix", "num_accepted"),
    [
        (4, 4),
        (11, 4),
        (15, 4),
        (19, 4),
        (20, 4),
        (2**31 - 1, 4),
        (-1, 4),
        (-(2**31), 4),
        (3, -1),
        (3, -7),
        (3, 99),
    ],
)
def test_nothing_outside_is_touched(prefix, num_accepted, device):
    for layout in LAYOUTS:
        caches = [Guarded(layout, 2, 20, 2, 8, device=device)]
        path = [[0, 2, 3, 9, 16], [0, 1, 2, 3, 2**31 - 1]]
        check(caches, [prefix, 5], path, [num_accepted, 4], device)


def test_caches_of_many_shapes(device):
    caches = [
        Guarded(LAYOUTS[i % 4], 2, 30, 1 + i % 5, 8 << i % 3, DTYPES[i % 3], device, i)
        for i in range(24)
    ]
    check(caches, [4, 9], [[0, 3, 4, 8], [0, 1, 5, -1]], [3, 2], device)
    caches = [
        Guarded(LAYOUTS[i % 4], 2, 30, 1 + i // 4, dim, torch.bfloat16, device, i)
        for i, dim in enumerate((192, 128, 96, 64, 576, 512, 576, 512))
    ]
    check(caches, [4, 9], [[0, 3, 4, 8], [0, 1, 5, -1]], [3, 2], device)


WHOLE = slice(None)


@pytest.mark.parametrize(
    "views",
    [
        [(WHOLE, WHOLE, slice(0, 3, 2)), (WHOLE, WHOLE, slice(0, 4, 3))],
        [(WHOLE, slice(0, 20), WHOLE), (WHOLE, slice(0, 40, 2), WHOLE)],
        [(slice(0, 2), WHOLE, WHOLE), (slice(0, 4, 2), WHOLE, WHOLE)],
        [(WHOLE, WHOLE, slice(0, n), slice(0, 4)) for n in (2, 3)],
        [(WHOLE, WHOLE, WHOLE, slice(0, n)) for n in (4, 8)],
    ],
    ids=["stride of heads", "of rows", "of sequences", "number of heads", "dimension"],
)
def test_caches_that_differ_in_one_thing(views, device):
    """All else being the same, no launch may take one for the other."""
    caches = []
    for i in range(6):
        cache = Guarded("bshd", 4, 40, 4, 9, device=device, seed=i)
        cache.t = cache.t[views[i % 2]]
        caches.append(cache)
    batch = caches[0].t.shape[0]
    check(caches, [4] * batch, [[0, 3, 4, 8]] * batch, [3] * batch, device)


def test_more_caches_than_one_launch_takes(device):
    caches = [Guarded("bhsd", 1, 6, 1, 2, device=device, seed=i) for i in range(600)]
    check(caches, [1], [[0, 2, 4]], [2], device)


def test_other_dtypes(device):
    for dtype in (torch.float64, torch.uint8, torch.float8_e4m3fn):
        cache = torch.arange(12, device=device).view(1, 12, 1, 1).to(dtype)
        ops.compact_kv([cache], *(int32(x, device) for x in ([2], [[0, 3, 5]], [2])))
        got = cache.flatten().float().tolist()
        assert got == [0, 1, 2, 5, 7, 5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_a_thousand_rounds(layout, device, schedule):
    """O15, second half: the cache stays that of a fresh pass over the committed tokens.

    A key is a function of its token, position and layer, and so is known at any time.
    """
    rng = random.Random(3)
    batch, capacity, heads, dim, layers = 2, 2600, 2, 4, 2
    rounds = 100 if schedule.emulated else 1000

    def rows(tokens, positions, layer):
        x = torch.tensor([t * 4096 + p for t, p in zip(tokens, positions, strict=True)]).double()
        return (x[:, None, None] * 8 + torch.arange(heads * dim).view(heads, dim)) * (layer + 1)

    caches = [
        torch.full((batch, heads, capacity, dim), torch.nan, dtype=torch.float64, device=device)
        for _ in range(2 * layers)
    ]
    caches = [
        t.transpose(1, 2).contiguous() if layout == "bshd" else t.transpose(1, 2) for t in caches
    ]
    committed = [[] for _ in range(batch)]
    lens = int32([0] * batch, device)
    for _ in range(rounds):
        num_nodes = rng.randint(1, 9)
        parents = [random_parents(rng, num_nodes) for _ in range(batch)]
        tokens = [[rng.randrange(1000) for _ in range(num_nodes)] for _ in range(batch)]
        path, num_accepted, new = [], [], [[] for _ in caches]
        for b in range(batch):
            below = [ancestors(parents[b], node) for node in range(num_nodes)]
            positions = [len(committed[b]) + len(nodes) - 1 for nodes in below]
            for i, values in enumerate(new):
                values.append(rows(tokens[b], positions, i))
            nodes = rng.choice(below)
            path.append(nodes + [-1] * (num_nodes - len(nodes)))
            num_accepted.append(len(nodes) - 1)
            committed[b] += [tokens[b][node] for node in nodes]
        new = [torch.stack(values).to(device) for values in new]
        for k, v, k_new, v_new in zip(caches[::2], caches[1::2], new[::2], new[1::2], strict=True):
            ops.append_kv(k, v, k_new, v_new, lens)
        num_accepted = int32(num_accepted, device)
        ops.compact_kv(caches, lens, int32(path, device), num_accepted)
        lens += num_accepted + 1
    assert min(lens.tolist()) > rounds
    for b, text in enumerate(committed):
        for i, cache in enumerate(caches):
            want = rows(text, range(len(text)), i)
            assert torch.equal(cache[b, : len(text)].cpu(), want)


def test_thread_count_does_not_matter():
    def run():
        caches = [Guarded("bhsd", 2, 200, 8, 128, seed=i) for i in range(6)]
        path = [[0, *range(60, 120)], [0, *range(2, 62)]]
        ops.compact_kv([c.t for c in caches], int32([10, 3]), int32(path), int32([60, 59]))
        return caches

    for one, two in zip(run_with_threads(1, run), run_with_threads(2, run), strict=True):
        assert same_bits(one.base, two.base)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_graph_replay_with_other_lengths(layout, device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    caches = [Guarded(layout, 2, 40, 2, 64, torch.float16, device, i) for i in range(4)]
    wanted = [cache.twin() for cache in caches]
    arguments = [int32(x, device) for x in ([0, 0], [[0] * 6] * 2, [0, 0])]
    tensors = [cache.t for cache in caches]
    # As lengths are now, nothing moves.
    graph, _ = capture(lambda: ops.compact_kv(tensors, *arguments))
    for values in (([3, 9], [[0, 1, 4, 9, -1, -1], [0, 2, 3, 4, 5, 20]], [3, 5]), ([5, 8], [], [])):
        for argument, value in zip(arguments, values, strict=True):
            if value:
                argument.copy_(int32(value, device))
        graph.replay()
        reference.compact_kv([cache.t for cache in wanted], *arguments)
        for got, want in zip(caches, wanted, strict=True):
            assert same_bits(got.base, want.base)


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8), (2, 4, 2, 0)])
@pytest.mark.parametrize("length", [0, 3])
def test_empty(shape, length, device):
    batch = shape[0]
    path = torch.full((batch, length), 2, dtype=torch.int32, device=device)
    lens = torch.zeros(batch, dtype=torch.int32, device=device)
    ops.compact_kv([torch.zeros(shape, device=device)], lens, path, lens + 2)


@pytest.fixture(scope="module")
def hopper_library():
    """Return the emulation with the bulk copies of Hopper."""
    own = [
        emulation.ROOT / f"csrc/{name}"
        for name in ("ops/compact_kv.cpp", "cuda/compact_kv_sm90.cu")
    ]
    return build_or_skip("specextend_emulated_sm90", own, ["-DSPECEXTEND_HAS_SM90A"])


@pytest.mark.parametrize("kind", emulation.KINDS)
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "kv_packed"])
def test_bulk_copies(layout, kind, hopper_library):
    rng = random.Random(0)
    for length, dim in ((1, 8), (16, 80), (17, 256), (50, 600)):
        schedule = emulation.Schedule(length, kind, capability=90)
        with emulated(hopper_library, schedule):
            caches = [Guarded(layout, 2, 70, 3, dim, DTYPES[i], seed=i) for i in range(3)]
            paths = [
                [0, *range(2, length + 1)],
                [0, *sorted(rng.sample(range(1, 60), length - 1))],
            ]
            check(caches, [3, 8], paths, [length - 1, length - 1])
            check(caches, [11, 4], paths, [length // 2, -1])


def test_bulk_copies_beyond_32_bits(hopper_library):
    """As test_offsets.py, which does not have them."""
    with emulated(hopper_library, emulation.Schedule(capability=90)):
        for dim in range(3):
            caches = [Guarded("bhsd", 2, 12, 3, 16, seed=i).t for i in range(2)]
            far = [spread(t, dim) for t in caches]
            arguments = [int32(x) for x in ([4, 1], [[0, 2, 5], [0, 3, 4]], [2, 2])]
            ops.compact_kv(far, *arguments)
            reference.compact_kv(caches, *arguments)
            for got, want in zip(far, caches, strict=True):
                assert same_bits(got.contiguous(), want.contiguous())


@pytest.mark.not_emulated("the registered op is asked")
def test_opcheck(device):
    caches = [Guarded(layout, 2, 20, 3, 8).t.to(device) for layout in LAYOUTS]
    arguments = (caches, *(int32(x, device) for x in ([1, 5], [[0, 2, 4], [0, 5, -1]], [2, 1])))
    torch.library.opcheck(torch.ops.specextend.compact_kv.default, arguments)


CACHE = torch.zeros(2, 8, 3, 4)
LENS = torch.zeros(2, dtype=torch.int32)
PATH = torch.zeros(2, 5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"caches": []}, "caches must hold at least one tensor, got an empty list"),
        (
            {"caches": [CACHE, CACHE[0]]},
            r"caches\[1\] must be \[B, S, Hkv, D\], got \[8, 3, 4\]",
        ),
        (
            {"caches": [CACHE, CACHE[:, :7]]},
            r"caches\[1\] must have shape \[2, 8, 3, 4\], got \[2, 7, 3, 4\]",
        ),
        (
            {"caches": [CACHE, CACHE[:1]]},
            r"caches\[1\] must have shape \[2, 8, 3, 4\], got \[1, 8, 3, 4\]",
        ),
        (
            {"caches": [CACHE.mT.contiguous().mT]},
            r"caches\[0\] must have a last stride of 1, got 3",
        ),
        (
            {"caches": [CACHE, CACHE[:, :, :1].expand(2, 8, 3, 4)]},
            r"caches\[1\] is written to and must not be expanded, got stride 0 in dimension 2",
        ),
        (
            {"caches": [CACHE, torch.zeros_like(CACHE), CACHE[..., :2]]},
            r"caches\[2\] must not share memory with caches\[0\]",
        ),
        ({"path": PATH[0]}, r"path must be \[B, N\], got \[5\]"),
        ({"path": PATH[:1]}, r"path must have shape \[2, 5\], got \[1, 5\]"),
        ({"path": PATH.long()}, "path must be int32, got int64"),
        ({"path": PATH[:, :3]}, "path must be contiguous"),
        ({"prefix_lens": LENS[:1]}, r"prefix_lens must have shape \[2\], got \[1\]"),
        ({"prefix_lens": LENS.long()}, "prefix_lens must be int32, got int64"),
        ({"num_accepted": LENS[None]}, r"num_accepted must have shape \[2\], got \[1, 2\]"),
        ({"num_accepted": LENS.float()}, "num_accepted must be int32, got float32"),
    ],
)
def test_errors(changed, message):
    arguments = {"caches": [CACHE], "prefix_lens": LENS, "path": PATH, "num_accepted": LENS}
    with pytest.raises(RuntimeError, match=f"compact_kv: {message}"):
        ops.compact_kv(**{**arguments, **changed})
