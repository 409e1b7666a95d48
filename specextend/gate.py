"""Finds how deep a tree pays, from what rounds have cost and brought so far: the gate.

Speed-up of a round over plain decoding (SpecExtend, equation 1): tau * T_plain / (T_verify +
d * T_draft). All of it is measured while generating; nothing is assumed of the models.
"""

from __future__ import annotations


def break_even(round_seconds: float, plain_seconds: float) -> float:
    """Return the tokens that a round must emit on average to be no slower than plain decoding:
    equation 1 at a speed-up of 1.

    Args:
        round_seconds: of a round, drafting and verifying.
        plain_seconds: of a plain round, which emits one token.
    """
    return round_seconds / plain_seconds


class _Mean:
    """Keeps an exponential moving average that starts as a plain one."""

    def __init__(self, memory: int = 16):
        self.value = 0.0
        self.count = 0
        self.memory = memory

    def add(self, x: float) -> None:
        self.count += 1
        self.value += (x - self.value) / min(self.count, self.memory)


class Gate:
    """Chooses the depth of the next tree; 0 is plain decoding.

    Speculation starts at ``depth``. Every ``PROBE`` th round is plain, to know what that costs.
    ``PATIENCE`` rounds or more that emit less than :func:`break_even` lose: trees get a level less;
    a tree of one level that loses becomes ``REST`` plain rounds, then speculation is tried again.
    Trees that win grow back. Every loss doubles the wait before the next such try.

    Args:
        depth: levels of a full tree.
        enabled: False: always ``depth``.
    """

    PATIENCE = 6
    PROBE = 64
    REST = 16
    MAX_WAIT = 256

    def __init__(self, depth: int, enabled: bool):
        self.max_depth = depth
        self.enabled = enabled
        self.depth = depth
        self._plain = _Mean()  # seconds of a plain round, which is one token
        self._start()
        self._rounds = 0
        self._resting = 0
        self._rest = self.REST
        self._growth = self.PATIENCE  # rounds that a depth must win before a deeper one is tried

    def next_depth(self) -> int:
        """Return the levels of the next tree."""
        if not self.enabled:
            return self.max_depth
        if self._resting:
            self._resting -= 1
            return 0
        self._rounds += 1
        return 0 if self._rounds % self.PROBE == self.PATIENCE else self.depth

    def count(self, depth: int, emitted: int, seconds: float) -> None:
        """Learn that a round with ``depth`` levels took ``seconds`` for ``emitted`` tokens."""
        if not self.enabled:
            return
        if depth == 0:
            self._plain.add(seconds / emitted)
            return
        self._round.add(seconds)
        self._emitted.add(emitted)
        if self._round.count < self.PATIENCE or not self._plain.count:
            return
        if self._emitted.value >= break_even(self._round.value, self._plain.value):
            if self._round.count >= self._growth:
                self._rest = self.REST
                if self.depth < self.max_depth:
                    self._change(self.depth + 1)
        elif self.depth > 1:
            self._growth = min(2 * self._growth, self.MAX_WAIT)
            self._change(self.depth - 1)
        else:
            self._resting = self._rest
            self._rest = min(2 * self._rest, self.MAX_WAIT)
            self._growth = self.PATIENCE
            self._change(self.max_depth)

    def _change(self, depth: int) -> None:
        self.depth = depth
        self._start()

    def _start(self) -> None:
        """Forget the speculative rounds so far: they had other trees."""
        # Two means, not one of seconds per token: rounds of one cost that emit 1 and 5 tokens in
        # turn take a third of that cost per token, while the mean of their quotients is 0.6.
        self._round = _Mean()  # seconds
        self._emitted = _Mean()  # tokens
