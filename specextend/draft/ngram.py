"""Looks the last tokens up in the prompt and the output: a draft without a model.

What followed the same words before is proposed again (prompt lookup decoding; LLMA,
arXiv 2304.04487). It costs nothing, and pays where the output copies its input.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..config import SpecConfig
from ..target import Target
from ..tree import Tree
from .base import Draft, Source, Tokenizers

_MATCHES = 32  # looked at per round; the better ones come first


class NGramDraft(Draft):
    """Proposes what followed earlier occurrences of the last tokens.

    Occurrences of the longest match come first, ``config.ngram_size`` tokens at most, and among
    equals the most recent. Their continuations are merged as a trie of at most ``tree_nodes``
    nodes, and ``tree_width`` (or ``tree_widths``) of them per level; with a width of 1 it is a
    chain. Without a match nothing is proposed, and the round is a plain one.

    It works on the host, on the tokens that the loop has read in any case.
    """

    kind = word = "ngram"
    cache_kinds = ("full",)
    on_host = True

    def __init__(self, config: SpecConfig):
        self.config = config

    @classmethod
    def load(
        cls, source: Source, target: Target, config: SpecConfig, tokenizers: Tokenizers
    ) -> NGramDraft:
        return cls(config)

    def with_config(self, config: SpecConfig) -> NGramDraft:
        return NGramDraft(config)

    def begin(self, prompt, max_length, cache, graphs) -> None:
        self._ids = np.zeros(max_length + 1, dtype=np.int64)
        self._length = 0
        self.observe(prompt.tolist())

    def end(self) -> None:
        self._ids = None

    def observe(self, tokens: list[list[int]]) -> None:
        (tokens,) = tokens
        end = min(self._length + len(tokens), len(self._ids))
        self._ids[self._length : end] = tokens[: end - self._length]
        self._length = end

    def propose(self, decided, depth) -> Tree:
        tree = _Trie(self.config, depth)
        for chain in self._continuations(depth):
            tree.add(chain)
        return tree.build(decided.tokens[:, -1:])

    def _continuations(self, depth: int):
        """Yield continuations of ``depth`` tokens, the most promising first."""
        n, size = self._length, self.config.ngram_size
        ids = self._ids[:n]
        ends = np.flatnonzero(ids[: n - 1] == ids[n - 1])  # last tokens of occurrences
        matched = np.ones_like(ends)
        for back in range(1, min(size, n)):
            running = (matched == back) & (ends >= back)
            matched += running & (ids[ends - back] == ids[n - 1 - back])
        best = np.lexsort((-ends, -matched))[:_MATCHES]
        for end in ends[best].tolist():
            # An occurrence that runs into the present goes on with its own continuation.
            period = n - 1 - end
            yield [int(ids[end + 1 + i % period]) for i in range(depth)]


class _Trie:
    """Merges chains of tokens where they agree."""

    def __init__(self, config: SpecConfig, depth: int):
        fixed = config.tree_shape == "fixed"
        self.room = list(config.tree_widths) if fixed else [config.tree_width] * depth
        self.max_nodes = sum(self.room) if fixed else config.tree_nodes
        self.nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node
        self.depths = [0]

    def add(self, chain: list[int]) -> None:
        """Add a chain from the root on, as far as there is room."""
        parent = 0
        for level, token in enumerate(chain):
            node = self.nodes.get((parent, token))
            if node is None:
                if not self.room[level] or len(self.nodes) == self.max_nodes:
                    return
                self.room[level] -= 1
                node = self.nodes[parent, token] = len(self.depths)
                self.depths.append(level + 1)
            parent = node

    def build(self, root: Tensor) -> Tree:
        """Return the tree below ``root`` [1, 1]."""
        if not self.nodes:
            return Tree.root_only(root)
        parents = [-1, *(parent for parent, _ in self.nodes)]
        seen = [1]  # ancestors of each node and itself, as bits
        for node, parent in enumerate(parents[1:], 1):
            seen.append(seen[parent] | 1 << node)
        words = (len(parents) + 63) // 64
        mask = np.array(
            [[bits >> (64 * w) & (2**64 - 1) for w in range(words)] for bits in seen],
            dtype=np.uint64,
        )
        to = dict(device=root.device)
        tokens = torch.tensor([[token for _, token in self.nodes]], **to)
        return Tree(
            torch.cat([root, tokens], 1),
            torch.tensor([parents], dtype=torch.int32, **to),
            torch.tensor([self.depths], dtype=torch.int32, **to),
            torch.from_numpy(mask.view(np.int64))[None].to(root.device),
            None,
            max(self.depths),
        )
