"""Makes a draft of what a user names: a model, a word, a folder or a name on the Hub."""

from __future__ import annotations

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
from .ngram import NGramDraft
from .self_draft import SelfDraft

#: the kinds, each asked in turn whether a source is one of its own
KINDS: tuple[type[Draft], ...] = (NGramDraft, SelfDraft, EagleDraft, LongSpecDraft, CausalLMDraft)

#: what a user may write for drafts that need no weights of their own
WORDS: tuple[str, ...] = tuple(kind.word for kind in KINDS if kind.word)


def load_draft(
    draft: PreTrainedModel | Draft | str | Path | None,
    target: Target,
    config: SpecConfig,
    tokenizers: Tokenizers = (None, None),
) -> Draft | None:
    """Return the draft that ``draft`` stands for.

    Args:
        draft: a causal LM, or a ``PeftModel`` of one; a folder or hub id of one, or of a trained
            head (EAGLE, LongSpec), or a LongSpec ``.pth`` file; ``"ngram"``; ``"self"``; a
            :class:`Draft`, or None, as it is.
        target: the model of the loop.
        config: options of the loop.
        tokenizers: of target and draft; where both are given they must agree.

    Raises:
        TypeError: for anything else.
        ValueError: a checkpoint of no known kind, or one that does not fit the target.
    """
    if draft is None or isinstance(draft, Draft):
        return draft
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
        f"specextend.draft.Draft or None, got {type(draft).__name__}"
    )
