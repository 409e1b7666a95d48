"""Measures how long drafts are accepted, without verifying.

The output is the target's, whatever is proposed. So what it writes behind a prompt is made once,
and any number of drafts, or the same one again and again while it is trained, propose along it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attention import PatchedModel
from ..cache import KVCache, Pass
from ..config import SpecConfig
from ..draft import Decided, Draft
from ..graphs import Graphs
from ..tree import Tree

PART = 1024  # so many tokens of a prompt are read at a time


class Continuation:
    """Holds what the target writes greedily behind a prompt, with all that drafts read of it.

    Args:
        patched: the target.
        prompt: [1, L] int64, at least 2 tokens.
        count: tokens to write.
        layers: hidden states to keep for drafts that read them.
    """

    @torch.inference_mode()
    def __init__(
        self, patched: PatchedModel, prompt: Tensor, count: int, layers: tuple[int, ...] = ()
    ):
        config = patched.model.config.get_text_config()
        length = prompt.shape[1]
        self.first = length - 1  # position of the first root
        self.cache = KVCache(config.num_hidden_layers, length + count, 1, prompt.device)
        hidden: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        text = prompt

        def forward(tokens: Tensor) -> Tensor:
            at = self.cache.length
            positions = torch.arange(at, at + tokens.shape[1], device=tokens.device)[None]
            state = Pass(
                self.cache, [(self.cache, self.cache.lens)], tokens.shape[1],
                feature_layers=tuple(hidden),
            )  # fmt: skip
            logits = patched.forward(tokens, positions, state, last_only=True)
            self.cache.advance(tokens.shape[1])
            for layer in hidden:
                hidden[layer].append(state.hidden[layer].clone())
            return logits[:, -1:, : config.vocab_size].argmax(-1)

        for start in range(0, length - 1, PART):
            forward(prompt[:, start : min(start + PART, length - 1)])
        for _ in range(count):
            text = torch.cat([text, forward(text[:, -1:])], 1)
        self.text = text
        self.hidden = {layer: torch.cat(parts, 1) for layer, parts in hidden.items()}

    def decided(self, draft: Draft, start: int, end: int) -> Decided:
        """Return the tokens [start, end), and what ``draft`` wants of what stands before them."""
        tokens = self.text[:, start:end]
        if not draft.feature_layers:
            return Decided(tokens)
        before = max(start - 1, 0)
        rows = torch.cat([self.hidden[i][:, before : end - 1] for i in draft.feature_layers], -1)
        return Decided(tokens, F.pad(rows, (0, 0, end - start - rows.shape[1], 0)))

    def commit(self, length: int) -> None:
        """Let drafts see the target's cache as it was with ``length`` tokens."""
        self.cache.lens.fill_(length)
        self.cache.length = length


@torch.inference_mode()
def count_rounds(draft: Draft, continuation: Continuation, config: SpecConfig) -> tuple[int, int]:
    """Let ``draft`` propose along a continuation, as the loop would.

    The tree has the same depth in every round; drafts that retrieve by the target's attention do
    not fit, for nothing is verified.

    Returns:
        Tokens emitted and rounds, without the first token, which the prefill brings.
    """
    if draft.wants_scores:
        raise ValueError(
            'a draft that retrieves is measured by the loop alone; choose draft_cache="full" or '
            '"window"'
        )
    text, first = continuation.text, continuation.first
    total = text.shape[1]
    if draft.max_length is not None and total > draft.max_length:
        raise ValueError(
            f"the draft takes in {draft.max_length} tokens at most, but the text has {total}"
        )
    continuation.commit(0)
    draft.begin(text[:, : first + 1], total, continuation.cache, Graphs())
    for start in range(0, first, PART):
        end = min(start + PART, first)
        continuation.commit(end)
        draft.prefill(continuation.decided(draft, start, end))
    draft.observe(text[:, first + 1 : first + 2].tolist())
    seen = first  # tokens before this one have been handed over
    root, rounds = first + 1, 0
    while root < total - 1:
        continuation.commit(root)
        depth, accepted = min(config.max_depth, total - root - 2), 0
        if depth:
            tree = draft.propose(continuation.decided(draft, seen, root + 1), depth)
            accepted = _accepted(tree, text[0, root + 1 :].tolist())
            seen = root + 1
        draft.observe(text[:, root + 1 : root + accepted + 2].tolist())
        root, rounds = root + accepted + 1, rounds + 1
    draft.end()
    return total - 2 - first, rounds


def _accepted(tree: Tree, following: list[int]) -> int:
    """Count the nodes of the path along the text."""
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    node = depth = 0
    while depth < len(following):
        child = [i for i, p in enumerate(parents) if p == node and tokens[i] == following[depth]]
        if not child:
            break
        node, depth = child[0], depth + 1
    return depth
