"""Multi-round rejection: the overload of verify_tree for drafts that sample."""

import itertools
import random
from fractions import Fraction

import pytest
import torch
from backends import capture, for_seeds
from emulation import KINDS
from tree_cases import random_parents

from specextend import ops, reference


def verify(*arguments, device="cpu"):
    return [t.cpu() for t in ops.verify_tree_rejection(*(t.to(device) for t in arguments))]


def random_case(seed: int, vocab: int = 6):
    """Random trees with children drawn from random laws that hold zeros."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, num_nodes = rng.randint(1, 3), rng.choice([1, 2, 5, 20, 40])
    parents = torch.tensor(
        [random_parents(rng, num_nodes, shuffle=seed % 2 == 1) for _ in range(batch)],
        dtype=torch.int32,
    )
    laws = torch.rand(2, batch, num_nodes, vocab, generator=generator, dtype=torch.float64)
    laws[torch.rand(laws.shape, generator=generator) < 0.2] = 0
    laws[..., 0] += 1e-3
    if seed % 3 == 0:
        laws[1] = laws[0] + 0.1 * laws[1]  # a good draft: long walks
    laws = (laws / laws.sum(-1, keepdim=True)).float()
    target, draft = laws
    tokens = torch.zeros(batch, num_nodes, dtype=torch.int64)
    for b in range(batch):
        for node in range(1, num_nodes):
            law = draft[b, parents[b, node]]
            tokens[b, node] = torch.multinomial(law, 1, generator=generator)
    uniforms, final = torch.rand(2, batch, num_nodes, generator=generator, dtype=torch.float64)
    return tokens, parents, target, draft, uniforms, final


@for_seeds(200)
def test_random_trees(seed, device):
    case = random_case(seed)
    got = verify(*case, device=device)
    exact = [t.double() if t.is_floating_point() else t for t in case]
    exact = reference.verify_tree_rejection(*exact)
    for ours, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_walks_are_long_enough_to_mean_something():
    accepted = torch.cat([verify(*random_case(seed))[1] for seed in range(200)])
    assert accepted.max() >= 5 and (accepted >= 2).sum() > 40


LAWS = [
    # (target, draft) in twentieths: alike, disjoint, zeros on either side, equal, one certain.
    ((10, 6, 4), (8, 8, 4)),
    ((2, 8, 10), (16, 2, 2)),
    ((0, 10, 10), (10, 10, 0)),
    ((20, 0, 0), (10, 5, 5)),
    ((5, 5, 10), (0, 0, 20)),
    ((4, 6, 10), (4, 6, 10)),
]


def emission_law(target, draft, children):
    """Exact law of the first token given the children's tokens: a list of fractions per token.

    Written independently of the walk: probability of reaching each trial times its outcome.
    """
    law = [Fraction(x, 20) for x in target]
    draft = [Fraction(x, 20) for x in draft]
    emitted = [Fraction(0)] * 3
    reached = Fraction(1)
    for token in children:
        accept = min(Fraction(1), law[token] / draft[token])
        emitted[token] += reached * accept
        reached *= 1 - accept
        rest = [max(p - q, Fraction(0)) for p, q in zip(law, draft, strict=True)]
        if sum(rest):
            law = [x / sum(rest) for x in rest]
    return [e + reached * p for e, p in zip(emitted, law, strict=True)]


@pytest.mark.parametrize("num_children", [0, 1, 2, 3])
@pytest.mark.parametrize(("target", "draft"), LAWS)
def test_lossless_by_enumeration(target, draft, num_children, device, schedule):
    """Over every draw of the children and a grid of all uniforms, tokens have the target's law."""
    steps = {0: 400, 1: 60, 2: 24, 3: 12}[num_children]
    if schedule.emulated:
        steps = {0: 40, 1: 12, 2: 6, 3: 3}[num_children]
    axis = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    grid = torch.cartesian_prod(*[axis] * (num_children + 1)).view(-1, num_children + 1)
    batch, nodes = grid.shape[0], 1 + num_children
    laws = [
        (torch.tensor(law, dtype=torch.float64) / 20).float().expand(batch, nodes, 3)
        for law in (target, draft)
    ]
    parents = torch.tensor([-1] + [0] * num_children, dtype=torch.int32).repeat(batch, 1)
    uniforms = torch.zeros(batch, nodes, dtype=torch.float64)
    uniforms[:, 1:] = grid[:, 1:]
    final = grid[:, :1].repeat(1, nodes)
    # Kept to one token: a child that is accepted has a law of its own, which is not looked at.
    total, exact = torch.zeros(3, dtype=torch.float64), [Fraction(0)] * 3
    for children in itertools.product(range(3), repeat=num_children):
        probability = Fraction(1)
        for token in children:
            probability *= Fraction(draft[token], 20)
        if not probability:
            continue
        tokens = torch.tensor([0, *children]).repeat(batch, 1)
        emitted = verify(tokens, parents, *laws, uniforms, final, device=device)[2]
        counts = emitted[:, 0].bincount(minlength=3).double() / batch
        given = emission_law(target, draft, children)
        # Each uniform decides at a threshold that the grid meets to within half a step.
        torch.testing.assert_close(
            counts,
            torch.tensor([float(x) for x in given], dtype=torch.float64),
            rtol=0,
            atol=(num_children + 1) / (2 * steps) + 1e-6,
        )
        total += counts * float(probability)
        exact = [e + probability * g for e, g in zip(exact, given, strict=True)]
    assert exact == [Fraction(x, 20) for x in target]  # lossless, exactly
    torch.testing.assert_close(
        total,
        torch.tensor(target, dtype=torch.float64) / 20,
        rtol=0,
        atol=(num_children + 1) / (2 * steps) + 1e-6,
    )


