import functools
import math
import os
import subprocess
import sys

import isa_bits
import pytest
import torch
from backends import capture
from cases import GROUPS, PREFIXES, TREES
from emulation import KINDS

from specextend import ops, reference
from specextend.testing import ancestor_mask, assert_within_twice, in_layout, pack_mask

INF, NAN = torch.inf, torch.nan
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["bshd", "bhsd", "sliced"]
# D of queries and keys, and of values: of DeepSeek-V3 and MiniCPM3, of latent keys, and others.
SIZES = [(192, 128), (96, 64), (64, 96), (24, 8), (8, 40), (256, 256), (512, 512), (264, 8)]
SIZES += [(8, 512), (136, 72), (576, 512)]
# From the first key of a sequence to its last, and from one key to the next, at most. What kernels
# let pass (kAttentionSlack) is 5.5.
RISE, RISE_PER_KEY = 24.0, 0.25


@pytest.fixture(autouse=True)
def one_thread():
    """Many small calls: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_tree(nodes: int, generator: torch.Generator, chain: float = 0.4) -> torch.Tensor:
    """Parents of a random tree in topological order; with probability `chain` the node before."""
    parents = [-1]
    for node in range(1, nodes):
        drawn = int(torch.randint(0, node, (1,), generator=generator))
        parents.append(node - 1 if torch.rand(1, generator=generator) < chain else drawn)
    return torch.tensor(parents)


def depths_of(parents: torch.Tensor) -> torch.Tensor:
    return ancestor_mask(parents).sum(-1).int() - 1


def tilt(q: torch.Tensor, k: torch.Tensor, lengths: list[int], first: int) -> None:
    """Adds to logits what rises along the keys in every third row, and falls in the next ones.

    So the maximum that exponents are taken from grows tile by tile, and sums of parts are far
    apart. The rows between are as they were. The largest logits stay near 0, where the error of
    plain PyTorch, which results are compared with, is small.
    """
    rows, heads, dim = q.shape[1:]
    half = dim // 2
    direction = torch.tensor([1.0, -1.0]).repeat(half // 2)  # no common offset of keys has a part
    slope = torch.arange(rows)[:, None] + torch.arange(heads) + first
    for kind, part in ((1, slice(half)), (2, slice(half, None))):
        along = q[..., part] @ direction / half
        q[..., part] += ((slope % 3 == kind).float() - along)[..., None] * direction
        for b, length in enumerate(lengths):
            rise = min(RISE, RISE_PER_KEY * length)
            ends = (-rise, 0.0) if kind == 1 else (0.0, -rise)
            logits = torch.linspace(*ends, length)[:, None, None]
            k[b, :length, :, part] += logits * dim**0.5 / half * direction


class Case:
    """Inputs of one call. Cache rows that are not to be read are NaN, in all of their memory.

    ``dim`` is D, or D and that of values. With the layout "latent" values are a view of the keys.
    """

    def __init__(
        self,
        prefixes=(70,),
        rows=5,
        keys=None,
        heads=(4, 2),
        dim=64,
        dtype=torch.float32,
        layout="bshd",
        spare=3,
        tree=True,
        scale=1.0,
        seed=0,
    ):
        g = self.generator = torch.Generator().manual_seed(seed)
        self.prefixes = list(prefixes)
        self.rows, self.keys = rows, rows if keys is None else keys
        batch, capacity = len(self.prefixes), max(self.prefixes) + self.keys + spare
        dims = dim if isinstance(dim, tuple) else (dim, dim)
        q = torch.randn(batch, rows, heads[0], dims[0], generator=g) * scale
        k, v = (torch.randn(batch, capacity, heads[1], d, generator=g) for d in dims)
        tilt(q, k, [prefix + self.keys for prefix in self.prefixes], seed)
        for b, prefix in enumerate(self.prefixes):
            k[b, prefix + self.keys :] = NAN
            v[b, prefix + self.keys :] = NAN
        own = "sliced" if layout == "latent" else layout
        self.q, self.k, self.v = (in_layout(t.to(dtype), own) for t in (q, k, v))
        if layout == "latent":
            self.v = self.k[..., : dims[1]]
        self.prefix_lens = torch.tensor(self.prefixes, dtype=torch.int32)
        self.visible = self.parents = self.mask = None
        self.options = {} if keys is None else {"num_tree_keys": keys}
        if tree and self.keys:
            self.parents = [random_tree(self.keys, g) for _ in self.prefixes]
            # With fewer rows than keys, the last ones ask.
            self.visible = torch.stack([ancestor_mask(p) for p in self.parents])
            self.visible = self.visible[:, max(0, self.keys - rows) :]
            if rows > self.keys:
                more = torch.rand(batch, rows - self.keys, self.keys, generator=g) < 0.5
                self.visible = torch.cat([self.visible, more], 1)
            self.mask = pack_mask(self.visible)

    def depths(self) -> dict[str, torch.Tensor]:
        depths = torch.stack([depths_of(p) for p in self.parents])
        return {"q_depths": depths[:, self.keys - self.rows :].contiguous(), "k_depths": depths}

    def run(self, device="cpu", **options):
        def move(t):
            return t.to(device) if isinstance(t, torch.Tensor) else t

        arguments = (self.q, self.k, self.v, self.prefix_lens, self.mask)
        options = {name: move(t) for name, t in {**self.options, **options}.items()}
        if device == "cpu":
            return ops.tree_attention(*arguments, **options)
        return [t.cpu() for t in ops.tree_attention(*map(move, arguments), **options)]

    def check(self, device="cpu", **options):
        """Against the reference: the output by the error of plain PyTorch in the same dtype, the
        log-sum-exps, which are fp32, by that of plain fp32."""
        got = self.run(device, **options)
        options = {**self.options, **options}
        data = self.q, self.k, self.v
        assert got[0].dtype == self.q.dtype and got[1].dtype == got[2].dtype == torch.float32
        assert got[0].is_contiguous()

        def expected(dtype):
            return reference.tree_attention(
                *(t.to(dtype) for t in data), self.prefix_lens, self.mask, **options
            )

        exact, single = expected(torch.float64), expected(torch.float32)
        plain = expected(self.q.dtype)
        # Half an ulp of the result's own rounding comes on top where plain PyTorch is lucky, and
        # more in large heads: a logit's terms are summed one after the other here, not in parts.
        ulp = torch.finfo(self.q.dtype).eps / 2
        more = 1 if self.q.shape[-1] <= 192 else self.q.shape[-1] / 48
        assert_within_twice(got[0], exact[0], plain[0], max(more * 1e-6, ulp))
        assert_within_twice(got[1], exact[1], single[1], more * 2e-6)
        assert_within_twice(got[2], exact[2], single[2], more * 2e-6)
        return got


def same_bits(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_close(a, b) -> None:
    """Outputs to their precision, log-sum-exps to that of fp32."""
    eps = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=eps[x.dtype], atol=eps[x.dtype])


# --- Against the reference -----------------------------------------------------------------------


@pytest.mark.sweep(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(prefix, dtype, device, schedule):
    """O1, O2: random trees, and chains."""
    for i, rows in enumerate([1, 17] if schedule.emulated and prefix > 1000 else [1, 5, 64, 17]):
        other = max(0, prefix - 3 * i)
        Case((prefix, other), rows, heads=(4, 2), dtype=dtype, seed=i).check(device)
        Case((prefix,), rows, heads=(4, 4), dim=32, dtype=dtype, tree=False).check(device)


@pytest.mark.sweep(8)
@pytest.mark.parametrize("rows", TREES)
def test_trees(rows, device, schedule):
    # A long prefix is seconds on the emulation, and is that of other tests there.
    prefixes = [0, 63, 200] if schedule.emulated else [0, 63, 200, 1023]
    for i, (prefix, dtype) in enumerate(zip(prefixes, DTYPES * 2, strict=False)):
        Case((prefix,), rows, heads=(6, 2), dim=64, dtype=dtype, seed=i).check(device)


@pytest.mark.sweep(7)
@pytest.mark.parametrize("group", GROUPS)
def test_groups(group, device):
    for rows, dtype in [(1, torch.bfloat16), (3, torch.float16), (13, torch.float32)]:
        Case((150,), rows, heads=(2 * group, 2), dtype=dtype).check(device)
        Case((150,), rows, heads=(2 * group, 2), dim=128, dtype=torch.bfloat16).check(device)


@pytest.mark.sweep(15)
@pytest.mark.parametrize("dim", range(8, 577, 8))
def test_head_dims(dim, device, schedule):
    if schedule.emulated and dim > 256 and dim % 64:
        pytest.skip("the sizes that kernels are made for, and those below 256, are enough")
    values = 8 + 5 * dim % 512  # any size up to 512, too
    for rows, dtype in [(1, torch.bfloat16), (4, torch.float16), (9, torch.bfloat16), (3, None)]:
        for dims in {(dim, min(dim, 512)), (dim, values if rows < 9 else min(dim, 64))}:
            Case((140,), rows, heads=(2, 1), dim=dims, dtype=dtype or torch.float32).check(device)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", SIZES)
def test_values_of_another_size(dims, dtype, device, schedule):
    """Whatever else is asked for: trees and chains, few rows and many, windows, chunks, sinks."""
    layouts = ["latent"] * (dims[1] <= dims[0]) + LAYOUTS
    for i, rows in enumerate([1, 9] if schedule.emulated else [1, 6, 18, 34]):
        layout = layouts[i % len(layouts)]
        case = Case((150, 3), rows, heads=(4, 2), dim=dims, dtype=dtype, layout=layout, seed=i)
        case.check(device, chunk_size=32)
        case.check(device, window=20, sinks=torch.linspace(-1.0, 1.0, 4), **case.depths())
        case.check(device, attention_chunk=50, softcap=20.0, chunk_size=48, **case.depths())
        Case((300,), rows, 0, heads=(3, 1), dim=dims, dtype=dtype, tree=False).check(device)
        if not schedule.emulated:
            chain = Case((1030,), rows, dim=dims, dtype=dtype, layout=layout, tree=False, seed=i)
            # Small logits: a row behind the border may see none of those near 0.
            chain.check(device, attention_chunk=1030 + rows // 2, scale=1 / dims[0])


@pytest.mark.sweep(3)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_columns_of_the_keys(dtype, device):
    """What lies in the same memory gives what it gives in memory of its own."""
    for rows in (1, 20):
        case = Case((150, 40), rows, heads=(8, 1), dim=(576, 512), dtype=dtype, layout="latent")
        assert case.v.data_ptr() == case.k.data_ptr()
        got = case.run(device, chunk_size=32)
        case.v = case.v.clone()
        assert same_bits(case.run(device, chunk_size=32), got)


@pytest.mark.sweep(5)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout, dtype, device):
    for rows, dim in ((1, 72), (20, 72), (3, (72, 40))):
        case = Case((300, 257), rows, dim=dim, dtype=dtype, layout=layout, seed=3)
        got = case.check(device, chunk_size=32)
        plain = Case((300, 257), rows, dim=dim, dtype=dtype, seed=3)
        assert same_bits(got, plain.run(device, chunk_size=32))


@pytest.mark.sweep(12)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layouts", [("bshd", "bhsd"), ("bhsd", "bshd"), ("sliced", "bshd")])
def test_keys_and_values_differ_in_layout(layouts, dtype, device):
    for rows in (1, 20):
        case = Case((150, 33), rows, heads=(6, 3), dtype=dtype)
        expected = case.run(device, chunk_size=32)
        case.k, case.v = map(in_layout, (case.k, case.v), layouts)
        assert same_bits(case.run(device, chunk_size=32), expected)


@pytest.mark.sweep(18)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, keys", [(1, 9), (4, 70), (16, 64), (9, 4), (3, 1), (5, 0), (1, 0)])
def test_rows_and_keys_differ(rows, keys, dtype, device):
    """A draft's last level attends to all of its levels, or to the prefix alone."""
    Case((130, 0), rows, keys, dtype=dtype).check(device)
    Case((130, 7), rows, keys, dtype=dtype, tree=False).check(device, chunk_size=16)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch(dtype, device, schedule):
    case = Case((0, 700, 64, 1100), 9, dtype=dtype)
    got = case.check(device, chunk_size=64)
    for b in range(4):  # batch mates do not matter; on GPUs they change how work is cut
        alone = ops.tree_attention(
            case.q[b : b + 1].to(device),
            case.k[b : b + 1].to(device),
            case.v[b : b + 1].to(device),
            case.prefix_lens[b : b + 1].to(device),
            case.mask[b : b + 1].to(device),
            chunk_size=64,
        )
        own = [t[b : b + 1] for t in got]
        if device == "cpu" and not schedule.emulated:
            assert same_bits(own, alone)
        else:
            assert_close(own, [t.cpu() for t in alone])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap, dtype, device):
    Case((200,), 9, dtype=dtype, scale=3.0).check(device, softcap=softcap)
    Case((200,), 1, dtype=dtype, scale=30.0, tree=False).check(
        device, softcap=softcap, chunk_size=8
    )


