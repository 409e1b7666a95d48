import itertools
import math
import random

import pytest
import torch
from backends import capture, for_each
from emulation import KINDS
from tree_cases import ancestors, unpack_mask

from specextend import ops, reference

INF = math.inf


def random_pool(seed: int):
    """Draw candidates with many ties: probabilities of 1 and 0, and rounded up along a path."""
    rng = random.Random(seed)
    batch, size = rng.randint(1, 3), rng.choice([1, 2, 5, 20, 60, 63, 64, 65, 130, 200])
    steps = rng.choice([[0.0, -1.0], [0.0, -INF, -0.5], [-0.1, -0.2, -0.3], [0.0], [1e-7, -0.3]])
    any_order = rng.random() < 0.3  # children below a much earlier candidate
    logp, parents = [], []
    for _ in range(batch):
        logp_b, parents_b = [], []
        for i in range(size):
            parent = rng.randint(-1, i - 1) if any_order else max(-1, i // 3 - 1)
            before = logp_b[parent] if parent >= 0 else 0.0
            logp_b.append(before + (rng.choice(steps) if seed % 3 else rng.choice(steps) * i))
            parents_b.append(parent)
        logp.append(logp_b)
        parents.append(parents_b)
    num_nodes = rng.choice([0, 1, size // 2, max(0, size - 1), size, min(size, 63), min(size, 64)])
    logp = torch.tensor(logp).nan_to_num(nan=-INF, posinf=INF, neginf=-INF)
    return logp, torch.tensor(parents, dtype=torch.int32), num_nodes


@for_each(seed=range(240))
def test_random_pools(seed, device):
    logp, parents, num_nodes = random_pool(seed)
    got = ops.finalize_tree(logp.to(device), parents.to(device), num_nodes=num_nodes)
    got = [t.cpu() for t in got]
    want = reference.finalize_tree(logp, parents, num_nodes=num_nodes)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    nodes, tree_parents, depths, mask = got
    visible = unpack_mask(mask, 1 + num_nodes)
    for b in range(logp.shape[0]):
        chosen = nodes[b].tolist()
        assert chosen == sorted(set(chosen))
        pool_parents = parents[b].tolist()
        assert all(pool_parents[i] == -1 or pool_parents[i] in chosen for i in chosen)
        tree = tree_parents[b].tolist()
        assert tree[0] == -1 and all(0 <= p < slot for slot, p in enumerate(tree) if slot)
        slots = [None, *chosen]
        for slot in range(1, 1 + num_nodes):
            assert slots[tree[slot]] == (None if (p := pool_parents[chosen[slot - 1]]) < 0 else p)
        for slot in range(1 + num_nodes):
            path = ancestors(tree, slot)
            assert depths[b, slot] == len(path) - 1
            assert visible[b, slot].nonzero()[:, 0].tolist() == path


@pytest.mark.parametrize(("size", "num_nodes"), [(2500, 2048), (4096, 60), (4097, 700)])
@pytest.mark.parametrize("shape", ["levels", "chain", "ties"])
def test_large_pools(size, num_nodes, shape, device):
    """More candidates than threads, than fit into shared memory, and deep ones.

    Of those in global memory several sequences, which must not share it.
    """
    generator = torch.Generator().manual_seed(size)
    reach, batch = 60 if shape == "chain" else 1500, 3 if size > 4096 else 1
    back = torch.randint(1, reach, (batch, size), generator=generator)
    parents = (torch.arange(size) - back).clamp(min=-1).int()
    logp = -torch.rand(batch, size, generator=generator)
    if shape == "ties":
        logp = logp.mul(4).round()
    got = ops.finalize_tree(logp.to(device), parents.to(device), num_nodes=num_nodes)
    for ours, theirs in zip(
        got, reference.finalize_tree(logp, parents, num_nodes=num_nodes), strict=True
    ):
        assert torch.equal(ours.cpu(), theirs)


def test_any_schedule(device, schedule):
    logp, parents = -torch.rand(2, 300).mul(20).round().to(device), torch.arange(300) // 3 - 1
    parents = parents.int().repeat(2, 1).to(device)
    expected = ops.finalize_tree(logp, parents, num_nodes=100)
    for kind in KINDS:
        with schedule(kind=kind, seed=3, multiprocessors=2):
            got = ops.finalize_tree(logp, parents, num_nodes=100)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_graph_replay(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    logp = -torch.rand(2, 300, device=device)
    parents = torch.full((2, 300), -1, dtype=torch.int32, device=device)
    graph, captured = capture(lambda: ops.finalize_tree(logp, parents, num_nodes=70))
    logp.copy_(logp.flip(-1))
    parents[:, 1:] = torch.arange(299, device=device)
    graph.replay()
    expected = ops.finalize_tree(logp, parents, num_nodes=70)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_no_stray_bits(device):
    # 65 nodes need two words; bits past the last node are 0.
    logp = -torch.rand(1, 100)
    parents = torch.full((1, 100), -1, dtype=torch.int32)
    mask = ops.finalize_tree(logp.to(device), parents.to(device), num_nodes=64)[3].cpu()
    assert mask.shape == (1, 65, 2)
    assert mask[0, 63].tolist() == [1 | -(1 << 63), 0] and mask[0, 64].tolist() == [1, 1]


@for_each(seed=range(40))
def test_no_closed_set_is_better(seed, device):
    """Enumeration says so: no ancestor-closed set of that size expects more accepted tokens."""
    rng = random.Random(seed)
    size, num_nodes = 9, rng.randint(1, 6)
    parents = [rng.randint(-1, i - 1) for i in range(size)]
    logp: list[float] = []
    for parent in parents:
        logp.append((logp[parent] if parent >= 0 else 0.0) + rng.choice([0.0, -0.3, -1.0, -2.5]))
    nodes, *_ = ops.finalize_tree(
        torch.tensor([logp], device=device),
        torch.tensor([parents], dtype=torch.int32, device=device),
        num_nodes=num_nodes,
    )
    closed = [
        subset
        for subset in itertools.combinations(range(size), num_nodes)
        if all(parents[i] == -1 or parents[i] in subset for i in subset)
    ]
    expected = {subset: sum(math.exp(logp[i]) for i in subset) for subset in closed}
    assert expected[tuple(nodes[0].tolist())] == pytest.approx(max(expected.values()), rel=1e-6)


@for_each(seed=range(12))
def test_a_whole_tree_is_the_best_of_all_sequences(seed, device):
    """expand_tree and finalize_tree against every sequence of up to three of four tokens."""
    vocab, levels, num_nodes = 4, 3, 15
    generator = torch.Generator().manual_seed(seed)
    # A draft whose next token depends on the whole path, with probabilities of 1 and 0 among them.
    table = torch.randn(levels, vocab**levels, vocab, generator=generator).mul(2).round()
    table[torch.rand(table.shape, generator=generator) < 0.2] = -INF
    table[..., 0].clamp_(min=-3)

    def logits(path: tuple[int, ...]) -> torch.Tensor:
        return table[len(path), sum(t * vocab**i for i, t in enumerate(path))]

    pool_tokens, pool_logp, pool_parents, paths = [], [], [], []
    frontier: list[tuple[int, tuple[int, ...]]] = [(-1, ())]
    beam_logp = torch.zeros(1, 1, device=device)
    for _ in range(levels):
        rows = torch.stack([logits(path) for _, path in frontier])[None].to(device)
        width = len(frontier) * vocab
        tokens, logp, beam, beam_logp = ops.expand_tree(rows, beam_logp, top_k=vocab, width=width)
        first = len(paths)
        paths += [frontier[i // vocab][1] + (t,) for i, t in enumerate(tokens.flatten().tolist())]
        pool_parents += [frontier[i // vocab][0] for i in range(width)]
        pool_tokens += tokens.flatten().tolist()
        pool_logp += logp.flatten().tolist()
        frontier = [(first + i, paths[first + i]) for i in beam[0].tolist()]
    nodes, tree_parents, depths, _ = ops.finalize_tree(
        torch.tensor([pool_logp], device=device),
        torch.tensor([pool_parents], dtype=torch.int32, device=device),
        num_nodes=num_nodes,
    )

    probability = {}
    for length in range(1, levels + 1):
        for path in itertools.product(range(vocab), repeat=length):
            p = 1.0
            for i, token in enumerate(path):
                p *= logits(path[:i]).double().softmax(-1)[token].item()
            probability[path] = p
    chosen = [paths[i] for i in nodes[0].tolist()]
    assert len(set(chosen)) == num_nodes and all(p[:-1] in chosen for p in chosen if len(p) > 1)
    best = sorted(probability.values(), reverse=True)[:num_nodes]
    assert sorted((probability[p] for p in chosen), reverse=True) == pytest.approx(best, rel=1e-5)
    for slot, path in enumerate(chosen, start=1):
        parent = tree_parents[0, slot].item()
        assert (chosen[parent - 1] if parent else ()) == path[:-1]
        assert depths[0, slot] == len(path)


def finalize(logp, parents, num_nodes, device="cpu"):
    got = ops.finalize_tree(
        torch.tensor([logp], dtype=torch.float32, device=device),
        torch.tensor([parents], dtype=torch.int32, device=device),
        num_nodes=num_nodes,
    )
    return [t[0].tolist() for t in got[:3]]


def test_a_child_of_probability_one_does_not_replace_its_parent(device):
    # All tie at 0 or at -1: the smaller depth goes first, then the lower index.
    assert finalize([0, -1, 0, 0], [-1, -1, 0, 2], 1, device) == [[0], [-1, 0], [0, 1]]
    got = finalize([-1, -1, -1, -1], [-1, 0, 1, -1], 2, device)
    assert got == [[0, 3], [-1, 0, 0], [0, 1, 1]]
    got = finalize([-1, -1, -1, -1], [-1, 0, 1, -1], 3, device)
    assert got == [[0, 1, 3], [-1, 0, 1, 0], [0, 1, 2, 1]]


def test_a_child_is_bounded_by_its_parent(device):
    # Rounding made the grandchild more probable than its parent; it still comes after it.
    got = finalize([-2, -1, -0.5, -1.5], [-1, 0, 1, -1], 3, device)
    assert got == [[0, 1, 3], [-1, 0, 1, 0], [0, 1, 2, 1]]


def test_impossible_and_undefined_candidates_fill_up(device):
    nan = math.nan
    got = finalize([-INF, nan, -5, -INF, nan], [-1, -1, -1, 2, 0], 4, device)
    assert got == [[0, 1, 2, 3], [-1, 0, 0, 0, 3], [0, 1, 1, 1, 2]]


@pytest.mark.parametrize("parent", [-7, 1, 2, 500, 2**31 - 1, -(2**31)])
def test_parents_out_of_range_are_the_root(parent, device):
    got = finalize([-1, -2, -3], [-1, parent, 0], 3, device)
    assert got == [[0, 1, 2], [-1, 0, 0, 1], [0, 1, 1, 2]]


def test_empty(device):
    logp = torch.zeros(2, 0, device=device)
    nodes, tree_parents, depths, mask = ops.finalize_tree(logp, logp.int(), num_nodes=0)
    assert nodes.shape == (2, 0)
    assert tree_parents.tolist() == [[-1], [-1]] and depths.tolist() == [[0], [0]]
    assert mask.tolist() == [[[1]], [[1]]]
    none = torch.zeros(0, 5, device=device)
    assert ops.finalize_tree(none, none.int(), num_nodes=3)[3].shape == (0, 4, 1)


def test_a_sequence_alone_is_the_same(device):
    logp, parents, num_nodes = random_pool(5)
    assert logp.shape[0] > 1
    together = ops.finalize_tree(logp.to(device), parents.to(device), num_nodes=num_nodes)
    for b in range(logp.shape[0]):
        row = slice(b, b + 1)
        alone = ops.finalize_tree(
            logp[row].to(device), parents[row].to(device), num_nodes=num_nodes
        )
        for x, y in zip(alone, together, strict=True):
            assert torch.equal(x[0], y[b])


@pytest.mark.not_emulated("the registered op is asked")
def test_opcheck(device):
    logp, parents, _ = random_pool(5)
    torch.library.opcheck(
        torch.ops.specextend.finalize_tree.default,
        (logp.to(device), parents.to(device)),
        {"num_nodes": 1},
    )


LOGP = torch.zeros(2, 4)
PARENTS = torch.full((2, 4), -1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("logp", "parents", "num_nodes", "message"),
    [
        (LOGP[0], PARENTS, 1, r"logp must be \[B, T\], got \[4\]"),
        (LOGP.half(), PARENTS, 1, "logp must be float32, got float16"),
        (torch.zeros(4, 2).mT, PARENTS, 1, "logp must be contiguous"),
        (LOGP, PARENTS[:, :3], 1, r"parents must have shape \[2, 4\], got \[2, 3\]"),
        (LOGP, PARENTS.long(), 1, "parents must be int32, got int64"),
        (LOGP, PARENTS.mT.contiguous().mT, 1, "parents must be contiguous"),
        (LOGP, PARENTS, 5, r"num_nodes must be in \[0, 4\], got 5"),
        (LOGP, PARENTS, -1, r"num_nodes must be in \[0, 4\], got -1"),
    ],
)
def test_errors(logp, parents, num_nodes, message):
    with pytest.raises(RuntimeError, match=f"finalize_tree: {message}"):
        ops.finalize_tree(logp, parents, num_nodes=num_nodes)
