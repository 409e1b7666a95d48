"""The gate: how deep a tree pays, from what rounds have cost and brought so far.

Speed-up of a round over plain decoding (SpecExtend, equation 1): tau * T_plain / (T_verify +
d * T_draft). All of it is measured while generating; nothing is assumed of the models.
"""

from __future__ import annotations


class _Mean:
    """Exponential moving average that starts as a plain one."""

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
    After ``PATIENCE`` rounds that were slower, per token, than plain decoding, trees lose a level;
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
        self._token = _Mean(self.PATIENCE)  # seconds per token of speculative rounds at this depth
        self._rounds = 0
        self._resting = 0
        self._rest = self.REST
        self._growth = self.PATIENCE  # rounds that a depth must win before a deeper one is tried

    def next_depth(self) -> int:
        """Levels for the next tree."""
        if not self.enabled:
            return self.max_depth
        if self._resting:
            self._resting -= 1
            return 0
        self._rounds += 1
        return 0 if self._rounds % self.PROBE == self.PATIENCE else self.depth

    def count(self, depth: int, emitted: int, seconds: float) -> None:
        """A round with a tree of ``depth`` levels took ``seconds`` for ``emitted`` tokens."""
        if not self.enabled:
            return
        if depth == 0:
            self._plain.add(seconds / emitted)
            return
        self._token.add(seconds / emitted)
        if self._token.count < self.PATIENCE or not self._plain.count:
            return
        if self._token.value <= self._plain.value:
            self._rest = self.REST
            if self.depth < self.max_depth and self._token.count >= self._growth:
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
        self._token = _Mean(self.PATIENCE)
