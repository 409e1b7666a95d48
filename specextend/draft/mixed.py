"""Proposes by look-up first and by a model where that pays: two drafts in one tree.

A round verifies what the look-up found, without running the model; or the model's tree with what
the look-up found merged into it; or the model's tree alone. Which of them, and how large, is chosen
round by round (:class:`specextend.draft.choice.Choice`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from ..config import SpecConfig
from ..graphs import Stopwatch
from ..pace import FREE, HOPED, Price, Round
from ..tree import Tree
from .base import Decided, Draft, Kept, follows
from .choice import Choice
from .lookup import LookUp, Reliability, deepest
from .ngram import NGramDraft


class MixedDraft(Draft):
    """Proposes by a draft with a model and by look-up.

    The model takes in what was decided without it when it is run next, and reads the prompt when
    that is expected to be made up for in what is left to write. Trees have twice
    ``tree_nodes`` nodes at most: the model's, and as many of the look-up, or the look-up's alone.

    Args:
        model: a draft of any other kind.
        config: tree options.
        hoped: what the model takes beside the target for the same work, beforehand: the share of
            weights.
        branches: the share of the target's weights that a tree passes path by path.
        choose: makes what chooses the plans of a generation.

    Attributes:
        accepted: tokens of the last generation by source, ``"model"`` and ``"ngram"``; what both
            proposed counts as the model's.

    Raises:
        ValueError: the draft works on the host itself, and has nothing to be mixed with look-up.
    """

    on_host = True

    def __init__(
        self,
        model: Draft,
        config: SpecConfig,
        hoped: float = HOPED,
        branches: float = 0.0,
        choose: Callable[[SpecConfig, float, float], Choice] = Choice,
    ):
        if model.on_host:
            raise ValueError(
                f"look-up is mixed with a draft that has a model, got one of kind {model.kind!r}"
            )
        self.model, self.config, self._choose = model, config, choose
        self._hoped, self._branches = hoped, branches
        self.kind = f"{model.kind}+{NGramDraft.word}"
        self.cache_kinds, self.wants_scores = model.cache_kinds, model.wants_scores
        self.feature_layers, self.causal_lm = model.feature_layers, model.causal_lm
        self.max_nodes = 2 * config.max_nodes
        self.max_depth = deepest(config, self.max_nodes)
        self.accepted: Counter = Counter()

    def with_config(self, config: SpecConfig) -> MixedDraft:
        model = self.model.with_config(config)
        return MixedDraft(model, config, self._hoped, self._branches, self._choose)

    @property
    def num_parameters(self) -> int:
        return self.model.num_parameters

    def identity(self) -> dict:
        return {**self.model.identity(), "kind": self.kind}

    def check_length(self, prompt: int, total: int) -> None:
        self.model.check_length(prompt, total)

    def obstacle(self) -> str | None:
        return self.model.obstacle()

    # ---- a generation ----------------------------------------------------------------------------

    def begin(self, prompt, max_length, cache, graphs) -> None:
        self._graphs, self._device = graphs, prompt.device
        self._lookup = LookUp(self.config, max_length + 1)
        self._lookup.begin(prompt[0].tolist())
        self._choice = self._choose(self.config, self._hoped, self._branches)
        self._follows = follows(prompt.device, graphs)
        self.accepted = Counter()
        self._waiting: list[Decided] = []  # what the model has yet to take in
        self._ran = False  # the model has, in this generation
        self._proposed: _Proposed | None = None  # until its round is observed
        # Where the text is too long for the model there is still look-up.
        limit = self.model.max_length
        self._limit = max_length if limit is None else limit
        self._has_model = prompt.shape[1] < self._limit
        self._has_read = False
        self._most, self._prompt_length = max_length, prompt.shape[1]
        self._began, self._reading = time.perf_counter(), None
        if self._has_model:
            self.model.begin(prompt, max_length, cache, graphs)

    def reusable(self, kept, length) -> int:
        return self.model.reusable(None if kept is None else kept.model, length)

    def resume(self, kept, length, start) -> None:
        if kept is not None:
            self._lookup.reliability = kept.reliability
        if self._has_model:
            self.model.resume(None if kept is None else kept.model, length, start)

    def keep(self, decided) -> _Kept:
        if decided is not None:
            parts = [part for part in (*self._waiting, decided) if len(part)]
            decided = _joined(parts) if parts else None
        model = self.model.keep(decided) if self._has_model else None
        return _Kept(model, self._lookup.reliability)

    def kept_from(self, parts) -> _Kept:
        model = parts["model"] and self.model.kept_from(parts["model"])
        return _Kept(model, Reliability.of(parts["reliability"]))

    def prefill(self, decided) -> None:
        if self._has_model:
            self.model.prefill(decided)

    def finish_prefill(self, scores) -> bool:
        if not self._has_model:
            return True
        part = self.model.late_part(self._prompt_length)
        if part and not self._worth_reading(part):
            return False
        self._has_read = self.model.finish_prefill(scores)
        return self._has_read

    def _worth_reading(self, part: float) -> bool:
        """Tell whether the model is expected to make up for reading a part of the prompt."""
        if self._reading is None:
            self._reading = part * self._hoped * (time.perf_counter() - self._began)
        nodes = self._lookup.grow(self.max_depth, self.max_nodes)
        left = self._most - self._lookup.length
        return self._choice.worth(nodes, self.config.max_depth, self._reading, left)

    def end(self) -> None:
        self.model.end()
        self._graphs = self._lookup = self._waiting = self._choice = None

    def retrieve(self, scores):
        return self.model.retrieve(scores) if self._has_model else None

    def propose(self, decided, depth, price=FREE) -> Tree:
        self._waiting.append(decided)
        nodes = self._lookup.grow(depth, self.max_nodes)
        # The text ends with the root, which the target has not seen.
        room = min(depth, self.config.max_depth, self._limit - self._lookup.length + 1)
        plan = self._choice.plan(nodes, max(room, 0) if self._has_read else 0)
        found = [(node.parent, node.token) for node in nodes[: plan.num_nodes]]
        self._proposed = proposed = _Proposed(plan.levels)
        if not plan.levels:
            proposed.tree = Tree.of(decided.tokens[:, -1:], found)
            return proposed.tree
        proposed.watch = Stopwatch(self._device)
        with proposed.watch:
            tree = self._run(plan.levels, price)
        proposed.model = tree
        if found:
            rows = torch.cat([tree.parents.long(), tree.tokens]).tolist()
            proposed.own = list(zip(*rows, strict=True))[1:]
            merged = _merge(proposed.own, found, self.max_nodes)
            tree = Tree.of(decided.tokens[:, -1:], merged)
        proposed.tree = tree
        # How large the model's tree gets is chosen here.
        return replace(tree, promise=None)

    def _run(self, levels: int, price: Price) -> Tree:
        """Have the model take in all that is decided, and grow a tree."""
        decided, self._waiting = _joined(self._waiting), []
        count, width = len(decided), self.config.max_depth + 1
        if not self._follows:
            price = FREE
        elif self.config.gate == "auto":
            price = self._choice.pace.price()
        captured = self._graphs.enabled and self._ran and count <= width
        self._ran = True
        if not captured:
            return self.model.propose(decided, levels, price)
        # A graph serves any number of tokens: it is told on the device how many count.
        pad = width - count
        tokens = F.pad(decided.tokens, (0, pad))
        features = decided.features
        features = None if features is None else F.pad(features, (0, 0, 0, pad))
        counts = torch.full((1,), count, dtype=torch.int32, device=self._device)
        tree = self.model.propose(Decided(tokens, features, counts), levels)
        self.model.settle([count])
        return tree

    def observe(self, tokens, seconds=None) -> None:
        (tokens,) = tokens
        proposed, self._proposed = self._proposed, None
        if proposed is not None:
            self._count(proposed, tokens[:-1], seconds)
        self._lookup.follow(tokens)

    def _count(self, proposed: _Proposed, accepted: list[int], seconds: float | None) -> None:
        """Learn from a round, and note whose the accepted tokens were."""
        model, size = proposed.model, proposed.tree.size(self._branches)
        if model is None:
            took = Round(0, size, len(accepted) + 1, seconds)
            self._choice.count(took)
            self.accepted["ngram"] += len(accepted)
            return
        models = proposed.by_model(accepted)
        expected = None if model.promise is None else float(model.promise[0, 0])
        drafting = None if seconds is None else proposed.watch.seconds
        took = Round(
            model.depth, size, len(accepted) + 1, seconds, drafting, models, expected,
        )  # fmt: skip
        self._choice.count(took, proposed.most, model.size(self._branches))
        self.accepted += Counter(model=models, ngram=len(accepted) - models)


def _joined(parts: list[Decided]) -> Decided:
    """Join tokens that follow each other, all of which count."""
    features = None
    if parts[0].features is not None:
        features = torch.cat([part.features for part in parts], 1)
    return Decided(torch.cat([part.tokens for part in parts], 1), features)


@dataclass
class _Kept(Kept):
    """Holds what a later generation can go on from, of the model and of look-up."""

    model: Kept | None
    reliability: Reliability

    @property
    def num_bytes(self) -> int:
        """Count the bytes that it takes."""
        return 0 if self.model is None else self.model.num_bytes

    def share(self) -> None:
        if self.model is not None:
            self.model.share()

    def fork(self) -> _Kept:
        return _Kept(None if self.model is None else self.model.fork(), self.reliability.fork())

    def parts(self) -> dict:
        model = None if self.model is None else self.model.parts()
        return {"model": model, "reliability": self.reliability.parts()}


@dataclass
class _Proposed:
    """Holds what a round proposed, until it is observed.

    Attributes:
        most: levels that the model's might have.
        tree: the whole one.
        model: the model's tree; None: it did not run.
        watch: its seconds.
        own: parent and token of the model's nodes, counted from 1; None: all nodes are its own.
    """

    most: int
    tree: Tree | None = None
    model: Tree | None = None
    watch: Stopwatch | None = None
    own: list[tuple[int, int]] | None = None

    def by_model(self, accepted: list[int]) -> int:
        """Count the accepted tokens that the model had proposed."""
        if self.own is None:
            return len(accepted)
        children = {node: i for i, node in enumerate(self.own, 1)}
        node = 0
        for count, token in enumerate(accepted):
            node = children.get((node, token))
            if node is None:
                return count
        return len(accepted)


def _merge(
    own: list[tuple[int, int]], others: list[tuple[int, int]], most: int
) -> list[tuple[int, int]]:
    """Add to a tree the nodes of another one that it does not have.

    Args:
        own: parent and token of each node, counted from 1; parents come first.
        others: the same of the other tree.
        most: nodes of both together; what is too much of ``others`` is left out.
    """
    merged = list(own)
    known = {node: i for i, node in reversed(list(enumerate(own, 1)))}
    places = [0]  # of the other tree's nodes; None: left out
    for parent, token in others:
        parent = places[parent]
        place = None if parent is None else known.get((parent, token))
        if place is None and parent is not None and len(merged) < most:
            merged.append((parent, token))
            place = known[parent, token] = len(merged)
        places.append(place)
    return merged
