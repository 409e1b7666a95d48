"""What the loop asks of a draft."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from ..tree import Tree


class Draft(ABC):
    """Proposes trees of tokens. One object serves one model for any number of generations.

    The loop calls ``begin`` once per generation, then per round ``propose`` with the tokens that
    have been decided since the last call, and on its schedule ``retrieve``. Whatever a draft
    proposes, the output is the target's.
    """

    #: chunk scores from the target's attention are of use
    wants_scores = False

    @abstractmethod
    def begin(
        self, prompt: Tensor, max_length: int, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Forget every earlier generation and take in a prompt.

        Args:
            prompt: [1, L] int64, all of the prompt but its last token; may be empty.
            max_length: tokens, prompt included, that the generation will have at most.
            progress: called with (tokens done, tokens in all) as the prompt is taken in.
        """

    @abstractmethod
    def propose(self, tokens: Tensor, depth: int) -> Tree:
        """Take in ``tokens`` [1, T] int64, decided since the last call, and grow a tree of at most
        ``depth`` >= 1 levels below the last of them."""

    def retrieve(self, scores: Tensor) -> Tensor | None:
        """Choose what to attend to from ``scores`` [1, C] fp32, the target's attention mass per
        chunk.

        Returns:
            [1, budget] int32 chunk ids with a -1 tail, or None if the draft does not retrieve.
        """
        return None

    def end(self) -> None:  # noqa: B027  nothing to free is common
        """Free what belongs to the generation."""
