"""Does what a round does on the device: verify pass, acceptance, scores for retrieval.

The rule of this module: nothing here asks the host. Its functions know lengths, counts and trees as
tensors, so that they can be captured as a graph; what they change, they change where it lies. There
are two exceptions. With a logits processor that works on the host (``TokenChooser.needs_host``) the
engine runs :meth:`Verifier.accept` outside of graphs; of a target whose layers keep a state it
captures nothing, as the host reads the paths of a tree.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops
from .cache import KVCache, Pass
from .config import SpecConfig
from .exact import RowInvariant, refusal
from .sampling import TokenChooser
from .target import Target
from .tree import paths


class Decisions:
    """Holds the text so far and what the last round added to it, on the device. B sequences.

    Args:
        prompt: [B, L] int64.
        max_length: tokens of prompt and output at most.
        width: tokens that a round emits at most.

    Attributes:
        ids: [B, max_length + 1 + W] int64: committed tokens, and the root behind them; behind that
            there is room for a path beyond the last token.
        root: [B, 1] int64, decided, but not yet in the target's cache.
        emitted: [B, W] int64, tokens that the last round emitted; its tail is arbitrary.
        counts: [B] int32, how many of them count.
        features: [B, W, F], what the target saw when it decided each of them, for the draft; None
            if the draft wants none, or before the first round.
    """

    def __init__(self, prompt: Tensor, max_length: int, width: int):
        batch, length = prompt.shape
        to = dict(device=prompt.device)
        self.width = width
        self.ids = torch.zeros(batch, max_length + 1 + width, dtype=torch.int64, **to)
        self.ids[:, :length] = prompt
        self.root = prompt[:, -1:].clone()
        self.emitted = torch.zeros(batch, width, dtype=torch.int64, **to)
        self.counts = torch.zeros(batch, dtype=torch.int32, **to)
        self.features: Tensor | None = None
        self._steps = torch.arange(width, **to)

    def update(self, emitted: Tensor, num_accepted: Tensor, root: Tensor, lens: Tensor) -> None:
        """Note what a round behind ``lens`` [B] committed tokens has decided."""
        self.emitted.copy_(emitted)
        self.root.copy_(root[:, None])
        self.counts.copy_(num_accepted + 1)
        # Behind what counts come places that the next rounds write again.
        self.ids.scatter_(1, lens[:, None] + 1 + self._steps, emitted)

    def keep(self, features: Tensor, path: Tensor) -> None:
        """Keep the features [B, M, F] of the nodes on ``path`` [B, W]."""
        rows = path.clamp(min=0).long()[..., None].expand(-1, -1, features.shape[-1])
        kept = features.gather(1, rows)
        if self.features is None:
            self.features = torch.empty_like(kept)
        self.features.copy_(kept)


@dataclass
class Outcome:
    """Holds what a verify pass and its acceptance leave on the device. Batch 1.

    Attributes:
        numbers: [2 W + 3] fp64, what the host reads: accepted tokens, W emitted ones, W nodes of
            the path, the two of the tree's promise; W is the longest path with its root, tails are
            -1.
        logits, scores: [1, M, V], raw and processed.
        chunk_scores: [1, C] fp32, for retrieval; None where none is due.
    """

    numbers: Tensor
    logits: Tensor
    scores: Tensor
    chunk_scores: Tensor | None


class Verifier:
    """Verifies trees: the target's forward over a tree, and what is accepted of it.

    Args:
        target: its choices are the text.
        config: of the chunks that are scored.
        cache: the target's.
        decisions: what an acceptance updates.
        chooser: the target's choice at a node.
        feature_layers: hidden states that the draft wants.

    Raises:
        ValueError: ``config.exact``, and the target's products are not torch's own.
    """

    def __init__(
        self,
        target: Target,
        config: SpecConfig,
        cache: KVCache,
        decisions: Decisions,
        chooser: TokenChooser,
        feature_layers: tuple[int, ...] = (),
    ):
        reason = refusal(target.model) if config.exact else None
        if config.exact and target.keeps_states:
            reason = "its layers with a state add up one way for a token and another for several"
        if reason is not None:
            raise ValueError(f"exact=True does not serve {type(target.model).__name__}: {reason}")
        self.target, self.config, self.cache = target, config, cache
        self.decisions, self.chooser, self.feature_layers = decisions, chooser, feature_layers
        self._no_promise = torch.zeros(1, 2, device=cache.lens.device)

    def forward(
        self, scoring: bool, tokens: Tensor, parents: Tensor, depths: Tensor, mask: Tensor | None
    ) -> tuple[Pass, Tensor]:
        """Run the target over root and nodes [B, M]; ``mask`` is None for a root alone.

        Returns:
            The pass, with what chunk scores need if ``scoring``, and [B, M, V] logits.
        """
        state = Pass(
            self.cache,
            [(self.cache, self.cache.lens)],
            tokens.shape[1],
            mask=mask,
            q_depths=None if mask is None else depths,
            k_depths=None if mask is None else depths,
            score_layers=self.target.score_layers if scoring else frozenset(),
            chunk_size=self.config.chunk_size,
            fused=self.config.tree_attention,
            paths=None if mask is None or not self.cache.state_layers else paths(parents),
            feature_layers=self.feature_layers,
        )
        positions = self.cache.lens[:, None].long() + depths
        with RowInvariant() if self.config.exact else nullcontext():
            logits = self.target.forward(tokens, positions, state)
        return state, logits[..., : self.target.vocab_size]

    def accept(
        self,
        state: Pass,
        logits: Tensor,
        tokens: Tensor,
        parents: Tensor,
        depths: Tensor,
        mask: Tensor | None,
        promise: Tensor | None,
    ) -> Outcome:
        """Choose at every node, walk, compact, commit."""
        cache, decisions = self.cache, self.decisions
        lens, width = cache.lens, decisions.width
        positions = lens[:, None].long() + depths
        walked = self.chooser.decide(logits, positions, tokens, parents)
        scores, path, num_accepted, emitted, root = walked
        # No path is longer than the deepest tree.
        path, emitted = path[:, :width], emitted[:, :width]
        cache.compact(path, num_accepted)
        chunk_scores = self._chunk_scores(state, path, num_accepted)

        padding = (0, width - path.shape[1])
        path, emitted = (F.pad(x, padding, value=-1) for x in (path, emitted))
        decisions.update(emitted, num_accepted, root, lens)
        if state.features is not None:
            decisions.keep(state.features, path)
        cache.commit(decisions.counts)
        promise = self._no_promise if promise is None else promise
        parts = [num_accepted, emitted[0], path[0], promise[0]]
        return Outcome(torch.cat([p.double() for p in parts]), logits, scores, chunk_scores)

    def _chunk_scores(self, state: Pass, path: Tensor, num_accepted: Tensor) -> Tensor | None:
        """Score chunks by the attention of the last accepted node; the accepted rows are in place,
        but not counted in ``cache.lens`` yet."""
        config, total = self.config, None
        row = path.gather(1, num_accepted[:, None].long())[:, 0]
        for _, (first, second, layer) in sorted(state.recorded.items()):
            if config.tree_attention:
                scores = ops.chunk_scores(
                    first, second, row, self.cache.lens,
                    chunk_size=config.chunk_size, reduce=config.score_reduce,
                )  # fmt: skip
            else:
                scores = ops.chunk_scores_keys(
                    first, self.cache.layers[layer].k, row, self.cache.lens + num_accepted + 1,
                    chunk_size=config.chunk_size, scale=second, reduce=config.score_reduce,
                )  # fmt: skip
            total = scores if total is None else total + scores
        return total