@pytest.mark.parametrize("scale", [0.0, 0.3, -0.2])
def test_scale(scale, device):
    for dtype in DTYPES:
        Case((100,), 9, dtype=dtype).check(device, scale=scale)
        Case((100,), 9, dtype=dtype).check(device, scale=scale, softcap=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks(dtype, device):
    case = Case((200, 0), 9, dtype=dtype)
    sinks = torch.tensor([-INF, -1.0, 0.5, 8.0])
    out, lse, _ = case.check(device, sinks=sinks)
    plain, plain_lse, _ = case.run(device)
    assert torch.equal(lse, plain_lse)  # over the keys alone
    assert torch.equal(out[:, :, 0], plain[:, :, 0])
    Case((0,), 2, 0, dtype=dtype, tree=False).check(device, sinks=sinks)


@pytest.mark.sweep(11)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 40])
def test_options_together(window, dtype, device):
    """A sink is one key more without a value, whatever is done to the logits of the others."""
    for rows in (2, 17):
        case = Case((130, 9), rows, dtype=dtype, seed=rows)
        sinks = torch.linspace(-1.0, 3.0, 4)
        for softcap in (0.0, 3.0):
            options = {"softcap": softcap, "window": window}
            out, lse, _ = case.check(device, sinks=sinks, **options)
            plain, plain_lse, _ = case.run(device, **options)
            assert torch.equal(lse, plain_lse)
            share = torch.sigmoid(lse - sinks)[..., None]
            assert_close([out], [(plain * share).to(dtype)])


