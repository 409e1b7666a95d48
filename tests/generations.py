"""Makes generations that a test watches or steers, for ``SpecExtend(..., generation=...)``."""

from __future__ import annotations

from collections.abc import Iterable

from specextend.generation import Generation
from specextend.pace import FREE, Price, Round


class Kept(list):
    """Makes generations, and keeps them."""

    def __call__(self, *args, **options) -> Generation:
        self.append(Generation(*args, **options))
        return self[-1]


class ScriptedGate:
    """Gives the depths of trees that it is told, at no price, and keeps what it hears of rounds."""

    def __init__(self, depths: Iterable[int]):
        self.depths, self.counted = iter(depths), []

    def next_depth(self) -> int:
        return next(self.depths)

    def price(self) -> Price:
        return FREE

    def count(self, took: Round) -> None:
        self.counted.append(took)


def scripted(depths: Iterable[int]):
    """Make generations whose trees have at most these depths, one after the other."""
    gate = ScriptedGate(depths)

    def make(*args, **options) -> Generation:
        return Generation(*args, gate=gate, **options)

    return make
