"""Makes a draft of what a user names: a model, a word, a folder or a name on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from ..config import SpecConfig
from ..target import Target, underlying
from .base import Draft, Source, Tokenizers
from .causal_lm import CausalLMDraft
from .checkpoint import Checkpoint
from .eagle import EagleDraft
from .longspec import LongSpecDraft
from .mixed import MixedDraft
from .ngram import NGramDraft
from .self_draft import SelfDraft

#: the kinds, each asked in turn whether a source is one of its own
KINDS: tuple[type[Draft], ...] = (NGramDraft, SelfDraft, EagleDraft, LongSpecDraft, CausalLMDraft)

#: what a user may write for drafts that need no weights of their own
WORDS: tuple[str, ...] = tuple(kind.word for kind in KINDS if kind.word)


def beside_lookup(name: str) -> str | None:
    """Return the name of the draft that look-up is to be mixed with, where ``name`` says so, as in
    ``"model+ngram"``; else None."""
    other, plus, word = name.rpartition("+")
    return other if plus and word == NGramDraft.word else None


def load_draft(
    draft: PreTrainedModel | Draft | str | Path | Sequence | None,
    target: Target,
    config: SpecConfig,
    tokenizers: Tokenizers = (None, None),
) -> Draft | None:
    """Return the draft that ``draft`` stands for.

    Args:
        draft: a causal LM, or a ``PeftModel`` of one; a folder or hub id of one, or of a trained
            head (EAGLE, LongSpec), or a LongSpec ``.pth`` file; ``"ngram"``; ``"self"``; a
            :class:`Draft`, or None, as it is. A list of one of these with a model, and
            ``"ngram"``: both in one tree.
        target: the model of the loop.
        config: options of the loop.
        tokenizers: of target and draft; where both are given they must agree.

    Raises:
        TypeError: for anything else.
        ValueError: a checkpoint of no known kind, or one that does not fit the target.
    """
    if draft is None or isinstance(draft, Draft):
        return draft
    if isinstance(draft, (list, tuple)):
        model = load_draft(_beside_lookup(draft), target, config, tokenizers)
        return MixedDraft(model, config, _beside_target(model, target), target.branches)
    source: Source = underlying(draft, "draft") if isinstance(draft, nn.Module) else draft
    if isinstance(draft, (str, Path)) and draft not in WORDS:
        source = Checkpoint.open(draft)
    for kind in KINDS:
        if kind.recognises(source):
            return kind.load(source, target, config, tokenizers)
    if isinstance(source, Checkpoint):
        raise ValueError(
            f"no draft of a known kind (causal LM, EAGLE-1/2/3, LongSpec) in {source.describe()}"
        )
    raise TypeError(
        "draft must be a causal LM of transformers, a path or hub id, 'ngram', 'self', a "
        "specextend.draft.Draft, None, or a list of a draft with a model and 'ngram', got "
        f"{type(draft).__name__}"
    )


def _beside_target(model: Draft, target: Target) -> float:
    """Return what a draft takes beside its target for the same work, as far as weights tell."""
    # One without weights of its own runs the target's.
    return (model.num_parameters / target.model.num_parameters()) or 1.0


def _beside_lookup(drafts: Sequence) -> PreTrainedModel | Draft | str | Path:
    """Return the draft that is to be mixed with look-up."""
    names = [d if isinstance(d, (str, Path)) else type(d).__name__ for d in drafts]
    words = [isinstance(d, str) and d == NGramDraft.word for d in drafts]
    if len(drafts) != 2 or words.count(True) != 1:
        raise ValueError(
            "drafts are mixed by two: one with a model, and 'ngram', as in draft=[model, 'ngram']; "
            f"got {names}"
        )
    other = drafts[words.index(False)]
    if other is None or isinstance(other, (list, tuple, MixedDraft)):
        raise ValueError(f"'ngram' is mixed with one draft that has a model, got {names}")
    return other
