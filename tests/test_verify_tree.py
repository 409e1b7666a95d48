import random

import pytest
import torch
from backends import capture, for_each
from emulation import KINDS
from tree_cases import ancestors, random_parents

from specextend import ops, reference


def random_case(seed: int):
    """Draw random trees of one size, with repeated siblings and choices that often match."""
    rng = random.Random(seed)
    batch, num_nodes = rng.randint(1, 3), rng.choice([1, 2, 3, 5, 8, 17, 33, 64, 65])
    words = rng.choice([1, 2, 3, 6])  # few tokens: siblings repeat, walks get long
    offset = rng.choice([0, 1 << 40])  # ids are 64 bits wide
    parents = [random_parents(rng, num_nodes, shuffle=seed % 2 == 1) for _ in range(batch)]
    tokens = [[offset + rng.randrange(words) for _ in range(num_nodes)] for _ in range(batch)]
    target = [[offset + rng.randrange(words) for _ in range(num_nodes)] for _ in range(batch)]
    return (
        torch.tensor(tokens),
        torch.tensor(parents, dtype=torch.int32),
        torch.tensor(target),
    )


def longest_path(tokens: list[int], parents: list[int], target: list[int]) -> list[int]:
    """Over all root paths: each edge follows the target, by the first sibling that does."""

    def follows(parent: int, child: int) -> bool:
        twins = [
            node
            for node in range(1, len(parents))
            if parents[node] == parent and tokens[node] == tokens[child]
        ]
        return tokens[child] == target[parent] and child == twins[0]

    paths = [ancestors(parents, node) for node in range(len(parents))]
    kept = [p for p in paths if all(follows(a, c) for a, c in zip(p, p[1:], strict=False))]
    best = max(kept, key=len)
    assert sum(len(p) == len(best) for p in kept) == 1
    return best


@for_each(seed=range(240))
def test_random_trees(seed, device):
    tokens, parents, target = random_case(seed)
    num_nodes = tokens.shape[1]
    got = ops.verify_tree(*(t.to(device) for t in (tokens, parents, target)))
    path, num_accepted, emitted, next_root = (t.cpu() for t in got)
    for b in range(tokens.shape[0]):
        want = longest_path(tokens[b].tolist(), parents[b].tolist(), target[b].tolist())
        text = [tokens[b, node].item() for node in want[1:]] + [target[b, want[-1]].item()]
        tail = [-1] * (num_nodes - len(want))
        assert path[b].tolist() == want + tail
        assert emitted[b].tolist() == text + tail
        assert num_accepted[b] == len(want) - 1
        assert next_root[b] == text[-1]
    for ours, theirs in zip(got, reference.verify_tree(tokens, parents, target), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0)


def test_walks_are_long_enough_to_mean_something():
    lengths = [reference.verify_tree(*random_case(seed))[1].max().item() for seed in range(240)]
    assert max(lengths) >= 6 and sum(n >= 2 for n in lengths) > 60


def test_a_sequence_alone_is_the_same(device):
    tokens, parents, target = (t.to(device) for t in random_case(11))
    assert tokens.shape[0] > 1
    together = ops.verify_tree(tokens, parents, target)
    for b in range(tokens.shape[0]):
        alone = ops.verify_tree(tokens[b : b + 1], parents[b : b + 1], target[b : b + 1])
        for x, y in zip(alone, together, strict=True):
            assert torch.equal(x[0], y[b])


def run(tokens, parents, target, device="cpu"):
    got = ops.verify_tree(
        torch.tensor([tokens], device=device),
        torch.tensor([parents], dtype=torch.int32, device=device),
        torch.tensor([target], device=device),
    )
    return [t[0].tolist() for t in got]


def test_root_only(device):
    assert run([7], [-1], [3], device) == [[0], 0, [3], 3]


def test_whole_chain(device):
    got = run([9, 1, 2, 3], [-1, 0, 1, 2], [1, 2, 3, 4], device)
    assert got == [[0, 1, 2, 3], 3, [1, 2, 3, 4], 4]


def test_the_first_of_repeated_siblings_is_taken(device):
    # Node 3 leads further, but node 1 carries the same token and comes first.
    got = run([9, 1, 1, 1, 5], [-1, 0, 0, 0, 3], [1, 8, 8, 5, 8], device)
    assert got == [[0, 1, -1, -1, -1], 1, [1, 8, -1, -1, -1], 8]