def chi_square_p(counts, probs):
    expected = probs * counts.sum()
    assert counts[probs == 0].sum() == 0
    counts, expected = counts[probs > 0], expected[probs > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((counts.numel() - 1) / 2, dtype=torch.float64)
    return 1 - torch.special.gammainc(freedom, statistic / 2)


@pytest.mark.not_emulated("100,000 trees")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_tokens_have_the_joint_law(dtype, device):
    """Chi-square over 100k sampled trees of two levels, with a second token drawn where needed."""
    generator = torch.Generator().manual_seed(20)
    count, vocab = 100_000, 5
    laws = torch.rand(2, 1 + vocab, vocab, generator=generator)  # after nothing, after each token
    laws[0, 0, 2] = laws[1, 0, 3] = laws[0, 3, 1] = 0
    target, draft = laws / laws.sum(-1, keepdim=True)
    first = torch.multinomial(draft[0], 3 * count, True, generator=generator).view(count, 3)
    second = torch.multinomial(draft[1 + first].view(-1, vocab), 2, True, generator=generator)
    tokens = torch.cat([torch.zeros(count, 1).long(), first, second.view(count, 6)], 1)
    parents = torch.tensor([-1, 0, 0, 0, 1, 1, 2, 2, 3, 3], dtype=torch.int32).repeat(count, 1)
    state = torch.cat([torch.zeros(count, 1).long(), 1 + first, 1 + second.view(count, 6)], 1)
    uniforms, final = torch.rand(2, count, 10, generator=generator, dtype=dtype)
    _, accepted, emitted, _ = verify(
        tokens, parents, target[state], draft[state], uniforms, final, device=device
    )
    assert accepted.bincount(minlength=3).min() > 1000
    one = emitted[:, 0]
    redrawn = torch.multinomial(target[1 + one], 1, generator=generator)[:, 0]
    two = torch.where(accepted >= 1, emitted[:, 1], redrawn)
    target = target.double()
    assert chi_square_p(one.bincount(minlength=vocab).double(), target[0]) > 1e-3
    joint = (target[0][:, None] * target[1:]).flatten()
    assert chi_square_p((one * vocab + two).bincount(minlength=vocab**2).double(), joint) > 1e-3
    # Conditional on the walk having gone on, the second token is the target's as well.
    for token in range(vocab):
        kept = (accepted >= 1) & (one == token)
        if kept.sum() > 500:
            counts = emitted[kept, 1].bincount(minlength=vocab).double()
            assert chi_square_p(counts, target[1 + token]) > 1e-3


def single(tokens, parents, target, draft, uniforms, final, device="cpu"):
    got = verify(
        torch.tensor([tokens]),
        torch.tensor([parents], dtype=torch.int32),
        torch.tensor([target], dtype=torch.float32),
        torch.tensor([draft], dtype=torch.float32),
        torch.tensor([uniforms], dtype=torch.float32),
        torch.tensor([final], dtype=torch.float32),
        device=device,
    )
    return [t[0].tolist() for t in got]


def test_an_identical_draft_is_always_accepted(device):
    law = [0.2, 0.3, 0.5]
    for token in range(3):
        got = single([0, token], [-1, 0], [law, law], [law, law], [0, 1 - 2**-24], [0, 0.4], device)
        assert got == [[0, 1], 1, [token, 1], 1]


def test_repeated_siblings_are_tried_again(device):
    # p = (1/2, 1/2, 0), q = (3/4, 0, 1/4): a rejected 0 leaves (0, 1, 0).
    p, q = [0.5, 0.5, 0.0], [0.75, 0.0, 0.25]
    laws = [p] * 3, [q] * 3
    got = single([9, 0, 0], [-1, 0, 0], *laws, [0, 0.7, 0.0], [0.1, 0, 0], device)
    assert got == [[0, -1, -1], 0, [1, -1, -1], 1]
    got = single([9, 0, 0], [-1, 0, 0], *laws, [0, 0.6, 0.0], [0.1, 0.2, 0], device)
    assert got == [[0, 1, -1], 1, [0, 0, -1], 0]
    got = single([9, 2, 0], [-1, 0, 0], *laws, [0, 0.0, 0.0], [0.1, 0.2, 0], device)
    assert got == [[0, -1, -1], 0, [1, -1, -1], 1]


@pytest.mark.parametrize("token", [2, -1, 3, 2**40])
def test_what_the_draft_cannot_give_is_passed_over(token, device):
    p, q = [0.25, 0.25, 0.5], [0.5, 0.5, 0.0]
    got = single([9, token, 0], [-1, 0, 0], [p] * 3, [q] * 3, [0, 0, 0.4], [0, 0, 0.9], device)
    assert got == [[0, 2, -1], 1, [0, 2, -1], 2]


def test_no_law_no_token(device):
    nan = torch.nan
    assert single([9], [-1], [[nan, 1, 0]], [[1, 0, 0]], [0], [0.5], device)[2:] == [[-1], -1]
    assert single([9], [-1], [[0, 0, 0]], [[1, 0, 0]], [0], [0.5], device)[3] == -1
    for law in ([nan] * 3, [0.2, 0.3, nan]):
        got = single([9, 0], [-1, 0], [law] * 2, [[1, 0, 0]] * 2, [0, 0.5], [0.5, 0.5], device)
        assert got == [[0, -1], 0, [-1, -1], -1]


def test_nothing_left_by_rounding(device):
    # The draft claims a little more than the target everywhere: the target's own law is kept.
    p, q = [0.5, 0.5], [0.6, 0.6]
    got = single([9, 0], [-1, 0], [p, p], [q, q], [0, 0.99], [0.75, 0], device)
    assert got == [[0, -1], 0, [1, -1], 1]


def test_nothing_left_after_two_rejections(device):
    # Laws that are not normalised get there; what the first rejection left is kept.
    p, q = [0.5, 1.5], [1.0, 1.0]
    got = single([9, 0, 0], [-1, 0, 0], [p] * 3, [q] * 3, [0, 0.9, 0.9], [0.1, 0, 0], device)
    assert got == [[0, -1, -1], 0, [1, -1, -1], 1]


def test_leaves_do_not_read_the_draft(device):
    tokens, parents, target, draft, uniforms, final = random_case(11)
    assert tokens.shape[1] > 2
    clean = verify(tokens, parents, target, draft, uniforms, final, device=device)
    draft = draft.clone()
    for b in range(tokens.shape[0]):
        for node in range(tokens.shape[1]):
            if node not in parents[b].tolist():
                draft[b, node] = torch.nan
    poisoned = verify(tokens, parents, target, draft, uniforms, final, device=device)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


@pytest.mark.parametrize("vocab", [1, 511, 512, 513, 3000])
def test_large_vocabularies_and_strides(vocab, device):
    for seed in range(8):
        tokens, parents, target, draft, uniforms, final = random_case(seed, vocab)
        wide = torch.full((2, tokens.shape[1], tokens.shape[0], vocab + 5), torch.nan)
        strided = wide.transpose(1, 2)[..., 2:-3]
        strided[0], strided[1] = target, draft
        case = tokens, parents, strided[0], strided[1], uniforms, final
        got = verify(*case, device=device)
        exact = [t.double() if t.is_floating_point() else t for t in case]
        for ours, theirs in zip(got, reference.verify_tree_rejection(*exact), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("vocab", [3, 600, 9000])
def test_every_device_gives_the_same_results(vocab, device, schedule):
    """Also where the last uniform number is that of a boundary, so that every rounding counts."""
    if device == "cpu" and not schedule.emulated:
        pytest.skip("the CPU's results are the expected ones")
    rejected = 0
    for seed in (1, 4, 7, 10):
        tokens, parents, target, draft, uniforms, final = random_case(seed, vocab)
        uniforms = uniforms * 0.5 + 0.5  # many rejections
        rest = (target.double() - draft.double()).clamp(min=0)
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, target.double())
        cumulative = rest.cumsum(-1) / rest.sum(-1, keepdim=True)
        token = (cumulative < final[..., None]).sum(-1, keepdim=True).clamp(max=vocab - 1)
        final = cumulative.gather(-1, token)[..., 0]
        case = tokens, parents, target, draft, uniforms, final
        want = torch.ops.specextend.verify_tree.rejection(*case)
        got = verify(*case, device=device)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        rejected += (want[1] == 0).sum()
    assert rejected > 0


def test_any_schedule(device, schedule):
    case = random_case(16, 1100)
    expected = verify(*case, device=device)
    for kind in KINDS:
        with schedule(kind=kind, seed=3, multiprocessors=2):
            got = verify(*case, device=device)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("token", [700, 1500])
def test_a_rejection_behind_an_accepted_child(token, device, schedule):
    """What is left of the law of one node takes the place of what was left of the node before, by
    which its child was accepted: nobody may still read that.
    """
    vocab = 2048  # of which several warps have parts
    generator = torch.Generator().manual_seed(token)
    target, draft = torch.rand(2, 1, 4, vocab, generator=generator) + 0.5
    draft[0, 0, 11], target[0, 0, token] = 100.0, 100.0
    draft[0, 2, [13, token]] = 100.0  # nothing is left of the token there
    target, draft = (t / t.sum(-1, keepdim=True) for t in (target, draft))
    tokens, parents = torch.tensor([[0, 11, token, 13]]), torch.tensor([[-1, 0, 0, 2]]).int()
    uniforms = torch.tensor([[0.0, 0.9, 0.5, 0.9]], dtype=torch.float64)
    case = tokens, parents, target, draft, uniforms, torch.full_like(uniforms, 0.4321)
    want = reference.verify_tree_rejection(
        *(t.double() if t.is_floating_point() else t for t in case)
    )
    assert want[0].tolist() == [[0, 2, -1, -1]]
    for kind in KINDS:
        for seed in range(5 if schedule.emulated else 1):
            with schedule(kind=kind, seed=seed):
                got = verify(*case, device=device)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_graph_replay(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    case = [t.to(device) for t in random_case(11)]
    graph, captured = capture(lambda: ops.verify_tree_rejection(*case))
    case[4].uniform_()
    case[5].uniform_()
    graph.replay()
    expected = ops.verify_tree_rejection(*case)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_a_sequence_alone_is_the_same(device):
    case = random_case(11)
    assert case[0].shape[0] > 1
    together = verify(*case, device=device)
    for b in range(case[0].shape[0]):
        alone = verify(*(t[b : b + 1] for t in case), device=device)
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, together, strict=True))


