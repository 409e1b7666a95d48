"""Loads what the commands work with: a target, a draft, their tokenizers, onto a device."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from . import assets
from .config import SpecConfig
from .decode import SpecExtend
from .draft import WORDS
from .draft.checkpoint import Checkpoint
from .errors import UsageError
from .generation import Progress


@dataclass(frozen=True)
class Pair:
    """Holds what two models' generation needs.

    Attributes:
        target: the model whose text is written.
        draft: as :class:`SpecExtend` takes it; None for plain decoding.
        tokenizer: the target's.
        draft_tokenizer: None where the draft has none of its own.
    """

    target: PreTrainedModel
    draft: PreTrainedModel | str | Path | None
    tokenizer: PreTrainedTokenizerBase
    draft_tokenizer: PreTrainedTokenizerBase | None = None

    def spec(self, config: SpecConfig, progress: Progress | None = None) -> SpecExtend:
        """Make a loop of the pair."""
        return SpecExtend(
            self.target, self.draft, config, tokenizer=self.tokenizer,
            draft_tokenizer=self.draft_tokenizer, progress=progress,
        )  # fmt: skip

    def plain(self, config: SpecConfig, progress: Progress | None = None) -> SpecExtend:
        """Make a loop of the target alone."""
        return SpecExtend(self.target, None, config, progress=progress)


def load_target(
    name: str | None, dtype: str, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM for evaluation, and its tokenizer.

    Args:
        name: folder or hub id; None: the embedded target.
        dtype: "float32", "bfloat16", "float16", or "auto": as the checkpoint is.

    Raises:
        ValueError: it is not there.
    """
    # What the libraries say of loading is kept from between the lines of a command.
    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = _embedded_target() if name is None else _located(name)
    # A text of any length is made tokens; what a model can hold is asked where it is run.
    tokenizer = AutoTokenizer.from_pretrained(path, model_max_length=10**9)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=kind).eval().to(device)
    return model, tokenizer


def load_pair(target: str | None, draft: str | None, dtype: str, device: torch.device) -> Pair:
    """Load the models that a user names.

    Args:
        target, dtype, device: as :func:`load_target` takes them.
        draft: as :func:`find_draft` takes it, or "none"; None: the embedded model, which goes with
            the embedded target alone.

    Raises:
        UsageError: a target without a draft was named.
        ValueError: a model is not there.
    """
    if target is not None and draft is None:
        raise UsageError(
            "--target needs --draft: a model with the same tokenizer, a head trained for it, "
            "ngram, self, or none for plain decoding"
        )
    model, tokenizer = load_target(target, dtype, device)
    if draft is not None and draft.lower() == "none":
        return Pair(model, None, tokenizer)
    found, draft_tokenizer = find_draft(draft or "model", embedded=target is None)
    return Pair(model, found, tokenizer, draft_tokenizer)


def find_draft(name: str, embedded: bool) -> tuple[str | Path, PreTrainedTokenizerBase | None]:
    """Return a draft as ``SpecExtend`` takes it, and its tokenizer, None where it brings none.

    Args:
        name: a word of ``draft.WORDS``, of ``assets.DRAFTS`` where ``embedded``, or the folder or
            hub id of a causal LM or of a trained head.
        embedded: whether the target is the embedded one.

    Raises:
        ValueError: it is not there.
    """
    if name in WORDS:
        return name, None
    embedded = embedded and name in assets.DRAFTS
    draft = _located(assets.draft_path(name) if embedded else name)
    folder = Checkpoint.open(draft).folder
    if not (folder / "tokenizer_config.json").exists():  # as trained heads come
        return draft, None
    return draft, AutoTokenizer.from_pretrained(folder)


def _embedded_target() -> Path:
    path = assets.target_path()
    if not (path / "config.json").exists():
        raise ValueError(
            f"the embedded models are not in {path.parent}: name others with --target and --draft"
        )
    return path


def _located(name: str | Path) -> str | Path:
    """Return the folder of this name, or the name where it can be one on the Hub."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(name)):
        raise ValueError(f"there is no folder {name}")
    return str(name)
