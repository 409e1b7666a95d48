"""Makes a draft of every kind for a tiny target, for tests that sweep over them."""

from __future__ import annotations

import copy
import itertools
from functools import lru_cache

import eagle_heads
import torch
from models import tiny_model

from specextend import SpecConfig
from specextend.draft import LongSpecDraft, MixedDraft, load_draft
from specextend.draft.choice import Choice, Plan
from specextend.draft.longspec_block import BlockShape, LongSpecBlock
from specextend.target import Target

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


def mixed(source, config: SpecConfig = SMALL, choose=Scripted, model=None) -> MixedDraft:
    """Make a draft of ``source`` and look-up, for ``target()`` or another ``model``."""
    made = load_draft(source, Target(model or target()), config)
    return MixedDraft(made, config, choose=choose)


@lru_cache
def target():
    """Return a target that all of these drafts are for."""
    return tiny_model("llama")


def draft(kind: str, config: SpecConfig = SMALL, folder=None):
    """Make what ``SpecExtend`` takes as ``draft=``. Random heads agree with the target by chance;
    the model does more often than not, so that paths of every length are accepted."""
    if kind.endswith("+ngram"):
        return mixed(draft(kind.removesuffix("+ngram"), config, folder), config)
    model = target()
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