@pytest.mark.not_emulated("the registered op is asked")
def test_opcheck(device):
    arguments = tuple(t.to(device) for t in random_case(11))
    torch.library.opcheck(torch.ops.specextend.verify_tree.rejection, arguments)


TOKENS = torch.zeros(2, 4, dtype=torch.int64)
PARENTS = torch.zeros(2, 4, dtype=torch.int32)
PROBS = torch.zeros(2, 4, 3)
UNIFORMS = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, TOKENS[0], r"tokens must be \[B, N\], got \[4\]"),
        (1, PARENTS.long(), "parents must be int32, got int64"),
        (2, PROBS[0], r"target_probs must be \[B, N, V\], got \[4, 3\]"),
        (2, PROBS[:, :3], r"target_probs must have shape \[2, 4, 3\], got \[2, 3, 3\]"),
        (2, PROBS.half(), "target_probs must be float32, got float16"),
        (2, PROBS[..., :0], "the vocabulary size V must be in .*, got 0"),
        (3, PROBS[..., :2], r"draft_probs must have shape \[2, 4, 3\], got \[2, 4, 2\]"),
        (3, PROBS.double(), "draft_probs must be float32, got float64"),
        (3, PROBS.mT.contiguous().mT, "draft_probs must have a last stride of 1, got 4"),
        (4, UNIFORMS[:1], r"uniforms must have shape \[2, 4\], got \[1, 4\]"),
        (4, UNIFORMS.half(), "uniforms must be float32 or float64, got float16"),
        (5, UNIFORMS.double(), "final_uniforms must be float32, got float64"),
        (5, torch.zeros(4, 2).mT, "final_uniforms must be contiguous"),
    ],
)
def test_errors(place, value, message):
    arguments = [TOKENS, PARENTS, PROBS, PROBS, UNIFORMS, UNIFORMS]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=f"verify_tree.rejection: {message}"):
        ops.verify_tree_rejection(*arguments)
