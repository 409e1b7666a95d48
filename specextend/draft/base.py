"""Says what the engine asks of a draft: the contract of every kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cache import KVCache
from ..config import SpecConfig
from ..graphs import Graphs
from ..pace import FREE, Price
from ..target import Target
from ..tree import Tree
from .checkpoint import Checkpoint

#: what a draft can be made of: a model, weights that lie somewhere, or the word for its kind
Source = PreTrainedModel | Checkpoint | str

#: of target and draft, None where it is not known
Tokenizers = tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None]


@dataclass
class Decided:
    """Holds tokens that a draft has yet to take in, of B sequences.

    Attributes:
        tokens: [B, T] int64, in the order of the text.
        features: [B, T, F], what the target saw when it decided each of them: the hidden states of
            ``feature_layers``, side by side, at the position before the token's. A prompt's first
            token has zeros. None for drafts without ``feature_layers``.
        counts: [B] int32, how many tokens of each sequence count, from the first on; the rest is
            arbitrary. They are known on the device alone. None: all of them do.
    """

    tokens: Tensor
    features: Tensor | None = None
    counts: Tensor | None = None

    def __getitem__(self, columns: slice) -> Decided:
        """Return some of the tokens, where all of them count."""
        features = None if self.features is None else self.features[:, columns]
        return Decided(self.tokens[:, columns], features)

    def __len__(self) -> int:
        """Count the tokens, T."""
        return self.tokens.shape[1]


class Kept(ABC):
    """Holds what a draft keeps of a text between two generations."""

    #: bytes that it takes, if they are many
    num_bytes: int = 0

    def share(self) -> None:  # noqa: B027
        """Be ready for forks, so that the first one copies no more than others."""

    @abstractmethod
    def fork(self) -> Kept:
        """Return the same, for a text that goes on by itself from here on."""

    def parts(self) -> dict | None:
        """Return what :meth:`Draft.kept_from` makes it of: plain data, with tensors where they lie;
        None: it is not saved."""
        return None


def follows(device: torch.device, graphs: Graphs) -> bool:
    """Tell whether a draft may look at what it has come to: on a GPU, and where it runs from
    graphs, nobody waits for that."""
    return device.type == "cpu" and not graphs.enabled


class Draft(ABC):
    """Proposes trees of tokens. One object serves one model for any number of generations.

    The engine calls ``begin`` once per generation, and ``resume`` where it goes on from an earlier
    one; ``prefill`` with each part of the prompts but their last tokens that the target reads,
    behind its own forward over that part; and ``finish_prefill`` when
    the first token is out, before each tree until the draft is done with the prompt. Then per round
    it calls ``propose`` with the tokens that have been decided since the last call, the prompt's
    last one first, and on its schedule ``retrieve``. Whatever a draft proposes, the output is the
    target's.

    B is the number of sequences, which is 1 today.
    """

    #: the kind's name in tables and records
    kind: str = "draft"

    #: what a user writes for a draft of this kind; None for kinds that come as weights
    word: ClassVar[str | None] = None

    #: chunk scores from the target's attention are of use
    wants_scores = False

    #: hidden states of the target that ``prefill`` and ``propose`` want, counted as `transformers`
    #: counts them: i is the input of layer i, and the number of layers is what the head reads
    feature_layers: tuple[int, ...] = ()

    #: values of ``draft_cache`` that it knows; one alone where the option means nothing to it
    cache_kinds: tuple[str, ...] = ("full", "window", "retrieval")

    #: it works on the host, at least in part: it is asked for a tree once ``observe`` has told it
    #: what was decided, never before the host has read that
    on_host = False

    #: levels and nodes that its trees can have, where these are more than ``config.max_depth`` and
    #: ``config.max_nodes``
    max_depth: int = 0
    max_nodes: int = 0

    #: tokens of a text that it can take in, those that it proposes among them; None: any number.
    #: It is asked for no tree that goes further, and has no part in a generation whose prompt has
    #: as many
    max_length: int | None = None

    #: the causal LM that it runs, where that is a model apart from the target
    causal_lm: PreTrainedModel | None = None

    # ---- how it is made --------------------------------------------------------------------------

    @classmethod
    def recognises(cls, source: Source) -> bool:
        """Tell whether ``source`` is, or is meant to be, a draft of this kind."""
        return cls.word is not None and isinstance(source, str) and source == cls.word

    @classmethod
    def load(
        cls, source: Source, target: Target, config: SpecConfig, tokenizers: Tokenizers
    ) -> Draft:
        """Make a draft for ``target`` of what the kind recognises.

        Raises:
            ValueError: it does not fit the target.
        """
        raise NotImplementedError(f"a {cls.__name__} is given to SpecExtend as an object")

    def with_config(self, config: SpecConfig) -> Draft:
        """Return a draft on the same weights with other options.

        Raises:
            ValueError: the options are not for this kind.
        """
        raise NotImplementedError(f"a {type(self).__name__} keeps the options it was made with")

    # ---- what it can do --------------------------------------------------------------------------

    @property
    def num_parameters(self) -> int:
        """Count the weights of its own."""
        return 0

    def identity(self) -> dict:
        """Say which draft it is, the same in every process: kind, weights, and options that what it
        keeps depends on."""
        return {"kind": self.kind}

    def check_length(self, prompt: int, total: int) -> None:  # noqa: B027  most hold any length
        """Refuse a text that the draft cannot follow.

        Args:
            prompt: tokens of the prompt.
            total: tokens of prompt and output.

        Raises:
            ValueError: with the lengths that it can.
        """

    def obstacle(self) -> str | None:
        """Say why the draft cannot be captured in CUDA graphs; None if it can.

        One that can works with ``counts`` that the device alone knows, calls its work through the
        ``graphs`` that ``begin`` gave it, and is asked for a tree before the host has read what was
        decided, unless it works ``on_host``.
        """
        return "drafts of its kind are not captured"

    # ---- a generation ----------------------------------------------------------------------------

    @abstractmethod
    def begin(self, prompt: Tensor, max_length: int, cache: KVCache, graphs: Graphs) -> None:
        """Begin a generation; nothing of an earlier one counts, unless ``resume`` follows.

        Args:
            prompt: [B, L] int64, all of it.
            max_length: tokens, prompt included, that a sequence will have at most.
            cache: the target's, with what is kept of the prompt; its committed rows may be read
                until ``end``.
            graphs: that the draft's work is captured in, if it has no :meth:`obstacle`.
        """

    def reusable(self, kept: Kept | None, length: int) -> int:
        """Return how many tokens the target need not read again for this draft's sake.

        Args:
            kept: what :meth:`keep` returned at the end of the earlier generation.
            length: tokens of the prompt that the target's cache holds from there.
        """
        return 0 if self.feature_layers else length

    def resume(self, kept: Kept | None, length: int, start: int) -> None:  # noqa: B027
        """Go on from an earlier generation whose text begins in the same way; behind ``begin``.

        Args:
            kept: what :meth:`keep` returned then.
            length: tokens at the beginning of the prompt that are as in that text.
            start: tokens, as many at most, that the target does not read again: ``prefill`` brings
                those behind.
        """

    def prefill(self, decided: Decided) -> None:  # noqa: B027
        """Take in the next part of the prompt, T tokens that are committed in the target's cache.

        Args:
            decided: all of its tokens count.
        """

    def late_part(self, length: int) -> float:
        """Return about how much of a prompt of ``length`` tokens is left for ``finish_prefill`` to
        read; 0: nothing, 1: all of it."""
        return 0.0

    def finish_prefill(self, scores: Tensor | None) -> bool:
        """Do what can wait until the first token is out. Called before the first tree, and before
        each further one until it has been done.

        Args:
            scores: [B, C] fp32, the target's attention mass per chunk when it was scored last,
                where ``wants_scores`` and the prompt is longer than the budget; None otherwise.
                They are given to ``retrieve`` next, if it is done.

        Returns:
            Whether it is done; until then nothing is retrieved.
        """
        return True

    @abstractmethod
    def propose(self, decided: Decided, depth: int, price: Price = FREE) -> Tree:
        """Take in the decided tokens and grow a tree of at most ``depth`` levels per sequence.

        Args:
            decided: the tokens since the last call. The last one that counts is the root that the
                tree grows from, which the target has not seen yet.
            depth: levels, at least 1 and at most ``config.max_depth``, or ``max_depth`` if that is
                more, so that the decided tokens and all levels but the last, whose nodes need not
                be taken in, are within ``max_length``.
            price: what parts of the tree should be expected to add, so that they are worth their
                time; free where the host does not follow the device.

        Returns:
            A tree of B sequences, all with M nodes.
        """

    def observe(  # noqa: B027
        self, tokens: list[list[int]], seconds: float | None = None
    ) -> None:
        """See what a round has decided, once the host has read it. For drafts that work on the
        host: a read of their own would make it wait once more.

        Args:
            tokens: of each of the B sequences.
            seconds: that the device has worked for the round, ``propose`` and ``retrieve`` before
                it included; None where they say nothing of other rounds.
        """

    def settle(self, counts: list[int]) -> None:  # noqa: B027
        """Learn, for each of the B sequences, how many tokens of the last ``propose`` with
        ``counts`` did count."""

    def retrieve(self, scores: Tensor) -> Tensor | None:
        """Choose what to attend to.

        Args:
            scores: [B, C] fp32, the target's attention mass per chunk.

        Returns:
            [B, budget] int32 chunk ids with a -1 tail, or None if the draft does not retrieve.
        """
        return None

    def keep(self, decided: Decided | None) -> Kept | None:
        """Return what a later generation can go on from, before ``end``; None: nothing.

        Args:
            decided: what has been decided since the last ``propose``, as that would get it; None
                where the generation was broken off in the middle of a call.
        """
        return None

    def kept_from(self, parts: dict) -> Kept | None:
        """Make again what :meth:`keep` returned once, to a draft of the same :meth:`identity`.

        Args:
            parts: as :meth:`Kept.parts` returned them, on the target's device, for it to keep.
        """
        return None

    def end(self) -> None:  # noqa: B027  nothing to free is common
        """Free what belongs to the generation, also where there was no :meth:`begin`."""
