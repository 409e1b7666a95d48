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
from ..pace import HOPED, MEMORY, Pace, Quotient, Round
from ..tree import sizes
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


class Trees:
    """Estimates how deep the model's trees get, which end where nothing more pays, and how far the
    target follows them.

    Of a level that has not been asked for lately, as much is expected as of the one before it.
    """

    def __init__(self, max_depth: int):
        self._asked, self._grown, self._reached, self._right = np.zeros((4, max_depth))

    def count(self, most: int, levels: int, accepted: int) -> None:
        """Learn that of a tree that was to have ``most`` levels, and had ``levels``, ``accepted``
        were confirmed."""
        self.forget(1 / MEMORY)
        self._asked[:most] += 1
        self._grown[:levels] += 1
        self._reached[: min(accepted + 1, most)] += 1
        self._right[:accepted] += 1

    def forget(self, share: float) -> None:
        """Let what was seen so far count less."""
        for seen in (self._asked, self._grown, self._reached, self._right):
            seen *= 1 - share

    def forwards(self) -> np.ndarray:
        """Return [max_depth]: the forwards that a tree of at most 1, 2, ... levels takes."""
        return np.cumsum((self._grown + _PRIOR) / (self._asked + _PRIOR))

    def chances(self) -> np.ndarray:
        """Return [max_depth]: the chances that a path is confirmed down to level 1, 2, ..."""
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
        hoped: what a forward of the model takes beside one of the target, beforehand.
        branches: the share of the target's weights that a tree passes path by path.

    Attributes:
        pace: what rounds have brought and cost.
    """

    REST = 32  # rounds without the model before it is tried again, at first; doubled each time
    MAX_REST = 512

    def __init__(self, config: SpecConfig, hoped: float = HOPED, branches: float = 0.0):
        self.config = config
        self.pace = Pace(hoped, branches)
        self._trees = Trees(config.max_depth)
        self._sizes = Quotient(1.0, _PRIOR)  # of the model's trees, and nodes they might have
        self._rest, self._rested = self.REST, 0
        # Seconds per token that were expected of look-up alone, and with the model.
        self._expected: deque[tuple[float, float]] = deque(maxlen=MEMORY)

    def count(self, took: Round, most: int = 0, size: float = 0) -> None:
        """Learn from a round.

        Args:
            took: the levels, and what is expected and accepted of them, are the model's.
            most, size: levels that the model's tree might have had, and its size as it was.
        """
        if most:
            self._trees.count(most, took.levels, took.accepted)
            self._sizes.count(size, self.config.nodes_within(most))
        else:
            self._trees.forget(1 / (2 * MEMORY))  # so that it is tried again
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
            row = 1 + int(value[1:].max(1).argmax())
        else:
            self._rested += 1
        return Plan(self._levels(depth)[row], int(value[row].argmax()))

    def _levels(self, depth: int) -> list[int]:
        """Return the levels that the model's tree may be asked for."""
        if self.config.tree_shape == "opt" or not depth:
            return list(range(depth + 1))
        return [0, depth]

    def _values(self, nodes: list[Node], depth: int) -> np.ndarray:
        """Return the expected tokens per second of a round, by levels of the model's tree and nodes
        of the look-up; all of them without a measure as long as there is none."""
        deepest = max([depth, *(node.level for node in nodes)])
        reach = np.zeros((len(nodes) + 1, deepest))  # of the look-up, by its nodes
        for i, node in enumerate(nodes, 1):
            reach[i] = reach[i - 1]
            reach[i, node.level - 1] += node.chance
        levels = self._levels(depth)
        chances, taken = self._trees.chances(), self._trees.forwards()
        model = np.zeros((len(levels), deepest))
        own, drafting = np.zeros((2, len(levels), 1))
        for row, count in enumerate(levels[1:], 1):
            model[row, :count] = chances[:count]
            own[row] = self._sizes.value * self.config.nodes_within(count)
            drafting[row] = self.pace.drafting(taken[count - 1])
        # What one knows the other tends to know, too: together they reach as far as the better one.
        tokens = 1 + np.maximum(model[:, None], reach[None]).sum(-1)
        parents, at = [node.parent for node in nodes], [node.level for node in nodes]
        found = np.concatenate([[0.0], sizes(parents, at, self.pace.branches)])
        verify = self.pace.verify
        return tokens / (verify.first + verify.each * (own + found) + drafting)
