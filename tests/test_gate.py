"""The gate, on made-up times."""

from __future__ import annotations

from specextend.gate import Gate


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
