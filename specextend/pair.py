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

from . import _C, assets
from .config import SpecConfig
from .decode import SpecExtend
from .draft import WORDS
from .draft.checkpoint import Checkpoint
from .errors import UsageError
from .generation import Progress
from .machine import default_device


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


def choose_device(name: str | None) -> torch.device:
    """Return the device of ``--device``, once it is known that models can run there.

    Args:
        name: "cpu", "cuda" or "cuda:N"; None: a GPU if there is one, else the CPU.

    Raises:
        UsageError: it is another name, or there is no such GPU.
    """
    try:
        device = torch.device(name or default_device())
    except RuntimeError:
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got {name}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got {name}")
    if device.type == "cuda":
        if not _C.has_cuda:
            raise UsageError(
                f"--device {name}: specextend was built without CUDA kernels; install it with "
                "nvcc and SPECEXTEND_CUDA=ON"
            )
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UsageError(f"--device {name}: torch sees {count} GPUs")
    return device


def load_target(
    name: str | Path | None, dtype: str, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM for evaluation, and its tokenizer.

    Args:
        name: folder or hub id; None: the embedded target.
        dtype: "float32", "bfloat16", "float16", or "auto": as the checkpoint is.
    """
    path = _located(assets.target_path() if name is None else name)
    # A text of any length is made tokens; what a model can hold is asked where it is run.
    tokenizer = AutoTokenizer.from_pretrained(path, model_max_length=10**9)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=kind).eval().to(device)
    return model, tokenizer


def load_pair(target: str | None, draft: str | None, dtype: str, device: torch.device) -> Pair:
    """Load the models that a user names.

    Args:
        target: folder or hub id; None: the embedded target.
        draft: folder or hub id, a word, "none", or the name of an embedded one; None: the embedded
            one, which goes with the embedded target alone.
        dtype, device: of the target; as :func:`load_target` takes them.

    Raises:
        ValueError: a model is not there, or only one of a pair was named.
    """
    _quiet()
    if target is None:
        if not (assets.target_path() / "config.json").exists():
            raise ValueError(
                f"the embedded models are not in {assets.target_path().parent}: name others with "
                "--target and --draft"
            )
        draft = draft or "model"
        if draft in assets.DRAFTS:
            draft = assets.draft_path(draft)
    elif draft is None:
        raise UsageError(
            "--target needs --draft: a model with the same tokenizer, a head trained for it, "
            "ngram, self, or none for plain decoding"
        )
    model, tokenizer = load_target(target, dtype, device)
    if str(draft).lower() == "none":
        return Pair(model, None, tokenizer)
    draft, draft_tokenizer = named_draft(draft)
    return Pair(model, draft, tokenizer, draft_tokenizer)


def named_draft(draft: str | Path) -> tuple[str | Path, PreTrainedTokenizerBase | None]:
    """Return a draft as ``SpecExtend`` takes it, and its tokenizer, None without."""
    if draft in WORDS:
        return draft, None
    draft = _located(draft)
    folder = Checkpoint.open(draft).folder
    if not (folder / "tokenizer_config.json").exists():  # as trained heads come
        return draft, None
    return draft, AutoTokenizer.from_pretrained(folder)


def _located(name: str | Path) -> str | Path:
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(name)):
        raise ValueError(f"there is no folder {name}")
    return str(name)


def _quiet() -> None:
    """Keep what the libraries say of loading from between the lines of a command."""
    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
