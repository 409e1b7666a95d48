"""Looks the last tokens of a text up in the text before them, and says how likely what follows is.

What followed the same words before is proposed again (prompt lookup decoding; LLMA,
arXiv 2304.04487). How often that was right is counted token by token along the text, whatever was
proposed: it tells which continuations to follow, and how far.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from ..config import SpecConfig
from .base import Kept

_MATCHES = 32  # looked at per round; the better ones come first
_LONGEST = 16  # matches from here on are alike
_OTHERS = 0.5  # of the reliability of a match, where a better one has another continuation
_SHORTEST = 0.3  # beforehand: chance that the token behind a match of one is the next one
_LONGER = 0.15  # of the doubt about a match, what one token more takes away
_PRIOR = 4  # tokens that what is expected of a match beforehand counts for
_MEMORY = 64  # tokens after which an old one counts a third


def deepest(config: SpecConfig, num_nodes: int) -> int:
    """Return the levels that a look-up of ``num_nodes`` nodes may have: all can be one chain."""
    fixed = config.tree_shape == "fixed"
    return config.max_depth if fixed else max(config.max_depth, num_nodes)


@dataclass(frozen=True)
class Node:
    """Holds a token that a look-up proposes.

    Attributes:
        parent: among the nodes of the look-up, counted from 1; 0 is the root.
        token: the id.
        level: below the root, from 1 on.
        chance: that the text goes on like this down to here, as far as the look-up knows.
    """

    parent: int
    token: int
    level: int
    chance: float


class Reliability(Kept):
    """Estimates how often the token behind a match is the text's next one, by the match's length.

    A look-up that has followed the text for some tokens has a match that is longer by as many, so
    that one table serves every level. Of a length that has not been met, a little more is expected
    than of the one before it.
    """

    def __init__(self):
        self._right = [0.0] * (_LONGEST + 1)
        self._seen = [0.0] * (_LONGEST + 1)
        self._estimate()

    def fork(self) -> Reliability:
        return copy.deepcopy(self)

    def parts(self) -> dict:
        return {"right": self._right, "seen": self._seen}

    @classmethod
    def of(cls, parts: dict) -> Reliability:
        """Make it again of its :meth:`parts`."""
        made = cls()
        made._right, made._seen = parts["right"], parts["seen"]
        made._estimate()
        return made

    def count(self, length: int, right: bool) -> None:
        """Learn whether the token behind a match of ``length`` tokens was the next one."""
        length, keep = min(length, _LONGEST), 1 - 1 / _MEMORY
        self._right[length] = keep * self._right[length] + right
        self._seen[length] = keep * self._seen[length] + 1
        self._estimate()

    def _estimate(self) -> None:
        expected, self._chances = _SHORTEST, [0.0]
        for right, seen in zip(self._right[1:], self._seen[1:], strict=True):
            chance = (right + _PRIOR * expected) / (seen + _PRIOR)
            self._chances.append(chance)
            expected = chance + _LONGER * (1 - chance)

    def __getitem__(self, length: int) -> float:
        """Return the chance behind a match of ``length`` tokens, at least 1."""
        return self._chances[min(length, _LONGEST)]


class LookUp:
    """Finds earlier occurrences of a text's last tokens, and grows a tree of what followed them.

    Occurrences of the longest match come first, ``config.ngram_size`` tokens at most, and among
    equals the most recent.

    Args:
        config: of matches and trees.
        capacity: tokens that the text will have at most.
    """

    def __init__(self, config: SpecConfig, capacity: int):
        self.config = config
        self.reliability = Reliability()
        self._ids = np.zeros(capacity, dtype=np.int64)
        self.length = 0
        self._found: list[tuple[int, int]] | None = None

    def begin(self, tokens: list[int]) -> None:
        """Take in a prompt."""
        self._append(tokens)

    def follow(self, tokens: list[int]) -> None:
        """Take in tokens that have been decided, and learn from them what matches are worth."""
        for token in tokens[: len(self._ids) - self.length]:
            if self.length:
                for end, matched in self.occurrences()[:1]:
                    self.reliability.count(matched, int(self._ids[end + 1]) == token)
            self._append([token])

    def _append(self, tokens: list[int]) -> None:
        end = min(self.length + len(tokens), len(self._ids))
        self._ids[self.length : end] = tokens[: end - self.length]
        self.length, self._found = end, None

    def occurrences(self) -> list[tuple[int, int]]:
        """Return where the last tokens have been before: the place of the last of them, and how
        many match; of the first occurrence also beyond ``ngram_size``."""
        if self._found is None:
            self._found = self._search()
        return self._found

    def _search(self) -> list[tuple[int, int]]:
        n, size = self.length, self.config.ngram_size
        ids = self._ids[:n]
        ends = np.flatnonzero(ids[: n - 1] == ids[n - 1])  # last tokens of occurrences
        matched = np.ones_like(ends)
        for back in range(1, min(size, n)):
            running = (matched == back) & (ends >= back)
            matched += running & (ids[ends - back] == ids[n - 1 - back])
        best = np.lexsort((-ends, -matched))[:_MATCHES]
        found = list(zip(ends[best].tolist(), matched[best].tolist(), strict=True))
        if found and found[0][1] == size:
            end, length = found[0]
            while length < min(_LONGEST, end + 1) and ids[end - length] == ids[n - 1 - length]:
                length += 1
            found[0] = end, length
        return found

    def grow(self, depth: int, num_nodes: int) -> list[Node]:
        """Return the likeliest continuations, merged where they agree, parents before children.

        ``tree_width`` (or ``tree_widths``) nodes of a level at most; with a width of 1 it is a
        chain.

        Args:
            depth: levels at most.
            num_nodes: nodes at most; the likeliest come first.
        """
        if self.config.tree_shape == "fixed":
            room = list(self.config.tree_widths[:depth])
        else:
            room = [self.config.tree_width] * depth
        nodes: list[Node] = []
        heap: list[tuple] = []
        self._offer(heap, 0, 0, 1.0, self.occurrences())
        while heap and len(nodes) < num_nodes:
            chance, _, parent, level, token, occurrences = heappop(heap)
            if level > len(room) or not room[level - 1]:
                continue
            room[level - 1] -= 1
            nodes.append(Node(parent, token, level, -chance))
            self._offer(heap, len(nodes), level, -chance, occurrences)
        return nodes

    def _offer(self, heap: list, parent: int, level: int, chance: float, occurrences) -> None:
        """Push the children of a node: what followed there, the better occurrences first."""
        followers: dict[int, list[tuple[int, int]]] = {}
        for end, matched in occurrences:
            # An occurrence that runs into the present goes on with its own continuation.
            at = end + 1 + level % (self.length - 1 - end)
            followers.setdefault(int(self._ids[at]), []).append((end, matched))
        trust = 1.0
        for token, those in followers.items():
            # Whatever one of them is right in leaves less for those behind it.
            share = trust * chance * self.reliability[those[0][1] + level]
            chance -= share
            trust = _OTHERS
            order = len(heap), parent  # among equals the first comes first
            heappush(heap, (-share, order, parent, level + 1, token, those))
