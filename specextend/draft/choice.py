"""Chooses what a round proposes by look-up and by a model, from what both have brought and cost.

A round's value is the tokens that it is expected to emit over the seconds that it is expected to
take. How reliable a look-up is, the look-up knows; here is how far the target follows the model's
trees. How large these get is a matter of the pace.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from ..config import SpecConfig
from ..pace import MEMORY, Pace, Quotient, Round
from .lookup import Node

_FIRST = 0.7  # beforehand: chance that the target confirms a level of the model's tree
_PRIOR = 4  # rounds that this counts for
_ROUNDS = 4  # by look-up alone, before the model reads the prompt


@dataclass(frozen=True)
class Plan:
    """Says what to propose.

    Attributes:
        levels: of the model's tree at most; 0: the model does not run.
        num_nodes: nodes of the look-up, the likeliest ones.
    """

    levels: int
    num_nodes: int


class Confirmed:
    """Estimates how far the target follows the model's trees, however deep these are: where one
    ends, nothing is confirmed.

    A level that has not been reached lately is taken to be like the one before it.
    """

    def __init__(self, max_depth: int):
        self._reached = np.zeros(max_depth)
        self._right = np.zeros(max_depth)

    def count(self, accepted: int) -> None:
        """Learn that ``accepted`` levels were confirmed."""
        self.forget(1 / MEMORY)
        self._reached[: accepted + 1] += 1
        self._right[:accepted] += 1

    def forget(self, share: float) -> None:
        """Let what was seen so far count less."""
        self._reached *= 1 - share
        self._right *= 1 - share

    def chances(self) -> np.ndarray:
        """Return [max_depth]: the chances that a path reaches level 1, 2, ..."""
        found, before, chance = [], _FIRST, 1.0
        for reached, right in zip(self._reached, self._right, strict=True):
            before = (right + _PRIOR * before) / (reached + _PRIOR)
            chance *= before
            found.append(chance)
        return np.array(found)


class Choice:
    """Chooses the plan of each round of a generation. The best one by what is known, and now and
    then the model, where it has long not been tried.

    Args:
        config: of the model's trees.

    Attributes:
        pace: what rounds have brought and cost.
    """

    REST = 32  # rounds without the model before it is tried again, at first; doubled each time
    MAX_REST = 512

    def __init__(self, config: SpecConfig):
        self.config = config
        self.pace = Pace()
        self.confirmed = Confirmed(config.max_depth)
        depth = config.max_depth
        self._levels = Quotient(depth, 1)  # of the model's trees
        self._nodes = Quotient(config.nodes_within(depth), 1)
        self._rest, self._rested = self.REST, 0
        # Seconds per token that were expected of look-up alone, and with the model.
        self._expected: deque[tuple[float, float]] = deque(maxlen=MEMORY)

    def count(self, took: Round, nodes: int = 0) -> None:
        """Learn from a round.

        Args:
            took: the levels, and what is expected and accepted of them, are the model's.
            nodes: of the model's tree.
        """
        if took.levels:
            self.confirmed.count(took.accepted)
            self._levels.count(took.levels, 1)
            self._nodes.count(nodes, 1)
        else:
            self.confirmed.forget(1 / (2 * MEMORY))  # so that it is tried again
        if took.seconds is not None:
            self.pace.count(took)

    def worth(self, nodes: list[Node], depth: int, seconds: float, tokens: int) -> bool:
        """Tell whether the model is expected to save the seconds that it needs before it can run.

        Args:
            nodes, depth: as of :meth:`plan`, of the round to come.
            seconds: that the model needs.
            tokens: that are left to write.
        """
        if not self.pace.verify.known:
            return False
        value = self._values(nodes, depth)
        self._expected.append((1 / value[0].max(), 1 / value.max()))
        alone, together = np.mean(self._expected, 0)
        return len(self._expected) >= _ROUNDS and tokens * (alone - together) > seconds

    def plan(self, nodes: list[Node], depth: int) -> Plan:
        """Choose.

        Args:
            nodes: of the look-up, the likeliest first.
            depth: levels that the model may have; 0: it cannot run.
        """
        value = self._values(nodes, depth)
        row = int(value.max(1).argmax())
        if row or not depth:
            self._rest, self._rested = self.REST, 0
        elif self._rested == self._rest:
            self._rest, self._rested = min(2 * self._rest, self.MAX_REST), 0
            row = 1
        else:
            self._rested += 1
        return Plan(depth if row else 0, int(value[row].argmax()))

    def _values(self, nodes: list[Node], depth: int) -> np.ndarray:
        """Return the expected tokens per second of a round [1 or 2, nodes + 1], without the model
        and, where it may have levels, with it, by nodes of the look-up; all of them without a
        measure as long as there is none."""
        deepest = max([depth, *(node.level for node in nodes)])
        reach = np.zeros((len(nodes) + 1, deepest))  # of the look-up, by its nodes
        for i, node in enumerate(nodes, 1):
            reach[i] = reach[i - 1]
            reach[i, node.level - 1] += node.chance
        pace, found = self.pace, np.arange(len(nodes) + 1)
        alone = (1 + reach.sum(-1)) / (pace.verify.first + pace.verify.each * found)
        if not depth:
            return alone[None]
        # What one knows the other tends to know, too: together they reach as far as the better one.
        together = reach.copy()
        chances = self.confirmed.chances()[:depth]
        together[:, :depth] = np.maximum(together[:, :depth], chances)
        seconds = pace.verify.first + pace.verify.each * (self._nodes.value + found)
        seconds = seconds + pace.forward * min(self._levels.value, depth)
        return np.stack([alone, (1 + together.sum(-1)) / seconds])
