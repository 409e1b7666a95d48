"""Loads what the commands work with: a target, a draft, their tokenizers, onto a device."""

from __future__ import annotations

import re
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
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
from .draft import WORDS, NGramDraft, beside_lookup
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
    draft: PreTrainedModel | str | Path | tuple | None
    tokenizer: PreTrainedTokenizerBase
    draft_tokenizer: PreTrainedTokenizerBase | None = None

    def spec(self, config: SpecConfig, progress: Progress | None = None, **options) -> SpecExtend:
        """Make a loop of the pair; ``options`` are further arguments of :class:`SpecExtend`."""
        return SpecExtend(
            self.target, self.draft, config, tokenizer=self.tokenizer,
            draft_tokenizer=self.draft_tokenizer, progress=progress, **options,
        )  # fmt: skip

    def plain(self, config: SpecConfig, progress: Progress | None = None, **options) -> SpecExtend:
        """Make a loop of the target alone, as :meth:`spec` does."""
        return SpecExtend(self.target, None, config, progress=progress, **options)


def load_target(
    name: str | None, dtype: str, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM for evaluation, and its tokenizer.

    Args:
        name: folder, hub id or GGUF file; None: the embedded target.
        dtype: "float32", "bfloat16", "float16", or "auto": as the checkpoint is.

    Raises:
        ImportError: a GGUF file, and no package to read it with.
        ValueError: it is not there, or a file that cannot be read.
    """
    # What the libraries say of loading is kept from between the lines of a command.
    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = _embedded_target() if name is None else _located(name)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    if isinstance(path, Path) and path.is_file():
        return _read_gguf(path, kind, device)
    return _read(path, kind, device)


def _read(
    path: str | Path, dtype: str | torch.dtype, device: torch.device, **options
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # A text of any length is made tokens; what a model can hold is asked where it is run.
    tokenizer = AutoTokenizer.from_pretrained(path, model_max_length=10**9, **options)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    return model.eval().to(device), tokenizer


def _read_gguf(
    file: Path, dtype: str | torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from a GGUF file, as far as `transformers` reads them."""
    with file.open("rb") as content:
        if content.read(4) != b"GGUF":
            raise ValueError(
                f"{file} is a file, but no GGUF file; a folder, a hub id or a GGUF file is wanted"
            )
    try:
        import gguf  # noqa: F401  what transformers reads it with
    except ImportError as error:
        raise ImportError(
            f"{file} is a GGUF file, to be read with the package gguf: pip install gguf"
        ) from error
    try:
        with redirect_stderr(StringIO()):  # a bar that no setting of transformers silences
            return _read(file.parent, dtype, device, gguf_file=file.name)
    except Exception as error:  # many types: whatever a reader meets in a file
        raise ValueError(f"the GGUF file {file} cannot be read: {error}") from error


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
    found, draft_tokenizer = find_draft(draft or "model", model, embedded=target is None)
    return Pair(model, found, tokenizer, draft_tokenizer)


def find_draft(
    name: str, target: PreTrainedModel, embedded: bool
) -> tuple[PreTrainedModel | str | Path | tuple, PreTrainedTokenizerBase | None]:
    """Return a draft as ``SpecExtend`` takes it, and its tokenizer, None where it brings none.

    Args:
        name: a word of ``draft.WORDS``, of ``assets.DRAFTS`` where ``embedded``, the folder or
            hub id of a causal LM or of a trained head, or a GGUF file; one of these with a model
            and ``+ngram`` behind it.
        target: what it will draft for, whose dtype and device a GGUF file is read for.
        embedded: whether the target is the embedded one.

    Raises:
        ImportError, ValueError: as for :func:`load_target`.
    """
    if name in WORDS:
        return name, None
    other = beside_lookup(name)
    if other and not Path(name).expanduser().exists():
        model, tokenizer = find_draft(other, target, embedded)
        return (model, NGramDraft.word), tokenizer
    embedded = embedded and name in assets.DRAFTS
    draft = _located(assets.draft_path(name) if embedded else name)
    if isinstance(draft, Path) and draft.is_file() and draft.suffix != ".pth":
        return _read_gguf(draft, target.dtype, target.device)
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
    """Return the folder or file of this name, or the name where it can be one on the Hub."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(name)):
        raise ValueError(f"there is no folder {name}")
    return str(name)
