"""Decides whether a round proposes anything, and how deep it may go: the gate.

Speed-up of a round over plain decoding (SpecExtend, equation 1): tau * T_plain / (T_verify +
d * T_draft). All of it is measured while generating; nothing is assumed of the models.
"""

from __future__ import annotations

from .config import SpecConfig
from .pace import FREE, Depth, Pace, Price, Quotient, Round


def break_even(round_seconds: float, plain_seconds: float) -> float:
    """Return the tokens that a round must emit on average to be no slower than plain decoding:
    equation 1 at a speed-up of 1.

    Args:
        round_seconds: of a round, drafting and verifying.
        plain_seconds: of a plain round, which emits one token.
    """
    return round_seconds / plain_seconds


class Gate:
    """Chooses the depth of the next tree, 0 being plain decoding, and what its parts have to bring.

    How large a tree gets is a matter of :class:`Pace`. A draft on a CPU is told the price, and
    stops where a further level does not pay. On a GPU nobody waits for the draft's levels: there
    the depth follows what the last level of the tree before was expected to add, a level at a time.

    Every ``PROBE`` th round is plain, to know what that costs. When the last rounds, ``PATIENCE``
    or more, emitted less than :func:`break_even`, the next ``REST`` are plain, then speculation is
    tried again. Every such loss doubles the rest.

    Args:
        config: ``gate="off"``: always speculate; then levels of the shape ``"opt"`` have to bring
            ``tree_threshold``, and all else is free.
        most: levels of a tree.
        follows: whether the draft can be told the price.
        branches: the share of the target's weights that a tree passes path by path.
    """

    PATIENCE = 6
    PROBE = 64
    REST = 16
    MAX_REST = 256

    def __init__(self, config: SpecConfig, most: int, follows: bool, branches: float = 0.0):
        self.enabled, self.follows = config.gate == "auto", follows
        self._pace, self._most = Pace(branches=branches), most
        # Levels that are measured have to show that they pay.
        self._depth = Depth(most, (most + 1) // 2 if self.enabled else most)
        self._threshold = config.tree_threshold if config.tree_shape == "opt" else 0.0
        self._rounds = 0
        self._resting, self._rest = 0, self.REST
        self._try()

    def next_depth(self) -> int:
        """Return the levels of the next tree at most."""
        if self.enabled:
            if self._resting:
                self._resting -= 1
                return 0
            self._rounds += 1
            if self._rounds % self.PROBE == self.PATIENCE:
                return 0
        return self._most if self.follows else self._depth.levels

    def price(self) -> Price:
        """Return what the draft is told that parts of the next tree have to bring."""
        return self._price() if self.follows else FREE

    def _price(self) -> Price:
        return self._pace.price() if self.enabled else Price(self._threshold)

    def count(self, took: Round) -> None:
        """Learn from a round."""
        if took.levels and not self.follows:
            # Of a draft that does not say what it expects, all levels are wanted.
            gain = float("inf") if took.gain is None else took.gain
            self._depth.follow(took.levels, gain, self._price())
        if not self.enabled or took.seconds is None:
            return
        self._pace.count(took)
        if not took.nodes:
            return
        self._tried += 1
        self._recent.count(took.emitted, took.seconds)
        if self._tried < self.PATIENCE:
            return
        if self._recent.value * self._pace.plain < 1:
            self._resting = self._rest
            self._rest = min(2 * self._rest, self.MAX_REST)
            self._try()
        elif self._tried >= 2 * self.PATIENCE:
            self._rest = self.REST

    def _try(self) -> None:
        """Begin to speculate."""
        self._tried = 0
        self._recent = Quotient()  # tokens and seconds of rounds with a tree
