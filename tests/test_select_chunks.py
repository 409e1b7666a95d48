import random

import pytest
import torch
from backends import capture, for_each

from specextend import ops, reference

INF, NAN = torch.inf, torch.nan


def random_case(seed: int):
    """Scores with ties, -inf and NaN; budgets below and above the number of chunks."""
    rng = random.Random(seed)
    batch, num_chunks = rng.randint(1, 4), rng.choice([1, 2, 7, 33, 100])
    values = rng.choice([[], [0.0, -0.0, 0.5, 1.0], [NAN, -INF, INF, 0.0, -0.0, 1.0]])
    scores = torch.tensor(
        [
            [rng.choice(values) if values else rng.random() for _ in range(num_chunks)]
            for _ in range(batch)
        ]
    )
    chunk_size = rng.choice([1, 3, 32])
    top = num_chunks * chunk_size
    lens = [rng.choice([0, 1, top, top + 5, rng.randint(0, top), -4]) for _ in range(batch)]
    budget = rng.choice([1, 2, 5, num_chunks, num_chunks + 3])
    num_recent = rng.randint(0, budget)
    num_sinks = rng.randint(0, budget - num_recent)
    options = {
        "chunk_size": chunk_size,
        "budget": budget,
        "num_sinks": num_sinks,
        "num_recent": num_recent,
    }
    return scores, torch.tensor(lens, dtype=torch.int32), options


def run(scores, lens, device="cpu", **options):
    ids, counts = ops.select_chunks(
        torch.tensor(scores, device=device),
        torch.tensor(lens, dtype=torch.int32, device=device),
        **options,
    )
    return ids.tolist(), counts.tolist()


@for_each(seed=range(250))
def test_random(seed, device):
    scores, lens, options = random_case(seed)
    ids, counts = ops.select_chunks(scores.to(device), lens.to(device), **options)
    want_ids, want_counts = reference.select_chunks(scores, lens, **options)
    assert torch.equal(ids.cpu(), want_ids) and torch.equal(counts.cpu(), want_counts)


