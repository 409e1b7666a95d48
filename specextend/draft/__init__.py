"""Draft kinds, one module each, behind the interface of :mod:`specextend.draft.base`."""

from .base import Draft
from .causal_lm import CausalLMDraft

__all__ = ["CausalLMDraft", "Draft"]
