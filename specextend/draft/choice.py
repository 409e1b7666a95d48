"""Chooses what a round proposes by look-up and by a model, from what both have brought and cost.

A round's value is the tokens that it is expected to emit over the seconds that it is expected to
take. How reliable a look-up is, the look-up knows; here are the levels of the model's trees, the
seconds of its forwards, and those of verify passes by their nodes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median_low

import numpy as np

from ..config import SpecConfig
from .lookup import Node

_MEMORY = 32  # rounds after which an old one counts a third
_PRIOR = 4  # rounds that what is expected beforehand counts for
_FIRST = 0.7  # beforehand: chance that the target confirms a level of the model's tree
_ROUNDS = 4  # by look-up alone, before the model reads the prompt

#: beforehand: what a model takes of the target's seconds for the same
HOPED = 1 / 8


@dataclass(frozen=True)
class Plan:
    """Says what to propose.

    Attributes:
        levels: of the model's tree; 0: the model does not run.
        num_nodes: nodes of the look-up, the likeliest ones.
    """

    levels: int
    num_nodes: int


class Confirmed:
    """Estimates how far the target follows the model's trees.

    A level that has not been tried lately is taken to be like the one before it.
    """

    def __init__(self, max_depth: int):
        self._tried = np.zeros(max_depth)
        self._right = np.zeros(max_depth)

    def count(self, levels: int, accepted: int) -> None:
        """Learn that ``accepted`` of ``levels`` levels were confirmed."""
        self.forget(1 / _MEMORY)
        tried = min(accepted + 1, levels)
        self._tried[:tried] += 1
        self._right[:accepted] += 1

    def forget(self, share: float) -> None:
        """Let what was seen so far count less."""
        self._tried *= 1 - share
        self._right *= 1 - share

    def chances(self) -> np.ndarray:
        """Return [max_depth]: the chances that a path reaches level 1, 2, ..."""
        found, before, chance = [], _FIRST, 1.0
        for tried, right in zip(self._tried, self._right, strict=True):
            before = (right + _PRIOR * before) / (tried + _PRIOR)
            chance *= before
            found.append(chance)
        return np.array(found)


class VerifySeconds:
    """Estimates what a verify pass takes by its nodes: a straight line through recent rounds, by
    medians of slopes and rests (Theil and Sen), which rounds that others disturb do not move."""

    _SHARE = 1 / 40  # beforehand: a node's share of a pass of the root alone
    _PRIOR = 16  # slopes that this counts for

    def __init__(self):
        self._rounds: deque[tuple[int, float]] = deque(maxlen=32)
        self.root, self.per_node = 1.0, self._SHARE  # of a pass, as long as there was none

    @property
    def known(self) -> bool:
        """Tell whether there was a pass to measure by."""
        return bool(self._rounds)

    def count(self, nodes: int, seconds: float) -> None:
        """Learn what a pass took."""
        self._rounds.append((nodes, seconds))
        sizes, took = np.array(self._rounds).T
        prior = self._SHARE * float(np.median(took / (1 + self._SHARE * sizes)))
        one, other = np.triu_indices(len(sizes), 1)
        wider = sizes[one] != sizes[other]
        one, other = one[wider], other[wider]
        slopes = (took[one] - took[other]) / (sizes[one] - sizes[other])
        slope = np.median(np.concatenate([slopes, np.full(self._PRIOR, prior)]))
        # More than four times as much is not a node's, but others' that disturbed some rounds.
        self.per_node = float(np.clip(slope, 0.0, 4 * prior))
        self.root = float(np.median(took / (1 + self.per_node / prior * self._SHARE * sizes)))


class Choice:
    """Chooses the plan of each round of a generation. The best one by what is known, and now and
    then the model, where it has long not been tried.

    Args:
        config: of the model's trees.
    """

    REST = 32  # rounds without the model before it is tried again, at first; doubled each time
    MAX_REST = 512

    def __init__(self, config: SpecConfig):
        self.config = config
        self.confirmed = Confirmed(config.max_depth)
        self.verify = VerifySeconds()
        self._forwards: deque[float] = deque(maxlen=9)  # seconds of the model's, the latest
        self._rest, self._rested = self.REST, 0
        # Seconds per token that were expected of look-up alone, and with the model.
        self._expected: deque[tuple[float, float]] = deque(maxlen=_MEMORY)

    def count(
        self, plan: Plan, accepted: int, nodes: int, seconds: float | None, drafting: float
    ) -> None:
        """Learn from a round.

        Args:
            plan: what it proposed.
            accepted: levels of the model's tree that were confirmed.
            nodes: of the whole tree.
            seconds: that it took; None: that says nothing of other rounds.
            drafting: of these, the model's.
        """
        if plan.levels:
            self.confirmed.count(plan.levels, accepted)
        else:
            self.confirmed.forget(1 / (2 * _MEMORY))  # so that it is tried again
        if seconds is None:
            return
        self.verify.count(nodes, seconds - drafting)
        if plan.levels:
            self._forwards.append(drafting / plan.levels)

    def worth(self, nodes: list[Node], depth: int, seconds: float, tokens: int) -> bool:
        """Tell whether the model is expected to save the seconds that it needs before it can run.

        Args:
            nodes, depth: as of :meth:`plan`, of the round to come.
            seconds: that the model needs.
            tokens: that are left to write.
        """
        if not self.verify.known:
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
        """Return the levels that the model's tree may have."""
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
        model = np.zeros((len(levels), deepest))
        for row, count in enumerate(levels):
            model[row, :count] = self.confirmed.chances()[:count]
        # What one knows the other tends to know, too: together they reach as far as the better one.
        tokens = 1 + np.maximum(model[:, None], reach[None]).sum(-1)
        root, node = self.verify.root, self.verify.per_node
        # Of what a forward takes nothing is known before it is tried: it is hoped to be little.
        forward = median_low(self._forwards) if self._forwards else HOPED * root
        sizes = np.array([self._num_nodes(count) for count in levels])[:, None]
        seconds = root + node * (sizes + np.arange(len(nodes) + 1)[None])
        return tokens / (seconds + forward * np.array(levels)[:, None])

    def _num_nodes(self, levels: int) -> int:
        """Return the proposed nodes of a model's tree of so many levels."""
        config = self.config
        if config.tree_shape == "fixed":
            return sum(config.tree_widths[:levels])
        offered = levels and config.tree_top_k * (1 + (levels - 1) * config.tree_width)
        return min(config.tree_nodes, offered)
