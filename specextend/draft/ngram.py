"""Proposes by look-up in the prompt and the output: a draft without a model.

It costs nothing, and pays where the output copies its input.
"""

from __future__ import annotations

from ..config import SpecConfig
from ..pace import FREE
from ..target import Target
from ..tree import Tree, num_paying
from .base import Draft, Source, Tokenizers
from .lookup import LookUp, Reliability, deepest


class NGramDraft(Draft):
    """Proposes what followed earlier occurrences of the last tokens.

    The likeliest ``tree_nodes`` of their continuations, as :class:`LookUp` grows them: a long match
    brings a chain of as many tokens, short ones bring several branches. Where nothing matches, or
    nothing that does is likely enough to pay, nothing is proposed, and the round is a plain one.

    It works on the host, on the tokens that the loop has read in any case.
    """

    kind = word = "ngram"
    cache_kinds = ("full",)
    on_host = True

    def __init__(self, config: SpecConfig):
        self.config = config
        self.max_depth = deepest(config, config.max_nodes)

    @classmethod
    def load(
        cls, source: Source, target: Target, config: SpecConfig, tokenizers: Tokenizers
    ) -> NGramDraft:
        return cls(config)

    def with_config(self, config: SpecConfig) -> NGramDraft:
        return NGramDraft(config)

    def obstacle(self) -> None:
        """Return None: there is nothing to capture."""

    def begin(self, prompt, max_length, cache, graphs) -> None:
        self._lookup = LookUp(self.config, max_length + 1)
        self._lookup.begin(prompt[0].tolist())

    def resume(self, kept, length, start) -> None:
        if kept is not None:
            self._lookup.reliability = kept

    def keep(self, decided) -> Reliability:
        return self._lookup.reliability

    def kept_from(self, parts) -> Reliability:
        return Reliability.of(parts)

    def end(self) -> None:
        self._lookup = None

    def observe(self, tokens, seconds=None) -> None:
        self._lookup.follow(tokens[0])

    def propose(self, decided, depth, price=FREE) -> Tree:
        nodes = self._lookup.grow(depth, self.config.max_nodes)
        parents, levels = [node.parent for node in nodes], [node.level for node in nodes]
        nodes = nodes[: num_paying([node.chance for node in nodes], parents, levels, price)]
        found = [(node.parent, node.token) for node in nodes]
        return Tree.of(decided.tokens[:, -1:], found, (sum(node.chance for node in nodes), 0.0))
