"""From what a user names to a draft: a model, a word, a folder or a name on the Hub."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..attention import PatchedModel
from ..config import SpecConfig
from ..guard import self_check
from ..rotary import probe_rotary
from ..tokenizers import check_same_tokenizer
from .base import Draft
from .causal_lm import CausalLMDraft
from .checkpoint import Checkpoint
from .eagle import EagleDraft
from .longspec import LongSpecDraft
from .ngram import NGramDraft
from .self_draft import SelfDraft

#: kinds of trained heads, each asked in turn whether a checkpoint is one of its own
HEADS: tuple[type[Draft], ...] = (EagleDraft, LongSpecDraft)


def load_draft(
    draft: PreTrainedModel | Draft | str | Path | None,
    target: PatchedModel,
    config: SpecConfig,
    tokenizers: tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None] = (
        None,
        None,
    ),
) -> Draft | None:
    """The draft that ``draft`` stands for.

    Args:
        draft: a causal LM; a folder or hub id of one, or of a trained head (EAGLE, LongSpec), or
            a LongSpec ``.pth`` file; ``"ngram"``; ``"self"``; a :class:`Draft`, or None, as it is.
        target: the model of the loop.
        config: options of the loop.
        tokenizers: of target and draft; where both are given they must agree.

    Raises:
        TypeError: for anything else.
        ValueError: a checkpoint of no known kind, or one that does not fit the target.
    """
    if draft is None or isinstance(draft, Draft):
        return draft
    vocab = target.model.config.get_text_config().vocab_size
    if draft == "ngram":
        return NGramDraft(config)
    if draft == "self":
        return SelfDraft(target, config, vocab)
    if isinstance(draft, (str, Path)):
        checkpoint = Checkpoint.open(draft)
        for head in HEADS:
            if head.recognises(checkpoint):
                return head.from_checkpoint(checkpoint, target, config)
        if checkpoint.config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ValueError(
                "no draft of a known kind (causal LM, EAGLE-1/2/3, LongSpec) in "
                f"{checkpoint.describe()}"
            )
        draft = _load_causal_lm(checkpoint, target.model)
    if not isinstance(draft, PreTrainedModel):
        raise TypeError(
            "draft must be a causal LM of transformers, a path or hub id, 'ngram', 'self', a "
            f"specextend.draft.Draft or None, got {type(draft).__name__}"
        )
    if draft.device != target.model.device:
        raise ValueError(
            f"the draft must be on the target's device {target.model.device}, got {draft.device}"
        )
    _check_vocabulary(draft, vocab, tokenizers)
    self_check(PatchedModel(draft))
    rotary = None if config.draft_cache == "full" else probe_rotary(draft)
    return CausalLMDraft(draft, config, rotary, vocab)


def _load_causal_lm(checkpoint: Checkpoint, target: PreTrainedModel) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=target.dtype, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):  # they would be random
        raise ValueError(
            f"no causal LM in {checkpoint.describe()}: missing {', '.join(missing[:8])}"
        )
    return model.to(target.device).eval()


def _check_vocabulary(draft: PreTrainedModel, vocab: int, tokenizers) -> None:
    size = draft.config.get_text_config().vocab_size
    if None not in tokenizers:
        check_same_tokenizer(*tokenizers)
    elif size != vocab:
        raise ValueError(
            f"the target's vocabulary has {vocab} entries, the draft's {size}: either "
            "their tokenizers differ, or a head is padded; pass tokenizer= and "
            "draft_tokenizer= to have them compared"
        )
