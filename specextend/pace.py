"""Learns how fast a generation writes, and what of a tree pays at that pace.

The way to choose trees that writes most per second is the one that takes whatever brings more
tokens than its seconds bring otherwise: tokens / seconds is largest where tokens - pace * seconds
is, the pace being that quotient itself (Dinkelbach, Management Science 13, 1967). So a further
level pays if it is expected to add more tokens than are written in the time of a forward of the
draft, and a further node if it is, for what it adds to the time of a verify pass. What is expected
to be added is OPT-Tree's value (arXiv 2406.17276): the draft's own probabilities, summed.

All of it is measured while generating; nothing is assumed of the models but what a first round
needs to begin with.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

import numpy as np

_PRIOR = 4  # rounds that what is expected beforehand counts for
_TRUST = 0.8  # beforehand: accepted tokens for each one that a draft expects
_LATEST = 9  # plain rounds whose median counts
_NODE = 1 / 40  # beforehand: seconds of a node beside those of a pass of the root alone

#: rounds after which an old one counts a third
MEMORY = 32

#: of the target's seconds for the same, what a draft of unknown size takes
HOPED = 1 / 8


@dataclass(frozen=True)
class Price:
    """Says what parts of a tree have to bring to pay: tokens that its draft expects to be accepted.

    Attributes:
        level: of a further level, for which the draft runs once more.
        node: of a further node in the verify pass.
        branches: the share of a node's price that is paid for every row of the batch of paths,
            instead (:func:`specextend.tree.sizes`).
    """

    level: float = 0.0
    node: float = 0.0
    branches: float = 0.0


#: everything pays
FREE = Price()


@dataclass(frozen=True)
class Round:
    """Holds what a round proposed, brought and took.

    Attributes:
        levels: of the draft's tree; 0: it did not run.
        nodes: that were proposed, with what branches cost (:meth:`specextend.tree.Tree.size`); 0: a
            plain round.
        emitted: tokens of the round.
        seconds: that it took; None: that says nothing of other rounds.
        drafting: of these, the draft's.
        accepted: levels of the draft's tree that the target confirmed.
        expected: levels that the draft expected; None: it does not say.
        gain: of these, what the last one added.
    """

    levels: int
    nodes: float
    emitted: int
    seconds: float | None
    drafting: float | None = 0.0
    accepted: int = 0
    expected: float | None = None
    gain: float | None = None


class Seconds:
    """Estimates what work takes by its size: a straight line through recent measurements, by
    medians of slopes and rests (Theil and Sen), which rounds that others disturb do not move.

    Args:
        share: what one more of size takes beforehand, beside what size 0 takes.
    """

    _PRIOR = 16  # slopes that the share counts for
    _OFTEN = 8  # measurements that are each looked at; behind them every fourth is

    def __init__(self, share: float):
        self._share = share
        self._measured: deque[tuple[float, float]] = deque(maxlen=32)
        self._counted = 0
        self.first, self.each = 1.0, share  # as long as nothing was measured

    @property
    def known(self) -> bool:
        """Tell whether anything was measured."""
        return bool(self._measured)

    def count(self, size: float, seconds: float) -> None:
        """Learn what work of some size took."""
        self._measured.append((size, seconds))
        self._counted += 1
        if self._counted <= self._OFTEN or self._counted % 4 == 0:
            self._estimate()

    def _estimate(self) -> None:
        sizes, took = np.array(self._measured).T
        base = float(np.median(took / (1 + self._share * sizes)))
        prior = self._share * base
        one, other = np.triu_indices(len(sizes), 1)
        wider = sizes[one] != sizes[other]
        one, other = one[wider], other[wider]
        slopes = (took[one] - took[other]) / (sizes[one] - sizes[other])
        slope = np.median(np.concatenate([slopes, np.full(self._PRIOR, prior)]))
        # More than four times as much is not the size's, but others' that disturbed some rounds.
        self.each = float(np.clip(slope, 0.0, 4 * prior))
        growth = self.each / base if base else 0.0
        self.first = float(np.median(took / (1 + growth * sizes)))


class Quotient:
    """Averages a quotient over recent rounds: the sum of one thing over the sum of another.

    Args:
        value: beforehand.
        weight: below the line, that it counts for.

    Attributes:
        above, below: the sums.
    """

    def __init__(self, value: float = 0.0, weight: float = 0.0):
        self.above, self.below = value * weight, weight

    def count(self, above: float, below: float) -> None:
        """Add what a round had above the line and below it."""
        keep = 1 - 1 / MEMORY
        self.above = keep * self.above + above
        self.below = keep * self.below + below

    @property
    def value(self) -> float:
        """Return the quotient."""
        return self.above / self.below


class Pace:
    """Learns from rounds, and tells what of a tree pays.

    Args:
        hoped: what a forward of the draft takes beside one of the target, beforehand.
        branches: as of :class:`Price`.
    """

    def __init__(self, hoped: float = HOPED, branches: float = 0.0):
        self._hoped, self.branches = hoped, branches
        self.verify = Seconds(_NODE)  # of a pass, by its proposed nodes
        # Of a tree, by its levels behind the first, before which what was decided is taken in.
        self._draft = Seconds(1.0)
        self._plain: deque[float] = deque(maxlen=_LATEST)  # seconds of plain rounds
        self._trust = Quotient(_TRUST, _PRIOR)
        self._written = Quotient()  # tokens by seconds

    def count(self, took: Round) -> None:
        """Learn from a round."""
        self._written.count(took.emitted, took.seconds)
        self.verify.count(took.nodes, took.seconds - took.drafting)
        if not took.nodes:
            self._plain.append(took.seconds)
        if took.levels:
            self._draft.count(took.levels - 1, took.drafting)
            if took.expected is not None:
                self._trust.count(took.accepted, took.expected)

    @property
    def plain(self) -> float:
        """Return the seconds of a plain round, as far as they are known."""
        return median(self._plain) if self._plain else self.verify.first

    def drafting(self, levels: float) -> float:
        """Return the seconds of a tree of so many levels, at least 1, as far as they are known."""
        return self._first_level + (levels - 1) * self._further_level

    @property
    def _first_level(self) -> float:
        return self._draft.first if self._draft.known else self._hoped * self.plain

    @property
    def _further_level(self) -> float:
        return self._draft.each if self._draft.known else self._hoped * self.plain

    @property
    def value(self) -> float:
        """Return the tokens that a second is worth: those that are written in it, which are no
        fewer than could be written plainly."""
        plain = self.plain
        written = self._written
        return max((written.above + _PRIOR) / (written.below + _PRIOR * plain), 1 / plain)

    def price(self) -> Price:
        """Return what parts of the next tree have to bring."""
        worth = self.value / self._trust.value
        return Price(worth * self._further_level, worth * self.verify.each, self.branches)


class Depth:
    """Follows OPT-Tree's rule from one tree to the next, a level at a time, where nobody waits to
    see what a level brings.

    Args:
        most: levels at most.
        first: levels of the first tree.

    Attributes:
        levels: of the next tree.
    """

    def __init__(self, most: int, first: int):
        self._most, self.levels = most, first

    def follow(self, levels: int, gain: float, price: Price) -> None:
        """Learn what the last one of a tree's ``levels`` was expected to add; a tree that had to be
        shallower for another reason says nothing."""
        if levels != self.levels:
            return
        wanted = levels + (1 if gain > price.level else -1)
        self.levels = min(max(wanted, 1), self._most)