@pytest.mark.sweep(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 2, 7, 64, 129, 500, 100000])
def test_window(window, dtype, device):
    for prefix in (0, 5, 333):
        case = Case((prefix, 20), 40, dtype=dtype, seed=window)
        case.check(device, window=window, chunk_size=16, **case.depths())
        case.check(device, window=window)  # positions of a chain
        chain = Case((prefix, 2), 12, dtype=dtype, tree=False)
        chain.check(device, window=window, chunk_size=24)
        few = Case((prefix, 2), 3, 12, dtype=dtype)
        few.check(device, window=window, **few.depths())
        depths = torch.tensor([[0, 2, 1, 3] * 3] * 2, dtype=torch.int32)
        chain.check(device, window=window, q_depths=depths, k_depths=depths)


@pytest.mark.sweep(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 7, 16, 64, 129, 500, 100000])
def test_attention_chunk(size, dtype, device, schedule):
    """A border lies in the prefix, where it ends, in the tree, behind it, and there are several."""
    prefixes = {0, 5, 333, size % 1000, max(2 * size % 1000 - 2, 0)}
    if schedule.emulated:  # a long prefix takes seconds
        prefixes = {5, min(size, 129)} if size > 64 else {size, 2 * size - 2}
    for prefix in sorted(prefixes):
        case = Case((prefix, 20), 40, dtype=dtype, seed=size)
        case.check(device, attention_chunk=size, chunk_size=16, **case.depths())
        case.check(device, attention_chunk=size)  # positions of a chain
        chain = Case((prefix, 2), 12, dtype=dtype, tree=False)
        chain.check(device, attention_chunk=size, chunk_size=24)
        few = Case((prefix, 2), 3, 12, dtype=dtype)
        few.check(device, attention_chunk=size, **few.depths())
        depths = torch.tensor([[0, 2, 1, 3] * 3] * 2, dtype=torch.int32)
        chain.check(device, attention_chunk=size, q_depths=depths, k_depths=depths)
        chain.check(device, attention_chunk=size, q_depths=depths)


@pytest.mark.parametrize("prefix", [0, 5, 14, 15, 16, 40])
def test_attention_chunk_of_a_text(prefix, device):
    """A token sees those of its own chunk, itself and before; nothing of what is left is read."""
    case = Case((prefix,), 20, tree=False)
    at = torch.arange(prefix + 20)
    mask = (at[prefix:, None] // 16 == at // 16) & (at[prefix:, None] >= at)
    q, k, v = (t.transpose(1, 2) for t in (case.q, case.k[:, : len(at)], case.v[:, : len(at)]))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    got = case.run(device, attention_chunk=16)[0]
    torch.testing.assert_close(got, want.transpose(1, 2), rtol=1e-5, atol=1e-5)
    for t in (case.k, case.v):
        t[:, : prefix // 16 * 16] = 1e30
    assert torch.equal(case.run(device, attention_chunk=16)[0], got)


def test_depths_alone_change_nothing(device):
    case = Case((100,), 40)
    assert same_bits(case.run(device), case.run(device, **case.depths()))


@pytest.mark.sweep(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 32, 64, 100, 128, 256, 1000, 1 << 20])
def test_chunk_lse(chunk_size, dtype, device, schedule):
    for prefix in (0, 1, 64, 600 if schedule.emulated else 1500):
        for rows in (1, 10):
            case = Case((prefix,), rows, dtype=dtype, scale=2.0)
            got = case.check(device, chunk_size=chunk_size)
            assert same_bits(case.run(device)[:2], got[:2])
            # All chunks together are the prefix.
            alone = ops.tree_attention(
                *(t.to(device) for t in (case.q, case.k, case.v, case.prefix_lens)), num_tree_keys=0
            )[1].cpu()
            torch.testing.assert_close(got[2].logsumexp(-1), alone, rtol=3e-6, atol=3e-6)


@pytest.mark.sweep(9)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 24, 32, 48, 100, 256])
def test_the_last_chunk_is_full(chunk_size, dtype, device):
    """The prefix ends with a chunk, and the cache with the prefix: nothing is behind either."""
    for chunks in (1, 2 if chunk_size > 64 else 5):
        for rows in (1, 18):
            case = Case((chunks * chunk_size,) * 2, rows, 0, dtype=dtype, spare=0, tree=False)
            assert case.check(device, chunk_size=chunk_size)[2].isfinite().all()


