"""What the loop asks of a draft."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from ..cache import KVCache
from ..graphs import Graphs
from ..tree import Tree


class Draft(ABC):
    """Proposes trees of tokens. One object serves one model for any number of generations.

    The loop calls ``begin`` once per generation and ``prefill`` with each part of the prompt but
    its last token, behind the target's own forward over that part. Then per round it calls
    ``propose`` with the tokens that have been decided since the last call, the prompt's last one
    first, and on its schedule ``retrieve``. Whatever a draft proposes, the output is the target's.
    """

    #: chunk scores from the target's attention are of use
    wants_scores = False

    #: hidden states of the target that ``prefill`` and ``propose`` want, counted as `transformers`
    #: counts them: i is the input of layer i, and the number of layers is what the head reads
    feature_layers: tuple[int, ...] = ()

    #: values of ``draft_cache`` that it knows; one alone where the option means nothing to it
    caches: tuple[str, ...] = ("full", "window", "retrieval")

    #: what the draft's work is captured in on a GPU, if it has no :meth:`obstacle`; set before
    #: ``begin``
    graphs: Graphs = Graphs()

    #: ``propose`` takes ``count``, so that the host need not know how many tokens there are
    takes_count = False

    def obstacle(self) -> str | None:
        """Why the draft cannot be captured in CUDA graphs; None if it can."""
        return "drafts of its kind are not captured"

    @property
    def num_parameters(self) -> int:
        """Weights of its own."""
        return 0

    @abstractmethod
    def begin(self, prompt: Tensor, max_length: int, cache: KVCache) -> None:
        """Forget every earlier generation.

        Args:
            prompt: [1, L] int64, all of it.
            max_length: tokens, prompt included, that the generation will have at most.
            cache: the target's, empty; its committed rows may be read until ``end``.
        """

    def prefill(self, tokens: Tensor, features: Tensor | None) -> None:  # noqa: B027
        """Take in the next part of the prompt.

        Args:
            tokens: [1, T] int64, committed in the target's cache.
            features: [1, T, F] of these tokens, the hidden states of ``feature_layers`` side by
                side; None without.
        """

    @abstractmethod
    def propose(self, tokens: Tensor, depth: int, features: Tensor | None) -> Tree:
        """Take in the decided tokens and grow a tree of at most ``depth`` >= 1 levels.

        Args:
            tokens: [1, T] int64, decided since the last call. The last one is the root that the
                tree grows from, which the target has not seen yet.
            depth: levels.
            features: [1, R, F] of the tokens committed since the last call (or the prefill), which
                are one behind: they end before the root. None without ``feature_layers``.

        With ``takes_count`` there is one more argument:
            count: [1] int32, how many of ``tokens`` and ``features`` count, from the first on, the
                rest being arbitrary; None: all of them.
        """

    def observe(self, tokens: list[int]) -> None:  # noqa: B027
        """See the tokens that a round has decided, once the host has read them. For drafts that
        work on the host: a read of their own would make it wait once more."""

    def settle(self, count: int) -> None:  # noqa: B027
        """Learn how many of the tokens of the last ``propose`` with a ``count`` counted."""

    def retrieve(self, scores: Tensor) -> Tensor | None:
        """Choose what to attend to from ``scores`` [1, C] fp32, the target's attention mass per
        chunk.

        Returns:
            [1, budget] int32 chunk ids with a -1 tail, or None if the draft does not retrieve.
        """
        return None

    def end(self) -> None:  # noqa: B027  nothing to free is common
        """Free what belongs to the generation."""
