"""Trees grown by a draft against enumeration of all its continuations."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from backends import for_each

from specextend import SpecConfig, ops
from specextend.pace import FREE, Price
from specextend.tree import Tree, grow_tree, sizes

V = 5


class ToyDraft:
    """Has a next token that depends on the whole path, so that a wrong parent or mask shows."""

    def __init__(self, seed: int):
        self.seed = seed
        self.paths: list[list[int]] = []  # of each key so far
        self.calls = []

    def row(self, path) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, *path)) % 2**31)
        return 2 * torch.randn(V, generator=generator)

    def root(self) -> torch.Tensor:
        return self.row(())[None, None]

    def step(self, tokens, level, mask, num_keys, parents):
        first = num_keys - tokens.shape[1]
        self.paths = self.paths[:first]
        for slot, token in enumerate(tokens[0].tolist()):
            bits = [
                sum((int(w) >> (j % 64)) & 1 for w in [mask[0, slot, j // 64]])
                for j in range(first)
            ]
            seen = [j for j in range(first) if bits[j]]
            path = [self.paths[j][-1] for j in sorted(seen, key=lambda j: len(self.paths[j]))]
            assert len(path) == level and [len(self.paths[j]) for j in seen] == [
                *range(1, level + 1)
            ]
            self.paths.append([*path, token])
        self.calls.append((level, num_keys))
        return torch.stack([self.row(tuple(p)) for p in self.paths[first:]])[None]

    def logp(self, path) -> float:
        return sum(float(self.row(tuple(path[:i])).log_softmax(-1)[t]) for i, t in enumerate(path))


def grow(
    config: SpecConfig, depth: int, seed: int = 0, price: Price = FREE
) -> tuple[Tree, ToyDraft]:
    draft = ToyDraft(seed)
    root = torch.tensor([[3]])
    return grow_tree(root, draft.root(), draft.step, config, depth, price=price), draft


def paths_of(tree: Tree) -> list[tuple[int, ...]]:
    paths = [()]
    for node in range(1, tree.num_nodes):
        parent = int(tree.parents[0, node])
        assert 0 <= parent < node
        paths.append((*paths[parent], int(tree.tokens[0, node])))
        assert int(tree.depths[0, node]) == len(paths[-1])
    return paths[1:]


def check_mask(tree: Tree) -> None:
    """Rows are the ancestors of a node and itself (I5)."""
    for node in range(tree.num_nodes):
        expected, at = set(), node
        while at >= 0:
            expected.add(at)
            at = int(tree.parents[0, at])
        row = tree.mask[0, node].tolist()
        assert {j for j in range(64 * len(row)) if (row[j // 64] >> (j % 64)) & 1} == expected


@pytest.mark.parametrize("nodes", [1, 4, 12, 70])
@for_each(seed=range(6))
def test_best_nodes_of_all_paths(seed, nodes):
    """With a beam that keeps everything, the tree is the best n of all paths (O10)."""
    depth = 3
    config = SpecConfig(tree_nodes=nodes, tree_depth=depth, tree_top_k=V, tree_width=V**3)
    tree, draft = grow(config, depth, seed)
    everything = [p for d in range(1, depth + 1) for p in itertools.product(range(V), repeat=d)]
    best = sorted(everything, key=lambda p: -draft.logp(p))[:nodes]
    assert sorted(paths_of(tree)) == sorted(best)
    assert tree.tokens[0, 0] == 3 and tree.depth == depth
    check_mask(tree)
    before = sorted((draft.logp(p) for p in everything if len(p) < depth), reverse=True)[:nodes]
    gain = sum(torch.tensor([draft.logp(p) for p in best]).exp()) - sum(torch.tensor(before).exp())
    expected = sum(torch.tensor([draft.logp(p) for p in best]).exp())
    promise = torch.stack([expected, gain])
    torch.testing.assert_close(tree.promise[0], promise, rtol=1e-4, atol=1e-5)


@for_each(seed=range(4))
def test_beam_follows_the_best(seed):
    """Each level expands the best nodes of the one before, and no others."""
    config = SpecConfig(tree_nodes=9, tree_depth=4, tree_top_k=3, tree_width=2)
    tree, draft = grow(config, 4, seed)
    beam = [()]
    offered = []
    for _ in range(4):
        children = []
        for path in beam:
            top = draft.row(path).topk(3).indices.tolist()
            children += [(*path, t) for t in top]
        offered += children
        beam = sorted(children, key=lambda p: -draft.logp(p))[:2]
    best = sorted(offered, key=lambda p: -draft.logp(p))[:9]
    assert sorted(paths_of(tree)) == sorted(best)
    assert draft.calls == [(0, 2), (1, 4), (2, 6)]
    check_mask(tree)


def test_fixed_widths():
    config = SpecConfig(tree_shape="fixed", tree_widths=(2, 3, 4))
    tree, draft = grow(config, 3)
    assert tree.depths[0].bincount().tolist() == [1, 2, 3, 4]
    assert draft.calls == [(0, 2), (1, 5)]
    check_mask(tree)
    shallow, _ = grow(config, 2)
    assert shallow.depths[0].bincount().tolist() == [1, 2, 3]


def test_more_than_64_keys():
    config = SpecConfig(tree_nodes=100, tree_depth=3, tree_top_k=V, tree_width=100)
    tree, _ = grow(config, 3)
    assert tree.mask.shape == (1, 101, 2)
    check_mask(tree)
    # Many more while it grows, of which the draft looks at every bit.
    tree, draft = grow(config, 5)
    assert draft.calls[-1] == (3, 5 + 25 + 100 + 100)
    check_mask(tree)


def test_root_only():
    tree = Tree.root_only(torch.tensor([[7]]))
    assert tree.num_nodes == 1 and tree.depth == 0 and tree.promise is None
    assert tree.parents.tolist() == [[-1]] and tree.depths.tolist() == [[0]]
    check_mask(tree)


# ---- what pays -----------------------------------------------------------------------------------


def test_a_level_that_does_not_pay_is_not_grown():
    """The likeliest node of a level goes on as its path did on average, or the level is the last;
    the tree is the one of as many levels."""
    depths = set()
    for seed in range(12):
        for level in (0.01, 0.1, 0.3, 0.6, 2.0):
            config = SpecConfig(tree_nodes=9, tree_depth=5, tree_top_k=3, tree_width=2)
            tree, draft = grow(config, 5, seed, Price(level))
            beam, expected = [()], 1
            while True:
                children = [(*p, t) for p in beam for t in draft.row(p).topk(3).indices.tolist()]
                beam = sorted(children, key=lambda p: -draft.logp(p))[:2]
                goes_on = math.exp(draft.logp(beam[0])) ** (1 + 1 / expected)
                if expected == 5 or goes_on <= level:
                    break
                expected += 1
            assert tree.depth == expected and len(draft.calls) == expected - 1
            other, _ = grow(config, expected, seed)
            assert paths_of(tree) == paths_of(other)
            torch.testing.assert_close(tree.promise, other.promise)
            depths.add(expected)
    assert len(depths) >= 4


@pytest.mark.parametrize("node", [0.001, 0.02, 0.1, 0.3, 2.0])
def test_nodes_that_do_not_pay_are_not_proposed(node):
    """The tree is the best one of as many nodes, and promises what these promise."""
    for seed in range(6):
        config = SpecConfig(tree_nodes=20, tree_depth=3, tree_top_k=4, tree_width=3)
        whole, draft = grow(config, 3, seed)
        tree, _ = grow(config, 3, seed, Price(0.0, node))
        paying = [p for p in paths_of(whole) if math.exp(draft.logp(p)) > node]
        best = sorted(paths_of(whole), key=lambda p: -draft.logp(p))
        assert sorted(paths_of(tree)) == sorted(paying or best[:1])
        expected = sum(math.exp(draft.logp(p)) for p in paths_of(tree))
        assert float(tree.promise[0, 0]) == pytest.approx(expected, rel=1e-4)
        check_mask(tree)


@pytest.mark.parametrize("branches", [0.0, 0.4, 1.0])
def test_sizes_are_those_of_the_trees(branches):
    """Of the first nodes, however they are counted."""
    draw = random.Random(0)
    for _ in range(20):
        nodes = [(draw.randint(0, i), i) for i in range(draw.randint(1, 20))]
        trees = [Tree.of(torch.tensor([[3]]), nodes[: n + 1]) for n in range(len(nodes))]
        parents, levels = [parent for parent, _ in nodes], trees[-1].depths[0, 1:].tolist()
        found = sizes(parents, levels, branches)
        assert found.tolist() == pytest.approx([tree.size(branches) for tree in trees])
    assert Tree.root_only(torch.tensor([[3]])).size(branches) == 0


def test_branches_have_to_pay_for_the_rows_of_their_paths():
    """Of all trees of the likeliest nodes it is the one that brings most beyond its price."""
    config, counts = SpecConfig(tree_nodes=20, tree_depth=4, tree_top_k=4, tree_width=3), []
    for seed, node, share in itertools.product(range(6), (0.02, 0.05), (0.0, 0.5, 1.0)):
        whole = [grow(config.replace(tree_nodes=n), 4, seed)[0] for n in range(1, 21)]
        gains = [float(t.promise[0, 0]) - node * t.size(share) for t in whole]
        tree, _ = grow(config, 4, seed, Price(0.0, node, share))
        assert paths_of(tree) == paths_of(whole[gains.index(max(gains))])
        counts.append(tree.num_nodes)
    assert sum(counts[0::3]) > sum(counts[1::3]) > sum(counts[2::3])


def test_of_several_sequences_the_best_one_decides():
    """A level, or a node, that pays for one of them is there for all."""
    config = SpecConfig(tree_nodes=6, tree_depth=3, tree_top_k=3, tree_width=2)
    sure = torch.full((1, 1, V), -9.0).index_fill(2, torch.tensor([2]), 9.0)
    logits = torch.cat([torch.zeros(1, 1, V), sure])

    def step(tokens, level, mask, num_keys, parents):
        return logits.expand(-1, tokens.shape[1], -1)

    root, price = torch.tensor([[3], [3]]), Price(0.7, 0.7)
    tree = grow_tree(root, logits, step, config, 3, price=price)
    assert tree.depth == 3 and tree.num_nodes == 1 + 3
    alone = grow_tree(root[:1], logits[:1], step, config, 3, price=price)
    assert alone.depth == 1 and alone.num_nodes == 2


def test_a_fixed_tree_keeps_its_nodes():
    config = SpecConfig(tree_shape="fixed", tree_widths=(2, 3, 4))
    tree, _ = grow(config, 3, price=Price(0.0, 2.0))
    assert tree.depths[0].bincount().tolist() == [1, 2, 3, 4]
    tree, _ = grow(config, 3, price=Price(2.0, 2.0))
    assert tree.depths[0].bincount().tolist() == [1, 2]


def test_impossible_tokens_do_not_pay():
    config = SpecConfig(tree_nodes=3, tree_depth=3, tree_top_k=2, tree_width=2)
    for value in (-torch.inf, torch.nan):
        logits = torch.full((1, 1, V), value)
        tree = grow_tree(torch.tensor([[3]]), logits, None, config, 3, price=Price(0.1, 0.1))
        assert tree.depth == 1 and tree.num_nodes == 2


@pytest.mark.parametrize("rows", [5, 13, 64, 66])
def test_padding_is_reached_by_no_path(rows):
    tree, _ = grow(SpecConfig(tree_nodes=9, tree_depth=3, tree_top_k=3, tree_width=3), 3)
    padded = tree.padded(rows)
    count = tree.num_nodes
    assert padded.num_nodes == max(rows, count) and padded.depth == tree.depth
    for name in ("tokens", "parents", "depths"):
        assert torch.equal(getattr(padded, name)[:, :count], getattr(tree, name))
    assert torch.equal(padded.mask[:, :count, :1], tree.mask)
    assert not padded.mask[:, :count, 1:].any()
    for node in range(count, rows):
        bits = [int(w) >> b & 1 for w in padded.mask[0, node] for b in range(64)]
        assert [i for i, bit in enumerate(bits) if bit] == [node]
    choice = torch.zeros_like(padded.tokens)  # every padded node carries what the target chose
    path, _, _, _ = ops.verify_tree(padded.tokens, padded.parents, choice)
    assert path.max() < count
