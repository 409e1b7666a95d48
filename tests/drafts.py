"""Makes a draft of every kind for a tiny target, for tests that sweep over them."""

from __future__ import annotations

import copy
import itertools
import random
from functools import lru_cache

import eagle_heads
import torch
from models import VOCAB, tiny_model

from specextend import SpecConfig
from specextend.draft import Draft, LongSpecDraft, MixedDraft, load_draft
from specextend.draft.choice import Choice, Plan
from specextend.draft.longspec_block import BlockShape, LongSpecBlock
from specextend.pace import FREE
from specextend.target import Target
from specextend.tree import Tree

KINDS = ("none", "ngram", "model", "self", "eagle", "longspec", "model+ngram", "eagle+ngram")

#: what such tests ask: generations long enough for several rounds, retrievals and prefill chunks
SMALL = SpecConfig(
    chunk_size=8, budget=32, sink_chunks=1, recent_chunks=1, retrieve_every=2, prefill_chunk=13,
    draft_prefill_window=16, gate="off", tree_nodes=9, tree_depth=4, tree_threshold=0.0, seed=7,
)  # fmt: skip

WAYS = ("generate", "stream", "custom_generate")


class Scripted(Choice):
    """Chooses look-up alone, both, and the model alone in turn, whatever they cost."""

    turns = ((0, 9), (4, 9), (0, 9), (0, 0), (2, 3), (4, 0))  # levels of the model, nodes

    def __init__(self, *given):
        super().__init__(*given)
        self._turns = itertools.cycle(self.turns)

    def worth(self, nodes, depth, seconds, tokens):
        return True

    def plan(self, nodes, depth):
        levels, count = next(self._turns)
        return Plan(min(levels, depth), min(count, len(nodes)))


class Oracle(Draft):
    """Proposes trees around a given text: paths that are right to some node, and branches.

    Args:
        text: what the target writes, the prompt included.
    """

    kind = "oracle"
    on_host = True

    def __init__(self, text: list[int], config: SpecConfig = SMALL):
        self.text, self.config = text, config

    def obstacle(self) -> None:
        """Return None: there is nothing to capture."""

    def begin(self, prompt, max_length, cache, graphs) -> None:
        self._length, self._draw = prompt.shape[1], random.Random(0)

    def observe(self, tokens, seconds=None) -> None:
        self._length += len(tokens[0])

    def propose(self, decided, depth, price=FREE) -> Tree:
        draw, right = self._draw, self.text[self._length : self._length + depth]
        wanted = draw.randint(0, len(right))  # of the path that goes on to be wrong
        nodes, parent = [], 0
        for level in range(draw.randint(1, depth)):
            if draw.random() < 0.5:  # a branch that leads nowhere, before or behind the path
                nodes.append((parent, draw.randrange(3, VOCAB)))
            token = right[level] if level < wanted else draw.randrange(3, VOCAB)
            if (parent, token) not in nodes:
                nodes.append((parent, token))
            parent = nodes.index((parent, token)) + 1
        return Tree.of(decided.tokens[:, -1:], nodes)


def mixed(source, config: SpecConfig = SMALL, choose=Scripted, model=None) -> MixedDraft:
    """Make a draft of ``source`` and look-up, for ``target()`` or another ``model``."""
    made = load_draft(source, Target(model or target()), config)
    return MixedDraft(made, config, choose=choose)


@lru_cache
def target():
    """Return a target that all of these drafts are for."""
    return tiny_model("llama")


def draft(kind: str, config: SpecConfig = SMALL, folder=None, model=None):
    """Make what ``SpecExtend`` takes as ``draft=``, for ``target()`` or another ``model``. Random
    heads agree with the target by chance; the model does more often than not, so that paths of
    every length are accepted."""
    model = model or target()
    if kind.endswith("+ngram"):
        other = draft(kind.removesuffix("+ngram"), config, folder, model)
        return mixed(other, config, model=model)
    if kind in ("none", "ngram", "self"):
        return None if kind == "none" else kind
    generator = torch.Generator().manual_seed(1)
    if kind == "model":
        other = copy.deepcopy(model)
        with torch.no_grad():
            for p in other.parameters():
                p += 0.02 * torch.randn(p.shape, generator=generator)
        return other
    if kind == "eagle":
        return str(eagle_heads.make("eagle1").write(folder))
    block = LongSpecBlock(BlockShape.of_target(model)).requires_grad_(False)
    for p in block.parameters():
        p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return LongSpecDraft(block, model, config)


def write(spec, way: str, ids, **kwargs):
    """Write by one of the three ways in; return the new tokens."""
    if way == "stream":
        return [t for step in spec.stream(ids, **kwargs) for t in step.tokens]
    if way == "generate":
        out = spec.generate(ids, **kwargs)
    else:
        out = spec.model.generate(ids, custom_generate=spec, **kwargs)
    return out[0, ids.shape[1] :].tolist()