def test_many_repeated_siblings(device, schedule):
    """All of them would follow their parent; many threads find out at a time."""
    nodes, half = 900, 450
    parents = torch.zeros(2, nodes, dtype=torch.int32)
    tokens = torch.full((2, nodes), 5)
    target = torch.full((2, nodes), 9)
    target[:, 0] = 8
    for b, first in enumerate((4, 7)):
        tokens[b, first:half] = 8
        target[b, first] = 5
        parents[b, half:] = first
    want = reference.verify_tree(tokens, parents, target)
    assert want[0][:, :4].tolist() == [[0, 4, half, -1], [0, 7, half, -1]]
    for kind in KINDS:
        with schedule(kind=kind):
            got = ops.verify_tree(*(t.to(device) for t in (tokens, parents, target)))
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


def test_no_choice_matches_no_padding(device):
    # A row of NaN makes the choice -1, which is also what an unused node carries.
    assert run([9, -1], [-1, 0], [-1, -1], device) == [[0, -1], 0, [-1, -1], -1]


@pytest.mark.parametrize("parent", [-1, 2, 3, 77, -(2**31), 2**31 - 1])
def test_nodes_without_a_place_are_not_reached(parent, device):
    # Parent 2 is the node itself.
    assert run([9, 1, 1], [-1, 0, parent], [1, 1, 1], device) == [[0, 1, -1], 1, [1, 1, -1], 1]


def test_a_loop_through_the_root_ends(device):
    assert run([1, 1], [1, 0], [1, 1], device) == [[0, 1], 1, [1, 1], 1]


@pytest.mark.parametrize("num_nodes", [1000, 8192, 8193])
def test_large_trees(num_nodes, device):
    """More nodes than threads, and than fit into shared memory: a long walk among many siblings."""
    chain = list(range(0, num_nodes, max(1, num_nodes // 300)))
    parents = torch.zeros(1, num_nodes, dtype=torch.int32)
    tokens, target = torch.full((2, 1, num_nodes), 5)
    tokens += 1
    for place, node in enumerate(chain[1:], start=1):
        parents[0, node] = chain[place - 1]
        tokens[0, node] = target[0, chain[place - 1]] = 10 + place
    got = ops.verify_tree(*(t.to(device) for t in (tokens, parents, target)))
    path, num_accepted, emitted, next_root = (t[0].cpu() for t in got)
    assert num_accepted == len(chain) - 1 and next_root == 5
    assert path.tolist() == chain + [-1] * (num_nodes - len(chain))
    text = [*range(11, 10 + len(chain)), 5]
    assert emitted.tolist() == text + [-1] * (num_nodes - len(chain))


def test_any_schedule(device, schedule):
    case = [t.to(device) for t in random_case(11)]
    expected = ops.verify_tree(*case)
    for kind in KINDS:
        with schedule(kind=kind, seed=3, multiprocessors=2):
            got = ops.verify_tree(*case)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_graph_replay(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    tokens, parents, target = (t.to(device) for t in random_case(11))
    graph, captured = capture(lambda: ops.verify_tree(tokens, parents, target))
    target.copy_(target.flip(-1))
    graph.replay()
    expected = ops.verify_tree(tokens, parents, target)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_empty_batch(device):
    tokens = torch.zeros(0, 4, dtype=torch.int64, device=device)
    path, num_accepted, emitted, next_root = ops.verify_tree(tokens, tokens.int(), tokens)
    assert path.shape == emitted.shape == (0, 4) and num_accepted.shape == next_root.shape == (0,)


@pytest.mark.not_emulated("the registered op is asked")
def test_opcheck(device):
    arguments = tuple(t.to(device) for t in random_case(11))
    torch.library.opcheck(torch.ops.specextend.verify_tree.default, arguments)


TOKENS = torch.zeros(2, 4, dtype=torch.int64)
PARENTS = torch.zeros(2, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("tokens", "parents", "target", "message"),
    [
        (TOKENS[0], PARENTS, TOKENS, r"tokens must be \[B, N\], got \[4\]"),
        (TOKENS.int(), PARENTS, TOKENS, "tokens must be int64, got int32"),
        (TOKENS.mT, PARENTS, TOKENS, "tokens must be contiguous"),
        (TOKENS[:, :0], PARENTS, TOKENS, r"the number of nodes N must be in \[1, .*\], got 0"),
        (TOKENS, PARENTS[:, :3], TOKENS, r"parents must have shape \[2, 4\], got \[2, 3\]"),
        (TOKENS, PARENTS.long(), TOKENS, "parents must be int32, got int64"),
        (TOKENS, PARENTS, TOKENS[:1], r"target_tokens must have shape \[2, 4\], got \[1, 4\]"),
        (TOKENS, PARENTS, TOKENS.float(), "target_tokens must be int64, got float32"),
        (TOKENS, PARENTS, TOKENS.mT.contiguous().mT, "target_tokens must be contiguous"),
    ],
)
def test_errors(tokens, parents, target, message):
    with pytest.raises(RuntimeError, match=f"verify_tree: {message}"):
        ops.verify_tree(tokens, parents, target)
