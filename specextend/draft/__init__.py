"""Draft kinds, one module each, behind the interface of :mod:`specextend.draft.base`."""

from .base import Draft
from .causal_lm import CausalLMDraft
from .eagle import EagleDraft
from .load import load_draft
from .longspec import LongSpecDraft
from .ngram import NGramDraft
from .self_draft import SelfDraft

__all__ = [
    "CausalLMDraft",
    "Draft",
    "EagleDraft",
    "LongSpecDraft",
    "NGramDraft",
    "SelfDraft",
    "load_draft",
]