@pytest.mark.sweep(7)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [15, 31, 63, 127, 143])
def test_one_key_from_a_whole_tile(prefix, dtype, device):
    """The key that is missing does not count: there is none, or some rows do not see it."""
    for rows in (1, 18):
        for spare in (0, 1):
            case = Case((prefix, prefix), rows, 0, dtype=dtype, spare=spare, tree=False)
            case.check(device)
            case.check(device, chunk_size=16)
        case = Case((prefix, prefix), rows, 3, dtype=dtype)
        visible = torch.rand(2, rows, 3, generator=case.generator) < 0.5
        visible[0, :, 0], visible[1, 0, 0] = False, True
        case.mask = pack_mask(visible)
        case.check(device)


def test_chunk_lse_of_chunks_without_weight(device):
    """A chunk far below the others still has its exact value."""
    case = Case((1024,), 3, heads=(2, 2), tree=False)
    case.q[:] = 1.0
    case.k[:, :1027] = -torch.arange(1027)[:, None, None] * 0.05  # logits down to -410
    for chunk_size in (32, 100, 256):
        got = case.check(device, chunk_size=chunk_size)[2]
        assert got.isfinite().sum() == 3 * 2 * -(-1024 // chunk_size)


def test_large_logits(device):
    for dtype in DTYPES:
        Case((300,), 6, dtype=dtype, scale=40.0).check(device)
        case = Case((300,), 6, dtype=dtype)
        case.k[:, :306] += 20.0  # a common offset
        case.check(device)


def test_many_rows(device):
    """More rows than any tree: all the same."""
    Case((700,), 300, dim=32, dtype=torch.bfloat16).check(device)
    Case((40,), 600, 700, heads=(3, 1), dim=16).check(device, chunk_size=16)
    Case((100,), 2048, heads=(1, 1), dim=8, tree=False).check(device)


def test_wide_trees_with_long_paths(device, schedule):
    """Ancestors in many blocks of the line, far apart in their slots."""
    nodes = 200 if schedule.emulated else 900
    case = Case((100,), nodes, heads=(2, 1), dim=16)
    parents = torch.arange(nodes) - 2  # two interleaved chains
    parents[1] = -1
    case.mask = pack_mask(ancestor_mask(parents))[None]
    case.check(device)
    case.mask = pack_mask(torch.rand(1, nodes, nodes, generator=case.generator) < 0.6)
    case.check(device)


def test_fuzz(device, count=60):
    g = torch.Generator().manual_seed(11)

    def draw(*choices):
        return choices[int(torch.randint(0, len(choices), (1,), generator=g))]

    for seed in range(count):
        prefixes = [
            int(torch.randint(0, draw(3, 140, 1200), (1,), generator=g))
            for _ in range(draw(1, 2, 3))
        ]
        rows = draw(1, 1, 2, 3, 6, 11, 30, 70)
        keys = draw(None, None, rows + draw(1, 40), draw(0, 1, 70))
        kv = draw(1, 2, 3)
        case = Case(
            prefixes,
            rows,
            keys,
            heads=(kv * draw(1, 1, 2, 4, 7), kv),
            dim=draw(8, 24, 64, 64, 80, 128, *SIZES[:4]),
            dtype=draw(*DTYPES),
            layout=draw(*LAYOUTS),
            spare=draw(0, 1, 200),
            tree=draw(True, True, False),
            seed=seed,
        )
        options = {"chunk_size": draw(0, 0, 16, 32, 50, 256), "softcap": draw(0.0, 0.0, 5.0)}
        if draw(True, False, False):
            options[draw("window", "attention_chunk")] = draw(1, 10, 200)
            if case.parents and case.keys >= rows and draw(True, False):
                options |= case.depths()
        if draw(True, False, False):
            options["sinks"] = torch.randn(case.q.shape[2], generator=g)
        case.check(device, **options)


@pytest.mark.long
def test_long_fuzz(device):
    test_fuzz(device, 3000)


# --- How a GPU cuts the work ----------------------------------------------------------------------


@pytest.mark.sweep(14)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256, 72, 136])
@pytest.mark.parametrize("rows", [5, 13, 25, 33, 70])
def test_row_blocks(rows, dim, device):
    """Each kernel runs: blocks of 16, 32 and 64 rows, more than one block; parts of few tiles."""
    dtype = torch.float16 if rows % 2 else torch.bfloat16
    case = Case((150,), rows, heads=(2, 1), dim=dim, dtype=dtype, seed=rows)
    case.check(device)
    case.check(device, chunk_size=32 if rows < 30 else 48)
    case.check(device, chunk_size=24 if rows < 30 else 200)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("dtype", DTYPES)
def test_multiprocessors(dtype, device, schedule):
    """Parts go from one per unit, or several units per block, to one per tile."""
    for prefixes, rows, heads in [
        ((700,), 3, (4, 2)),
        ((90, 0, 400), 9, (6, 2)),
        ((300,), 50, (2, 1)),
    ]:
        case = Case(prefixes, rows, heads=heads, dtype=dtype)
        for multiprocessors in (1, 2, 7, 40):
            with schedule(multiprocessors=multiprocessors):
                case.check(device, chunk_size=100, sinks=torch.linspace(-2.0, 2.0, heads[0]))
            if not schedule.emulated:
                break


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_parts_than_lanes(dtype, device, schedule):
    """A unit lies in more blocks than a warp of the combine has lanes."""
    with schedule(multiprocessors=40):
        Case((3000,), 3, heads=(1, 1), dtype=dtype).check(device, chunk_size=100)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("dtype", DTYPES)
