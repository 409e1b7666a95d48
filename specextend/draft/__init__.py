"""Holds the kinds of drafts, one module each, behind the contract of `specextend.draft.base`."""

from .base import Decided, Draft, Kept
from .causal_lm import CausalLMDraft
from .eagle import EagleDraft
from .load import KINDS, WORDS, beside_lookup, load_draft
from .longspec import LongSpecDraft
from .mixed import MixedDraft
from .ngram import NGramDraft
from .self_draft import SelfDraft

__all__ = [
    "KINDS",
    "WORDS",
    "CausalLMDraft",
    "Decided",
    "Draft",
    "Kept",
    "EagleDraft",
    "LongSpecDraft",
    "MixedDraft",
    "NGramDraft",
    "SelfDraft",
    "beside_lookup",
    "load_draft",
]
