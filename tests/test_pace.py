"""Tests what is learnt of rounds, and what a tree's parts have to bring, on made-up times."""

from __future__ import annotations

import random

import pytest

from specextend.pace import FREE, HOPED, Depth, Pace, Price, Quotient, Round, Seconds


def test_seconds_by_size():
    draw, seconds = random.Random(1), Seconds(1 / 40)
    assert not seconds.known
    for _ in range(60):
        size = draw.choice([0, 1, 4, 8, 16])
        disturbed = 8 if draw.random() < 0.15 else 1
        seconds.count(size, disturbed * (0.2 + 0.008 * size))
    assert seconds.known
    assert seconds.first == pytest.approx(0.2, rel=0.1)
    assert seconds.each == pytest.approx(0.008, rel=0.4)


@pytest.mark.parametrize("size", [0, 8])
def test_one_size_says_what_all_take(size):
    """The rest is what one expects beforehand."""
    seconds = Seconds(1 / 40)
    for _ in range(40):
        seconds.count(size, 0.3)
    assert seconds.first + size * seconds.each == pytest.approx(0.3)
    assert seconds.each == pytest.approx(seconds.first / 40)


def test_what_takes_no_time_that_could_be_measured():
    seconds = Seconds(1.0)
    for size in (0, 3, 1):
        seconds.count(size, 0.0)
    assert seconds.first == seconds.each == 0.0


def test_a_quotient_is_one_of_sums():
    """1 of 1 and 0 of 9 in turn are a tenth, not a half."""
    quotient = Quotient(0.8, 4)
    assert quotient.value == 0.8
    for _ in range(200):
        quotient.count(1, 1)
        quotient.count(0, 9)
    assert quotient.value == pytest.approx(0.1, rel=0.1)


def after(*rounds: Round) -> Pace:
    pace = Pace()
    for _ in range(200):
        for took in rounds:
            pace.count(took)
    return pace


def tree(emitted: float, seconds: float = 2.0, drafting: float = 0.8, nodes: int = 8) -> Round:
    """Make a round of four levels that were expected to bring two tokens."""
    return Round(4, nodes, emitted, seconds, drafting, emitted - 1, 2.0, 0.3)


PLAIN = Round(0, 0, 1, 1.0)


class TestPace:
    def test_beforehand(self):
        """A forward of the draft is hoped to cost little, a node less."""
        pace = Pace()
        pace.count(PLAIN)
        price = pace.price()
        assert price.level == pytest.approx(HOPED / 0.8) and 0.01 < price.node < 0.05

    def test_prices_are_what_is_written_meanwhile(self):
        pace = after(PLAIN, tree(4), tree(2), tree(3, nodes=2, seconds=1.7))
        rate = (1 + 4 + 2 + 3) / (1.0 + 2.0 + 2.0 + 1.7)
        trust = (3 + 1 + 2) / 6  # accepted by expected
        assert pace.plain == 1.0 and pace.drafting(4) == pytest.approx(0.8)
        assert pace.value == pytest.approx(rate, rel=0.05)
        price = pace.price()
        assert price.level == pytest.approx(0.2 * rate / trust, rel=0.05)
        assert price.node == pytest.approx(pace.verify.each * rate / trust, rel=0.05)

    def test_a_further_level_costs_what_it_adds(self):
        """The first one takes in what was decided, and may take much longer: shallow trees do not
        make further levels dear."""
        pace = Pace()
        for _ in range(100):
            pace.count(PLAIN)
            for levels in (1, 1, 2, 1):
                drafting = 0.5 + 0.1 * (levels - 1)
                pace.count(Round(levels, 4, 3, 1.1 + drafting, drafting, 2, 2.0, 0.3))
        assert pace.drafting(1) == pytest.approx(0.5, rel=0.05)
        assert pace.drafting(3) - pace.drafting(2) == pytest.approx(0.1, rel=0.3)
        assert pace.price().level / pace.value == pytest.approx(0.1, rel=0.3)

    def test_a_second_is_worth_what_plain_decoding_writes(self):
        assert after(PLAIN, tree(1, seconds=8.0)).value == 1.0

    def test_a_draft_that_promises_too_much_has_to_promise_more(self):
        fair, boasting = after(PLAIN, tree(3)), after(PLAIN, tree(1))
        per_token = [pace.price().level / pace.value for pace in (fair, boasting)]
        assert per_token[1] > 10 * per_token[0]

    @pytest.mark.parametrize("promise", [(), (2.0, 0.3)])
    def test_a_draft_may_say_nothing(self, promise):
        pace = after(PLAIN, Round(4, 8, 1, 2.0, 0.8, 0, *promise))
        assert (pace.price().level == pytest.approx(0.2 / 0.8)) == (not promise)

    def test_what_disturbs_some_rounds_moves_no_price_much(self):
        draw, pace = random.Random(0), Pace()
        for _ in range(200):
            slow = 10 if draw.random() < 0.1 else 1
            pace.count(Round(0, 0, 1, slow * 1.0))
            pace.count(tree(3, slow * 2.0, slow * 0.8))
        assert pace.plain == 1.0 and pace.drafting(4) == pytest.approx(0.8)
        assert pace.verify.each == pytest.approx(0.2 / 8, rel=0.3)


def test_depth_follows_what_the_last_level_adds():
    depth, price = Depth(5, 3), Price(0.2)
    assert depth.levels == 3
    for gain, levels in ((0.1, 2), (0.3, 3), (0.3, 4), (0.3, 5), (0.3, 5), (0.2, 4)):
        depth.follow(depth.levels, gain, price)
        assert depth.levels == levels
    depth.follow(2, 0.0, price)  # of a tree for which there was no room
    assert depth.levels == 4
    for _ in range(9):
        depth.follow(depth.levels, 0.0, price)
    assert depth.levels == 1
    depth.follow(1, 1e-6, FREE)
    assert depth.levels == 2