@for_each(seed=range(30))
def test_without_ties_it_is_topk_and_sets(seed, device):
    rng = random.Random(seed)
    num_chunks, budget = 200, rng.randint(8, 64)
    sinks, recent = rng.randint(0, 4), rng.randint(0, 4)
    scores = torch.rand(1, num_chunks, generator=torch.Generator().manual_seed(seed))
    lens = torch.tensor([rng.randint(100 * 32, num_chunks * 32)], dtype=torch.int32)
    valid = -(-lens.item() // 32)
    forced = {*range(sinks), *range(valid - recent, valid)}
    others = scores[0, :valid].clone()
    others[list(forced)] = -INF
    want = forced | {*others.topk(budget - len(forced)).indices.tolist()}
    ids, counts = ops.select_chunks(
        scores.to(device),
        lens.to(device),
        chunk_size=32,
        budget=budget,
        num_sinks=sinks,
        num_recent=recent,
    )
    assert ids[0].tolist() == sorted(want) and counts.item() == budget


@pytest.mark.parametrize("num_chunks", [511, 512, 513, 2500, 5000])
def test_many_chunks(num_chunks, device, schedule):
    """Scores that differ in every digit of their keys, or in the last one, or hardly at all."""
    generator = torch.Generator().manual_seed(num_chunks)
    shape = (1, num_chunks)
    noise = torch.randn(shape, generator=generator)
    wide = noise * 10.0 ** torch.randint(-30, 30, shape, generator=generator)
    near = 1 + torch.randint(300, shape, generator=generator) * torch.finfo(torch.float32).eps
    few = torch.randint(2, shape, generator=generator) / 7
    scores = torch.cat([wide, near, few, torch.zeros(shape), noise.softmax(-1)])
    lens = torch.tensor([num_chunks - i for i in range(5)], dtype=torch.int32)
    budgets = {1, 32, num_chunks // 2, num_chunks - 1}
    for budget in budgets if num_chunks < 600 else {1, 37}:
        options = {"chunk_size": 1, "budget": budget, "num_sinks": min(2, budget - 1)}
        want = reference.select_chunks(scores, lens, **options)
        with schedule(kind="behind" if budget > 1 else "ahead"):
            got = ops.select_chunks(scores.to(device), lens.to(device), **options)
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours.cpu(), theirs)


def test_graph_replay_with_other_lengths(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    options = {"chunk_size": 4, "budget": 20, "num_sinks": 1, "num_recent": 2}
    scores, lens = torch.rand(2, 1000, device=device), torch.zeros(2, device=device).int()
    graph, captured = capture(lambda: ops.select_chunks(scores, lens, **options))
    for values in ([4000, 17], [1, 80], [81, 999]):
        scores.uniform_()
        lens.copy_(torch.tensor(values))
        graph.replay()
        for got, want in zip(captured, ops.select_chunks(scores, lens, **options), strict=True):
            assert torch.equal(got, want)


def test_all_chunks_fit(device):
    got = run([[0.1, 0.9, 0.5, 7.0]], [70], device, chunk_size=32, budget=5)
    assert got == ([[0, 1, 2, -1, -1]], [3])  # the last is partial; the fourth holds nothing
    assert run([[0.1, 0.9]], [64], device, chunk_size=32, budget=2) == ([[0, 1]], [2])


def test_an_empty_sequence_has_no_chunks(device):
    got = run([[0.1, 0.9], [0.1, 0.9]], [0, 1], device, chunk_size=4, budget=2, num_recent=2)
    assert got == ([[-1, -1], [0, -1]], [0, 1])
    none = ops.select_chunks(
        torch.zeros(2, 0, device=device),
        torch.ones(2, dtype=torch.int32, device=device),
        chunk_size=1,
        budget=1,
    )
    assert none[0].tolist() == [[-1], [-1]] and none[1].tolist() == [0, 0]


def test_ties_go_to_the_lower_id(device):
    got = run([[0.0, -0.0, 0.5, 0.0, 0.5, 0.5]], [6], device, chunk_size=1, budget=3)
    assert got == ([[2, 4, 5]], [3])
    got = run([[-0.0, 0.0, 0.5, -0.0, 0.0]], [5], device, chunk_size=1, budget=3)
    assert got == ([[0, 1, 2]], [3])


def test_nan_ranks_below_minus_infinity(device):
    scores = [[NAN, -INF, NAN, 1.0, -INF]]
    assert run(scores, [5], device, chunk_size=1, budget=2) == ([[1, 3]], [2])
    assert run(scores, [5], device, chunk_size=1, budget=3) == ([[1, 3, 4]], [3])
    assert run(scores, [5], device, chunk_size=1, budget=4) == ([[0, 1, 3, 4]], [4])


def test_scores_behind_the_length_do_not_count(device):
    scores = [[0.1, 0.2, 0.3, 99.0, NAN]]
    assert run(scores, [5], device, chunk_size=2, budget=2) == ([[1, 2]], [2])


def test_sinks_and_recent_chunks_count_inside_the_budget(device):
    scores = [[0.0, 9.0, 8.0, 7.0, 6.0, 0.0, 0.0]]
    got = run(scores, [7], device, chunk_size=1, budget=4, num_sinks=1, num_recent=2)
    assert got == ([[0, 1, 5, 6]], [4])
    got = run(scores, [7], device, chunk_size=1, budget=3, num_sinks=1, num_recent=2)
    assert got == ([[0, 5, 6]], [3])


def test_recent_chunks_overlap_sinks_in_a_short_sequence(device):
    got = run([[1.0, 2.0, 3.0]], [3], device, chunk_size=1, budget=4, num_sinks=2, num_recent=2)
    assert got == ([[0, 1, 2, -1]], [3])


def test_lengths_near_the_end_of_int32(device):
    got = run([[0.5, 0.1]], [2**31 - 1], device, chunk_size=2**30, budget=1)
    assert got == ([[0]], [1])
    got = run([[0.5, 0.1]], [2**31 - 1], device, chunk_size=2**31 - 1, budget=1, num_recent=1)
    assert got == ([[0]], [1])


@pytest.mark.not_emulated("the registered op is asked")
def test_opcheck(device):
    scores, lens, options = random_case(4)
    torch.library.opcheck(
        torch.ops.specextend.select_chunks.default, (scores.to(device), lens.to(device)), options
    )


SCORES = torch.zeros(2, 4)
LENS = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("scores", "lens", "options", "message"),
    [
        (SCORES[0], LENS, {}, r"scores must be \[B, C\], got \[4\]"),
        (SCORES.half(), LENS, {}, "scores must be float32, got float16"),
        (torch.zeros(4, 2).mT, LENS, {}, "scores must be contiguous"),
        (SCORES, LENS[:1], {}, r"lens must have shape \[2\], got \[1\]"),
        (SCORES, LENS.long(), {}, "lens must be int32, got int64"),
        (SCORES, LENS, {"chunk_size": 0}, r"chunk_size must be in \[1, .*\], got 0"),
        (SCORES, LENS, {"budget": 0}, r"budget must be in \[1, .*\], got 0"),
        (SCORES, LENS, {"num_sinks": -1}, r"num_sinks must be in \[0, 3\], got -1"),
        (SCORES, LENS, {"num_recent": 4}, r"num_recent must be in \[0, 3\], got 4"),
        (
            SCORES,
            LENS,
            {"num_sinks": 2, "num_recent": 2},
            r"num_sinks \+ num_recent must be at most budget = 3, got 2 \+ 2",
        ),
    ],
)
def test_errors(scores, lens, options, message):
    with pytest.raises(RuntimeError, match=f"select_chunks: {message}"):
        ops.select_chunks(scores, lens, **{"chunk_size": 2, "budget": 3, **options})