def test_schedules_do_not_change_bits(dtype, device, schedule):
    for rows, chunk_size in [(3, 0), (9, 32), (40, 100)]:
        case = Case((500, 30), rows, heads=(4, 2), dtype=dtype)
        first = case.run(device, chunk_size=chunk_size)
        for seed, kind in enumerate(KINDS):
            with schedule(seed=seed, kind=kind):
                assert same_bits(case.run(device, chunk_size=chunk_size), first)


def test_many_sequences(device):
    """More than a warp looks at in one go; most of them short."""
    prefixes = [7 * b % 50 for b in range(70)]
    prefixes[40] = 900
    Case(prefixes, 2, heads=(2, 1), dtype=torch.bfloat16).check(device, chunk_size=16)
    Case(prefixes, 2, heads=(2, 1), dtype=torch.bfloat16).check(device, window=40)


def test_graph_replay_with_other_lengths(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    lens = [(1, 0), (700, 64), (3000, 2999), (0, 0)]
    for rows, options in [(8, {}), (20, {"chunk_size": 32}), (1, {"window": 100})]:
        case = Case((3000, 3000), rows, dtype=torch.bfloat16)
        arguments = [t.to(device) for t in (case.q, case.k, case.v, case.prefix_lens, case.mask)]
        graph, got = capture(functools.partial(ops.tree_attention, *arguments, **options))
        for prefixes in lens:
            arguments[3].copy_(torch.tensor(prefixes, dtype=torch.int32))
            graph.replay()
            want = ops.tree_attention(*arguments, **options)
            assert same_bits(got, want)


# --- Properties of trees ----------------------------------------------------------------------


@pytest.mark.sweep(13)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [0, 100, 1020])
def test_chain_is_causal_sdpa(prefix, dtype, device):
    rows = 20
    case = Case((prefix,), rows, heads=(4, 2), dtype=dtype, tree=False)
    total = prefix + rows
    mask = torch.ones(rows, total, dtype=torch.bool).tril(prefix)
    q, k, v = (t.double().transpose(1, 2) for t in (case.q, case.k[:, :total], case.v[:, :total]))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    out = case.run(device)[0]
    eps = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(out.double(), want.transpose(1, 2), rtol=eps, atol=eps)
    # A mask that says the same gives the same bits.
    case.mask = pack_mask(torch.ones(1, rows, rows, dtype=torch.bool).tril())
    assert torch.equal(case.run(device)[0], out)


