"""Tests the gate on made-up times."""

from __future__ import annotations

import random

import pytest

from specextend.gate import Gate, break_even


def run(gate: Gate, rounds: int, plain: float, cost, tau) -> list[int]:
    """Depths that the gate chose; a tree of depth d costs ``cost(d)`` for ``tau(d)`` tokens."""
    depths = []
    for _ in range(rounds):
        depth = gate.next_depth()
        depths.append(depth)
        if depth:
            gate.count(depth, tau(depth), cost(depth))
        else:
            gate.count(0, 1, plain)
    return depths


def test_speculates_where_it_wins():
    depths = run(Gate(5, True), 300, 1.0, lambda d: 1 + 0.2 * d, lambda d: 3)
    assert depths.count(5) >= 290 and depths.count(0) >= 2  # probes know what plain rounds cost


def test_shortens_the_tree():
    """Levels beyond the second cost more than they bring."""
    cost, tau = (lambda d: 1.0 + (0.1 if d <= 2 else 5.0) * d), (lambda d: min(d, 2) + 1)
    depths = run(Gate(5, True), 200, 1.0, cost, tau)[50:]
    assert sum(d in (1, 2) for d in depths) > 0.6 * len(depths)


def test_rests_longer_and_longer_where_it_loses():
    depths = run(Gate(3, True), 2000, 1.0, lambda d: 10.0, lambda d: 1)
    assert depths.count(0) > 0.75 * len(depths)
    assert max(depths[-300:]) > 0 or depths[-300:].count(0) == 300  # and still tries again
    assert any(d > 0 for d in depths[500:])


def test_recovers():
    gate = Gate(3, True)
    run(gate, 500, 1.0, lambda d: 10.0, lambda d: 1)
    depths = run(gate, 1500, 1.0, lambda d: 1.2, lambda d: 3)
    assert depths[-100:].count(3) > 80


def test_off():
    gate = Gate(4, False)
    assert run(gate, 50, 1.0, lambda d: 100.0, lambda d: 1) == [4] * 50


@pytest.mark.parametrize("cost", [1.5, 2.0, 3.7])
@pytest.mark.parametrize("share", [0.97, 1.03])
def test_decides_at_the_break_even(cost, share):
    """Trees of one level that bring a little more than their break-even stay, others rest."""
    emitted = share * break_even(cost, 0.8)
    depths = run(Gate(1, True), 400, 0.8, lambda d: cost, lambda d: emitted)
    if share > 1:
        assert depths.count(1) >= 390
    else:
        assert depths.count(0) > 200


def test_rounds_that_bring_much_count_as_much_as_they_bring():
    """1 and 5 tokens in turn are 3 a round, at the cost of 2 plain ones: speculation wins."""
    emitted = iter([1, 5] * 500)
    depths = run(Gate(4, True), 500, 1.0, lambda d: 2.0, lambda d: next(emitted))
    assert depths.count(4) >= 485


@pytest.mark.parametrize("rate", [0.6, 0.7, 0.8])
def test_costs_little_where_a_full_tree_wins(rate):
    """Tokens accepted by chance, each with the same probability: seconds per token are those of a
    loop that always speculates, but for a few per cent."""
    draw = random.Random(0)
    tokens = seconds = 0.0
    gate = Gate(5, True)
    for _ in range(4000):
        depth = gate.next_depth()
        emitted = 1
        while emitted <= depth and draw.random() < rate:
            emitted += 1
        cost = 1.2 + 0.1 * depth if depth else 1.0
        gate.count(depth, emitted, cost)
        tokens, seconds = tokens + emitted, seconds + cost
    always = 1.7 / sum(rate**i for i in range(6))
    assert seconds / tokens < 1.03 * always
