"""Drafts for the methods: each loaded once, and given to the loop with any configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attention import PatchedModel
from ..config import SpecConfig
from ..draft import CausalLMDraft, Draft
from ..draft.eagle import EagleDraft
from ..draft.load import load_draft
from ..draft.longspec import LongSpecDraft
from ..draft.ngram import NGramDraft
from ..draft.self_draft import SelfDraft


@dataclass
class DraftSource:
    """A draft that was named.

    Attributes:
        kind: "model", "eagle1", "eagle3", "longspec", "ngram", "self".
        name: as it was named.
        caches: values of ``draft_cache`` that it knows.
    """

    kind: str
    name: str
    caches: tuple[str, ...]
    _target: PreTrainedModel
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
        loaded = load_draft(draft, PatchedModel(target), SpecConfig(), tokenizers)
        return cls(_kind(loaded), name, loaded.caches, target, loaded)

    @property
    def model(self) -> PreTrainedModel | None:
        """The causal LM, where it is one."""
        return self._draft.model.model if self.kind == "model" else None

    def make(self, config: SpecConfig) -> Draft:
        """A draft for a loop with these options."""
        draft, vocab = self._draft, self._target.config.get_text_config().vocab_size
        if isinstance(draft, SelfDraft):
            return SelfDraft(PatchedModel(self._target), config, vocab)
        if isinstance(draft, CausalLMDraft):
            return CausalLMDraft(draft.model.model, config, draft.rotary, vocab)
        if isinstance(draft, EagleDraft):
            return EagleDraft(draft.head, config)
        if isinstance(draft, LongSpecDraft):
            return LongSpecDraft(draft.block, self._target, config)
        return NGramDraft(config)


def _kind(draft: Draft) -> str:
    if isinstance(draft, EagleDraft):
        return f"eagle{draft.head.config.version}"
    kinds = ((SelfDraft, "self"), (NGramDraft, "ngram"), (LongSpecDraft, "longspec"))
    return next((kind for cls, kind in kinds if isinstance(draft, cls)), "model")