def test_star_and_all_visible(device):
    """Roots without children see the prefix and themselves; with a full mask all see all."""
    case = Case((90,), 33, heads=(2, 2))
    case.mask = pack_mask(torch.eye(33, dtype=torch.bool))[None]
    case.check(device)
    case.mask = torch.full((1, 33, 1), -1)  # bits past the last key do not count
    out = case.check(device)[0]
    q, k, v = (t.transpose(1, 2) for t in (case.q, case.k[:, :123], case.v[:, :123]))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_powers_of_two_tell_which_keys_were_seen(device):
    """With equal logits, each key adds its own power of two: the sum says exactly who was seen."""
    for rows, prefix in [(1, 0), (1, 37), (33, 0), (64, 21), (128, 64)]:
        case = Case((prefix,), rows, heads=(2, 1), dim=64)
        total = prefix + rows
        case.k[:, :total] = 0
        case.v[:] = NAN
        case.v[:, :total] = 0
        for key in range(total):
            case.v[0, key, 0, key // 8] = 2.0 ** (key % 8)
        out, lse, _ = case.run(device)
        visible = torch.cat([torch.ones(rows, prefix), case.visible[0]], 1).double()
        sums = (out[0, :, 0].double() * visible.sum(-1, keepdim=True)).round().long()
        seen = (sums[..., None] >> torch.arange(8)) & 1
        assert torch.equal(seen.flatten(1)[:, :total].double(), visible)
        torch.testing.assert_close(lse[0, :, 0].double().exp(), visible.sum(-1), rtol=1e-5, atol=0)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("dtype", DTYPES)
def test_path_unrolling(dtype, device, schedule):
    """Each path from the root is a chain: on the CPU, to the bit (see also row_invariance)."""
    for prefix in (0, 120, 1000):
        case = Case((prefix,), 31, heads=(4, 2), dtype=dtype)
        out, lse, _ = case.run(device)
        parents = case.parents[0]
        for leaf in set(range(31)) - set(parents.tolist()):
            path = [leaf]
            while parents[path[-1]] >= 0:
                path.append(int(parents[path[-1]]))
            path.reverse()
            slots = [prefix + node for node in path]
            k, v = (torch.cat([t[:, :prefix], t[:, slots]], 1) for t in (case.k, case.v))
            chain = ops.tree_attention(
                *(t.to(device) for t in (case.q[:, path], k, v, case.prefix_lens))
            )
            if device == "cpu" and not schedule.emulated:
                assert torch.equal(chain[0], out[:, path]) and torch.equal(chain[1], lse[:, path])
            else:
                assert_close([t.cpu() for t in chain[:2]], (out[:, path], lse[:, path]))


def test_permuted_nodes(device):
    """Node order need not be topological: nodes in another order, results in that order."""
    case = Case((77,), 40)
    out, lse, _ = case.run(device)
    order = torch.randperm(40, generator=case.generator)
    case.q = case.q[:, order]
    for t in (case.k, case.v):
        t[:, 77:117] = t[:, 77 + order]
    case.mask = pack_mask(case.visible[:, order][:, :, order])
    permuted = case.check(device)
    torch.testing.assert_close(permuted[0], out[:, order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(permuted[1], lse[:, order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_parts_merged(dtype, device):
    """O4: prefix and tree apart, merged by their log-sum-exps."""
    prefix = 150
    case = Case((prefix,), 20, dtype=dtype)
    out, lse, _ = case.run(device)
    q, mask = case.q.to(device), case.mask.to(device)
    k, v = case.k.to(device), case.v.to(device)
    lens = case.prefix_lens.to(device)
    a = ops.tree_attention(q, k, v, lens, num_tree_keys=0)
    b = ops.tree_attention(q, k[:, prefix:], v[:, prefix:], torch.zeros_like(lens), mask)
    merged, merged_lse = ops.merge_states(a[0], a[1], b[0], b[1])
    eps = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(merged.cpu(), out, rtol=eps, atol=eps)
    torch.testing.assert_close(merged_lse.cpu(), lse, rtol=1e-5, atol=1e-5)


# --- Bits -------------------------------------------------------------------------------------


@pytest.mark.sweep(20)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads, dim",
    [((4, 1), 128), ((2, 2), 64), ((7, 1), 80), ((3, 3), 8), ((2, 2), (192, 128)),
     ((4, 1), (96, 64)), ((8, 1), (576, 512)), ((2, 1), (24, 40))],
)  # fmt: skip
def test_row_invariance(heads, dim, dtype):
    """A row's bits depend on its query and the keys it sees, in order, and on nothing else."""
    for prefix in (0, 100, 127, 1020):
        case = Case((prefix,), 37, heads=heads, dim=dim, dtype=dtype, seed=prefix)
        got = case.run(chunk_size=32)
        for row in (0, 1, 5, 17, 36):
            # The row alone, in the same tree.
            alone = ops.tree_attention(
                case.q[:, row : row + 1],
                case.k,
                case.v,
                case.prefix_lens,
                case.mask[:, row : row + 1].contiguous(),
                num_tree_keys=37,
                chunk_size=32,
            )
            assert same_bits(alone, [t[:, row : row + 1] for t in got])
            # Plain decoding: all ancestors are in the prefix, nothing lies between them.
            path = case.visible[0, row].nonzero().flatten()
            slots = torch.cat([torch.arange(prefix), prefix + path])
            k, v = (
                torch.nn.functional.pad(t[:, slots], (0, 0, 0, 0, 0, 9)) for t in (case.k, case.v)
            )
            lens = torch.tensor([prefix + len(path) - 1], dtype=torch.int32)
            plain = ops.tree_attention(case.q[:, row : row + 1], k, v, lens)
            assert same_bits(plain[:2], [t[:, row : row + 1] for t in got[:2]])
            # The same, all keys being called prefix.
            prefix_only = ops.tree_attention(
                case.q[:, row : row + 1], k, v, lens + 1, num_tree_keys=0
            )
            assert same_bits(prefix_only[:2], plain[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 72, 192, 256, 512, (192, 128), (96, 64), (64, 80), (576, 512)])
def test_few_rows(dim, dtype):
    """A row has the bits that it has alone: some numbers of rows have kernels of their own."""
    case = Case((300,), 13, heads=(1, 1), dim=dim, dtype=dtype, tree=False)
    k, v = case.k[:, :300], case.v[:, :300]
    for rows in range(1, 14):
        together = ops.tree_attention(
            case.q[:, :rows], k, v, case.prefix_lens, num_tree_keys=0, chunk_size=64
        )
        alone = ops.tree_attention(
            case.q[:, rows - 1 : rows], k, v, case.prefix_lens, num_tree_keys=0, chunk_size=64
        )
        assert same_bits(alone, [t[:, rows - 1 :] for t in together])


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_row_invariance(dtype):
    """A row of a chunk of the prompt has the bits of the same row, decoded alone."""
    prefix = 130
    for rows, heads in ((33, (2, 1)), (2048, (1, 1))):
        case = Case((prefix,), rows, heads=heads, dtype=dtype, tree=False)
        got = case.run()
        for row in {0, 1, 15, 16, 31, 32, 255, 256, 1023, 1500, rows - 1} & set(range(rows)):
            lens = torch.tensor([prefix + row], dtype=torch.int32)
            alone = ops.tree_attention(case.q[:, row : row + 1], case.k, case.v, lens)
            assert same_bits(alone[:2], [t[:, row : row + 1] for t in got[:2]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_window_row_invariance(dtype):
    """The same holds with a window: a tree's node at P + depth, plain decoding at its position."""
    for prefix, window in [(100, 50), (300, 150), (300, 4)]:
        case = Case((prefix,), 30, heads=(4, 2), dtype=dtype)
        got = case.run(window=window, **case.depths())
        for row in range(30):
            path = case.visible[0, row].nonzero().flatten()
            slots = torch.cat([torch.arange(prefix), prefix + path])
            lens = torch.tensor([prefix + len(path) - 1], dtype=torch.int32)
            plain = ops.tree_attention(
                case.q[:, row : row + 1], case.k[:, slots], case.v[:, slots], lens, window=window
            )
            assert same_bits(plain[:2], [t[:, row : row + 1] for t in got[:2]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_chunk_row_invariance(dtype):
    """And with chunks, of which a tree may lie in two and more."""
    for prefix, size in [(100, 50), (98, 50), (300, 302), (300, 4), (0, 3)]:
        case = Case((prefix,), 30, heads=(4, 2), dim=(64, 32), dtype=dtype)
        got = case.run(attention_chunk=size, **case.depths())
        for row in range(30):
            path = case.visible[0, row].nonzero().flatten()
            slots = torch.cat([torch.arange(prefix), prefix + path])
            lens = torch.tensor([prefix + len(path) - 1], dtype=torch.int32)
            plain = ops.tree_attention(
                case.q[:, row : row + 1],
                case.k[:, slots],
                case.v[:, slots],
                lens,
                attention_chunk=size,
            )
            assert same_bits(plain[:2], [t[:, row : row + 1] for t in got[:2]])


@pytest.mark.sweep(65)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128, 256, (192, 128)])
@pytest.mark.parametrize("group", [1, 2, 4, 7])
def test_number_of_rows_does_not_change_bits(group, dim, dtype):
    """Few rows go another way through full blocks than many do; both sum in the same order."""
    ways = [
        {},
        {"chunk_size": 32, "softcap": 5.0},
        {"window": 150, "chunk_size": 48},
        {"attention_chunk": 130, "chunk_size": 64},
        {"sinks": torch.linspace(-1.0, 2.0, 2 * group), "chunk_size": 200},
    ]
    seed = dim if isinstance(dim, int) else sum(dim)
    layout = LAYOUTS[(group + seed // 8) % 3]
    case = Case((300,), 40, heads=(2 * group, 2), dim=dim, dtype=dtype, layout=layout, seed=seed)
    for i, options in enumerate(ways):
        many = case.run(**options)
        for rows in {1 + i, 8 // group, 8 // group + 1, 9 - i}:
            few = ops.tree_attention(
                case.q[:, -rows:],
                case.k,
                case.v,
                case.prefix_lens,
                case.mask[:, -rows:].contiguous(),
                num_tree_keys=40,
                **options,
            )
            assert same_bits(few, [t[:, -rows:] if t.dim() > 1 else t for t in many])


def test_threads_do_not_change_bits():
    for heads, prefix, rows, chunk_size in [
        ((4, 1), 3000, 1, 0),
        ((4, 1), 3000, 33, 32),
        ((2, 2), 2500, 7, 100),
        ((8, 4), 1500, 300, 256),
        ((6, 3), 17000, 1, 48),  # items of several segments with two threads, the last one shorter
        ((4, 2), 5000, 3, 0),
    ]:
        dim = 64 if chunk_size or rows == 1 else (64, 96)
        case = Case((prefix, prefix // 2), rows, heads=heads, dim=dim, dtype=torch.bfloat16)
        found = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(case.run(chunk_size=chunk_size))
        assert all(same_bits(found[0], other) for other in found[1:])


def test_calls_leave_no_trace(device):
    """Scratch memory of one call does not reach the next, whatever the shapes."""
    cases = [
        (Case((900,), 60, heads=(4, 1), dtype=torch.bfloat16), {"chunk_size": 100}),
        (Case((3,), 2, heads=(1, 1), dim=8), {}),
        (Case((0,), 130, heads=(2, 1), dim=256, dtype=torch.float16), {"window": 3}),
        (Case((2500,), 1, heads=(2, 1)), {"chunk_size": 7}),
        (Case((200,), 20, heads=(4, 1), dim=(576, 512), dtype=torch.bfloat16), {}),
        (Case((300,), 9, dim=(24, 200)), {"attention_chunk": 301}),
    ]
    first = [case.run(device, **options) for case, options in cases]
    for _ in range(2):
        for (case, options), expected in zip(reversed(cases), reversed(first), strict=True):
            assert same_bits(case.run(device, **options), expected)


def test_every_instruction_set():
    """Tests of all kernels pass by each instruction set below the one in use."""
    tests = "fuzz or row_invariance or few_rows or number_of_rows or head_dims or without_weight"
    tests = f"({tests}) and not (emulated or cuda)"
    for isa in isa_bits.runnable()[:-1]:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", __file__, "-x", "-k", tests],
            env={**os.environ, "SPECEXTEND_CPU_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout[-3000:]


# --- Edges ------------------------------------------------------------------------------------


def check_masked_keys(case: Case, device) -> None:
    """Check two sequences, the second without a prefix, with NaN in tree keys that no row sees."""
    keys = case.keys
    visible = torch.rand(2, case.rows, keys, generator=case.generator) < 0.3
    visible[:, 0] = False
    visible[:, :, ::3] = False
    case.mask = pack_mask(visible)
    for t in (case.k, case.v):
        for b, prefix in enumerate(case.prefixes):
            t[b, prefix : prefix + keys][~visible[b].any(0)] = NAN
    out, lse, chunk_lse = case.check(device, chunk_size=16)
    assert (out[1, 0] == 0).all() and (lse[1, 0] == -INF).all()
    assert (chunk_lse[1] == -INF).all()


@pytest.mark.sweep(5)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_keys_may_hold_anything(dtype, device):
    """Keys of the tree that no row sees are NaN; a row that sees nothing gives 0 and -inf."""
    for rows, heads in [(1, (4, 2)), (9, (2, 2)), (40, (4, 1))]:
        case = Case((70, 0), rows, 40, heads=heads, dtype=dtype)
        check_masked_keys(case, device)


def test_garbage_in_outputs_memory_of_unused_chunks(device):
    got = Case((0,), 2, 0, spare=500, tree=False).check(device, chunk_size=16)[2]
    assert (got == -INF).all() and got.shape[-1] == -(-500 // 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_of_elements_are_no_numbers(dtype):
    """Two elements that are moved as one word may look like a denormal number."""
    case = Case(rows=20, heads=(1, 1), dtype=dtype)
    case.q[..., 1::2] = 0
    expected = case.run()
    try:
        assert torch.set_flush_denormal(True)
        assert same_bits(case.run(), expected)
    finally:
        torch.set_flush_denormal(False)


def test_nan_stays_in_its_row(device):
    case = Case((200,), 20, heads=(4, 2), dtype=torch.bfloat16)
    clean = case.run(device)
    case.q[0, 7, 1] = NAN
    out, lse, _ = case.run(device)
    assert out[0, 7, 1].isnan().all() and lse[0, 7, 1].isnan()
    out[0, 7, 1], lse[0, 7, 1] = clean[0][0, 7, 1], clean[1][0, 7, 1]
    assert torch.equal(out, clean[0]) and torch.equal(lse, clean[1])


def test_prefix_lens_are_clamped(device):
    case = Case((50, 50), 4, spare=0)
    expected = case.run(device)
    case.prefix_lens = torch.tensor([51, 2**31 - 1], dtype=torch.int32)
    assert same_bits(case.run(device), expected)
    case.prefix_lens = torch.tensor([-1, -(2**31)], dtype=torch.int32)
    negative = case.run(device)
    case.prefix_lens = torch.zeros(2, dtype=torch.int32)
    assert same_bits(case.run(device), negative)


@pytest.mark.parametrize("batch, rows, capacity", [(0, 3, 5), (2, 0, 5), (1, 2, 0)])
def test_empty(batch, rows, capacity, device):
    q = torch.randn(batch, rows, 4, 16, device=device)
    k = torch.randn(batch, capacity, 2, 16, device=device)
    lens = torch.zeros(batch, dtype=torch.int32, device=device)
    out, lse, chunk_lse = ops.tree_attention(q, k, k, lens, num_tree_keys=0, chunk_size=4)
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert chunk_lse.shape == (batch, rows, 4, -(-capacity // 4))
    assert (out == 0).all() and (lse == -INF).all()
    assert ops.tree_attention(q, k, k, lens, num_tree_keys=0)[2].shape == (0,)


def test_cache_without_rows(device):
    """Empty tensors, whose pointers may be null, are not the absence of tensors."""
    q, k = torch.randn(1, 3, 4, 64, device=device), torch.zeros(1, 0, 2, 64, device=device)
    lens = torch.zeros(1, dtype=torch.int32, device=device)
    out, lse, _ = ops.tree_attention(q, k, k, lens, num_tree_keys=0)
    assert (out == 0).all() and (lse == -INF).all()


def test_opcheck(device):
    case = Case((20, 3), 4, 6)
    op = torch.ops.specextend.tree_attention.default
    arguments = tuple(t.to(device) for t in (case.q, case.k, case.v, case.prefix_lens))
    torch.library.opcheck(op, arguments, {"num_tree_keys": 6})
    depths = {name: t.to(device) for name, t in case.depths().items()}
    sinks = torch.zeros(4, device=device)
    for options in ({"chunk_size": 8}, {"window": 3, "sinks": sinks, "softcap": 2.0, **depths}):
        options = {"num_tree_keys": 6, "scale": 0.1, **options}
        torch.library.opcheck(op, (*arguments, case.mask.to(device)), options)
    q, k, _, lens = arguments
    for v in (k[..., :40], torch.zeros(*k.shape[:3], 80, device=device)):
        options = {"num_tree_keys": 6, "attention_chunk": 21, **depths}
        torch.library.opcheck(op, (q, k, v, lens, case.mask.to(device)), options)


def test_error_texts(device):
    case = Case((20,), 4)
    good = dict(q=case.q, k=case.k, v=case.v, prefix_lens=case.prefix_lens, tree_mask=case.mask)

    def fails(text, **changes):
        arguments = {**good, **changes}
        arguments = {
            n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()
        }
        with pytest.raises(RuntimeError, match="tree_attention: " + text):
            ops.tree_attention(**arguments)

    fails(r"q must be \[B, M, Hq, D\], got \[4, 4, 64\]", q=case.q[0])
    fails("k must be float32, got bfloat16", k=case.k.bfloat16())
    fails("v must be float32, got float64", v=case.v.double())
    fails("q must be float32, float16 or bfloat16, got float64", q=case.q.double())
    fails(r"v must have shape \[1, 27, 2, 64\], got \[1, 26, 2, 64\]", v=case.v[:, 1:])
    fails(
        r"k must have shape \[1, 27, 2, 64\], got \[2, 27, 2, 64\]", k=case.k.expand(2, -1, -1, -1)
    )
    fails("the heads of q must be a multiple of those of k, got 3 and 2", q=case.q[:, :, :3])
    fails(r"v must be \[B, S, Hkv, Dv\], got \[27, 2, 64\]", v=case.v[0])
    fails(r"v must have shape \[1, 27, 2, 64\], got \[1, 27, 1, 64\]", v=case.v[:, :, :1])
    fails(r"k must have shape \[1, 27, 2, 64\], got \[1, 27, 2, 40\]", k=case.k[..., :40])
    for dim in (0, 4, 12, 584):
        q, k = torch.zeros(1, 4, 4, dim), torch.zeros(1, 27, 2, dim)
        wanted = r"must be a multiple of 8 in \[8, 576\]"
        fails(rf"the head dimension of q and k {wanted}, got {dim}", q=q, k=k)
    for dim in (0, 4, 12, 520):
        wanted = r"must be a multiple of 8 in \[8, 512\]"
        fails(rf"the head dimension of v {wanted}, got {dim}", v=torch.zeros(1, 27, 2, dim))
    fails("q must have a last stride of 1, got 2", q=case.q.repeat_interleave(2, -1)[..., ::2])
    fails("prefix_lens must be int32, got int64", prefix_lens=case.prefix_lens.long())
    fails(r"prefix_lens must have shape \[1\], got \[2\]", prefix_lens=case.prefix_lens.repeat(2))
    fails("tree_mask must be int64, got bool", tree_mask=case.visible)
    fails(
        r"tree_mask must have shape \[1, 4, 2\], got \[1, 4, 1\]", num_tree_keys=65, **_grown(case)
    )
    fails("num_tree_keys must be between 0 and the 27 rows of k, got 28", num_tree_keys=28)
    fails("num_tree_keys must be between 0 and the 27 rows of k, got -1", num_tree_keys=-1)
    fails(r"window must be in \[0, 2147483647\], got -1", window=-1)
    fails(r"attention_chunk must be in \[0, 2147483647\], got -1", attention_chunk=-1)
    fails(
        "window and attention_chunk must not be given together, got 3 and 8",
        window=3,
        attention_chunk=8,
    )
    fails(r"chunk_size must be in \[0, 2147483647\], got -5", chunk_size=-5)
    fails("softcap must be finite and not negative, got -1", softcap=-1.0)
    fails("scale must be finite, got inf", scale=math.inf)
    fails(r"sinks must have shape \[4\], got \[2\]", sinks=torch.zeros(2))
    fails("sinks must be float32, got float64", sinks=torch.zeros(4).double())
    depths = torch.zeros(1, 5, dtype=torch.int32)
    fails(r"q_depths must have shape \[1, 4\], got \[1, 5\]", q_depths=depths)
    fails(r"k_depths must have shape \[1, 4\], got \[1, 5\]", k_depths=depths)
    fails("k_depths must be contiguous", k_depths=torch.zeros(1, 8, dtype=torch.int32)[:, ::2])


def _grown(case: Case) -> dict[str, torch.Tensor]:
    k = torch.zeros(1, 80, 2, 64)
    return {"k": k, "v": k}
