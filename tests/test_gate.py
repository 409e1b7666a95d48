"""Tests the gate on made-up times."""

from __future__ import annotations

import random

import pytest

from specextend import SpecConfig
from specextend.gate import Gate, break_even
from specextend.pace import FREE, Price, Round

AUTO, OFF = SpecConfig(), SpecConfig(gate="off")


def run(gate: Gate, rounds: int, plain: float, cost, tau) -> list[int]:
    """Depths that the gate chose; a tree of depth d costs ``cost(d)``, a fifth of it for
    drafting, for ``tau(d)`` tokens."""
    depths = []
    for _ in range(rounds):
        depth = gate.next_depth()
        depths.append(depth)
        if depth:
            gate.count(Round(depth, depth, tau(depth), cost(depth), cost(depth) / 5))
        else:
            gate.count(Round(0, 0, 1, plain))
    return depths


def test_speculates_where_it_wins():
    depths = run(Gate(AUTO, 5, True), 300, 1.0, lambda d: 1 + 0.2 * d, lambda d: 3)
    assert depths.count(5) >= 290 and depths.count(0) >= 2  # probes know what plain rounds cost


def test_rests_longer_and_longer_where_it_loses():
    depths = run(Gate(AUTO, 3, True), 2000, 1.0, lambda d: 10.0, lambda d: 1)
    assert depths.count(0) > 0.9 * len(depths)
    assert any(d > 0 for d in depths[500:])  # and still tries again


def test_recovers():
    gate = Gate(AUTO, 3, True)
    run(gate, 500, 1.0, lambda d: 10.0, lambda d: 1)
    depths = run(gate, 1500, 1.0, lambda d: 1.2, lambda d: 3)
    assert depths[-100:].count(3) > 80


def test_off():
    gate = Gate(OFF, 4, True)
    assert run(gate, 50, 1.0, lambda d: 100.0, lambda d: 1) == [4] * 50


@pytest.mark.parametrize("cost", [1.5, 2.0, 3.7])
@pytest.mark.parametrize("share", [0.97, 1.03])
def test_decides_at_the_break_even(cost, share):
    """Trees that bring a little more than their break-even stay, others rest."""
    emitted = share * break_even(cost, 0.8)
    depths = run(Gate(AUTO, 1, True), 400, 0.8, lambda d: cost, lambda d: emitted)
    if share > 1:
        assert depths.count(1) >= 390
    else:
        assert depths.count(0) > 200


def test_rounds_that_bring_much_count_as_much_as_they_bring():
    """1 and 5 tokens in turn are 3 a round, at the cost of 2 plain ones: speculation wins."""
    emitted = iter([1, 5] * 500)
    depths = run(Gate(AUTO, 4, True), 500, 1.0, lambda d: 2.0, lambda d: next(emitted))
    assert depths.count(4) >= 485


def test_rounds_in_which_a_draft_finds_nothing_are_plain():
    """They say nothing against those in which it does."""
    gate = Gate(AUTO, 4, True)
    for i in range(400):
        depth = gate.next_depth()
        assert depth or i % gate.PROBE < 8
        found = depth and i % 9 == 0
        gate.count(Round(4, 4, 3, 1.5) if found else Round(0, 0, 1, 1.0))


@pytest.mark.parametrize("rate", [0.6, 0.7, 0.8])
def test_costs_little_where_a_full_tree_wins(rate):
    """Tokens accepted by chance, each with the same probability: seconds per token are those of a
    loop that always speculates, but for a few per cent."""
    draw = random.Random(0)
    tokens = seconds = 0.0
    gate = Gate(AUTO, 5, True)
    for _ in range(4000):
        depth = gate.next_depth()
        emitted = 1
        while emitted <= depth and draw.random() < rate:
            emitted += 1
        cost = 1.2 + 0.1 * depth if depth else 1.0
        gate.count(Round(depth, depth, emitted, cost, 0.1 * depth, emitted - 1))
        tokens, seconds = tokens + emitted, seconds + cost
    always = 1.7 / sum(rate**i for i in range(6))
    assert seconds / tokens < 1.03 * always


# ---- how large a tree gets -----------------------------------------------------------------------


def test_a_draft_that_can_be_told_is_told_the_price():
    gate = Gate(AUTO, 5, follows=True)
    run(gate, 100, 1.0, lambda d: 2.0, lambda d: 3)
    assert gate.price().level > 0 and gate.price().node > 0
    for gain in (0.0, 9.0):
        gate.count(Round(5, 8, 3, 2.0, 1.0, 2, 2.0, gain))
        assert gate.next_depth() == 5


@pytest.mark.parametrize("forward, levels", [(0.01, 5), (0.3, 3), (1.5, 1)])
def test_others_follow_a_level_at_a_time(forward, levels):
    """Level d adds 0.8 ** d tokens; what it has to add is what a forward costs."""
    gate = Gate(AUTO, 5, follows=False)
    for _ in range(200):
        depth = gate.next_depth()
        if not depth:
            gate.count(Round(0, 0, 1, 1.0))
            continue
        reach = [0.8**d for d in range(1, depth + 1)]
        took = 1 + sum(reach), 1.0 + forward * depth, forward * depth
        gate.count(Round(depth, depth, *took, sum(reach), sum(reach), reach[-1]))
        assert gate.price() == FREE
    assert abs(gate._depth.levels - levels) <= 1


def test_others_begin_with_half_of_the_levels():
    """And all of them are wanted of a draft that does not say what it expects."""
    gate, depths = Gate(AUTO, 8, follows=False), []
    for _ in range(5):
        depths.append(gate.next_depth())
        gate.count(Round(depths[-1], depths[-1], 3, 1.0))
    assert depths == [4, 5, 6, 7, 8]
    assert Gate(AUTO, 8, follows=True).next_depth() == 8
    assert Gate(OFF, 8, follows=False).next_depth() == 8


def test_without_a_measure_the_shape_decides():
    """``tree_threshold`` is what a level of OPT-Tree's has to add."""
    for shape, price in (("opt", Price(0.2)), ("top_k", FREE), ("fixed", FREE)):
        config = OFF.replace(tree_shape=shape)
        gate = Gate(config, 5, follows=True)
        assert gate.price() == price
        gate = Gate(config, 5, follows=False)
        depths = []
        for gain in (0.1, 0.1, 0.3, 0.1):
            depths.append(gate.next_depth())
            gate.count(Round(depths[-1], 8, 2, None, None, 1, 2.0, gain))
        assert depths == ([5, 4, 3, 4] if shape == "opt" else [5] * 4)


def test_rounds_without_seconds_are_no_measure():
    gate = Gate(AUTO, 5, follows=True)
    run(gate, 50, 1.0, lambda d: 2.0, lambda d: 3)
    before = gate.price()
    gate.count(Round(5, 8, 1, None, None, 0, 3.0, 0.5))
    assert gate.price() == before
