"""Drafts for the methods: each loaded once, and given to the loop with any configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import SpecConfig
from ..draft import Draft, load_draft
from ..target import Target


@dataclass
class DraftSource:
    """A draft that was named.

    Attributes:
        kind: "model", "eagle1", "eagle3", "longspec", "ngram", "self".
        name: as it was named.
        cache_kinds: values of ``draft_cache`` that it knows.
    """

    kind: str
    name: str
    cache_kinds: tuple[str, ...]
    _draft: Draft

    @classmethod
    def load(
        cls,
        name: str,
        draft: PreTrainedModel | str | Path,
        target: PreTrainedModel,
        tokenizers: tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None],
    ) -> DraftSource:
        """Load what ``draft`` stands for; errors as from ``load_draft``."""
        loaded = load_draft(draft, Target(target), SpecConfig(), tokenizers)
        return cls(loaded.kind, name, loaded.cache_kinds, loaded)

    @property
    def model(self) -> PreTrainedModel | None:
        """The causal LM, where it is one."""
        return self._draft.causal_lm

    def make(self, config: SpecConfig) -> Draft:
        """A draft for a loop with these options."""
        return self._draft.with_config(config)
