"""Holds what ``specextend eval`` can be asked for, and what it runs if it is not."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

GENERATED = ("joined", "needle", "lookup", "code")


@dataclass(frozen=True)
class Stage:
    """Says which methods are run over the same prompts.

    Attributes:
        lengths: tokens of the prompts.
        methods: keys of ``methods.METHODS``; ``"retrieval:eagle3"``: with the draft of this kind.
        sources: where prompts are from: ``"prompts"``, the files that were named, or kinds of
            ``GENERATED``.
        count: prompts for each length and source.
        runs: of each method on each prompt.
        sweep: values of fields of the configuration, tried one by one with each method that
            speculates, besides the configuration as it is.
    """

    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    sources: tuple[str, ...] = ("joined",)
    count: int = 1
    runs: int = 2
    sweep: dict[str, tuple[int, ...]] = field(default_factory=dict)


#: the rows of SpecExtend's Table 4, in order
LADDER = ("standard", "flash_prefill", "tree_attention", "streaming", "retrieval")
_CACHES = LADDER[2:]
_HUGGING_FACE = ("hf", "hf_assisted", "hf_lookup")
_LONG = (1024, 2048, 4096, 8192, 16_384)

#: what the embedded models, or any others, are put through in half an hour: every method over the
#: lengths, acceptance of the drafts against length, the needle, and retrieval's options
SUITE = (
    Stage(_LONG, (*_HUGGING_FACE, "plain", *LADDER, "eagle3", "longspec", "ngram", "self")),
    Stage(
        (512, *_LONG), (*_CACHES, "tree_attention:eagle3", "streaming:eagle3", "eagle3"), runs=1
    ),
    Stage((4096,), _CACHES, ("needle", "lookup"), count=4, runs=1),
    Stage((4096,), ("plain", "retrieval", "ngram"), ("code",), runs=1),
    Stage(
        (8192,), ("retrieval",), runs=1,
        sweep={
            "budget": (256, 1024, 2048),
            "chunk_size": (8, 16, 64),
            "retrieve_every": (1, 16, 64),
        },
    ),
)  # fmt: skip
NEW_TOKENS = 64

#: the same at a glance
QUICK = (
    Stage((512, 1024), ("hf", "plain", *LADDER, "ngram"), runs=1),
    Stage((1024,), _CACHES, ("needle",), runs=1),
)
QUICK_NEW_TOKENS = 16


@dataclass(frozen=True)
class EvalOptions:
    """Says what ``specextend eval`` was asked for; None and empty: as the suite has it.

    Attributes:
        target: as named; None: the embedded one.
        drafts: as named.
        device: to run on.
        dtype: None: "float32"; on a GPU as the preset or the checkpoint is.
        own_settings: fields of the configuration that suit the embedded models, if these are run.
        given: fields of the configuration that stand before a preset's.
    The others are the command's options by their names.
    """

    target: str | None
    drafts: tuple[str, ...]
    device: torch.device
    dtype: str | None
    own_settings: dict[str, object]
    given: dict[str, object]
    preset: str | None
    quick: bool
    lengths: tuple[int, ...] | None
    methods: tuple[str, ...] | None
    sweep: dict[str, tuple[int, ...]]
    synthetic: float | None
    prompts: Path | None
    generate: tuple[str, ...] | None
    count: int | None
    max_new_tokens: int | None
    runs: int | None
    warmup: int
    temperature: float
    seed: int
    gate: str
    read_once: bool
    output: Path
