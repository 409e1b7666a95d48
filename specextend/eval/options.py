"""Holds the options of ``specextend eval``, apart from what takes long to import."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from ..config import SpecConfig

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
        config: makes the configuration of the loop for a draft of a kind, with defaults of a
            preset: ``config(kind, **defaults)``.
        dtype: None: "float32"; on a GPU as the preset or the checkpoint is.
        device: "cpu", "cuda" or "cuda:N"; None: a GPU if there is one.
    The others are the command's options by their names.
    """

    target: str | None
    drafts: tuple[str, ...]
    config: Callable[..., SpecConfig]
    dtype: str | None
    device: str | None
    preset: str | None
    quick: bool
    lengths: tuple[int, ...] | None
    methods: tuple[str, ...] | None
    sweep: dict[str, tuple[int, ...]]
    synthetic: float | None
    prompts: str | None
    generate: tuple[str, ...] | None
    count: int | None
    max_new_tokens: int | None
    runs: int | None
    warmup: int
    temperature: float
    seed: int
    gate: str
    output: str


def length(text: str) -> int:
    """Read tokens from "16K", "512" or "1500"."""
    found = re.fullmatch(r"(\d+)([kK]?)", text.strip())
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"a length is a number such as 512 or 16K, got {text!r}")
    return int(found[1]) * (1024 if found[2] else 1)


def lengths(text: str) -> tuple[int, ...]:
    """Read several of them, apart by commas."""
    return tuple(length(part) for part in text.split(","))


def words(text: str) -> tuple[str, ...]:
    """Read words, apart by commas."""
    return tuple(part.strip() for part in text.split(","))


def generated(text: str) -> tuple[str, ...]:
    """Read kinds of generated prompts."""
    kinds = words(text)
    if wrong := [kind for kind in kinds if kind not in GENERATED]:
        raise argparse.ArgumentTypeError(
            f"a kind of prompts is one of {', '.join(GENERATED)}, got {wrong[0]!r}"
        )
    return kinds


def sweep(text: str) -> tuple[str, tuple[int, ...]]:
    """Read a field and its values from "budget=128,256"."""
    name, equals, values = text.partition("=")
    if not equals or not re.fullmatch(r"\d+(,\d+)*", values):
        raise argparse.ArgumentTypeError(
            f"a sweep is FIELD=N,N such as budget=128,256, got {text!r}"
        )
    return name.strip().replace("-", "_"), tuple(int(value) for value in values.split(","))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options, without those of the models and of the configuration."""
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--preset", metavar="NAME",
        help='"suite": every method, with the embedded models in half an hour; or the setting of a '
        "paper's table such as paper-table2, whose figures are shown beside ours if the models are "
        "theirs; a wrong name lists them [suite, if no option says otherwise]",
    )  # fmt: skip
    group.add_argument(
        "--quick", action="store_true", help="a minute: short prompts, few tokens, one run"
    )
    group.add_argument(
        "--lengths", type=lengths, metavar="N,N", help="tokens of the prompts, as 512,1K,16K"
    )
    group.add_argument(
        "--methods", type=words, metavar="M,M",
        help="rows of the table; METHOD:KIND uses the draft of this kind; a wrong name lists them",
    )  # fmt: skip
    group.add_argument(
        "--sweep", type=sweep, action="append", metavar="FIELD=N,N",
        help="try values of an option of the draft's context or of the tree, one by one; may be "
        "repeated",
    )  # fmt: skip

    group.add_argument(
        "--synthetic", type=float, metavar="X",
        help="no models: random weights of the shapes that --target and --draft name (a known name "
        "such as llama-3.1-8b, a configuration, or for the draft one-layer), proposals accepted "
        "with probability X; for latency alone",
    )  # fmt: skip

    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompts", metavar="PATH",
        help='JSON Lines with "text", a folder of such files, where name_16K.jsonl has the prompts '
        "of this length, or a folder of .txt, .md and .py files [Python's standard library]",
    )  # fmt: skip
    group.add_argument(
        "--generate", type=generated, metavar="KIND,KIND",
        help="make prompts of any length from these texts: joined, needle (one fact far above), "
        "lookup (one of many keys), code (repeated with other names)",
    )  # fmt: skip
    group.add_argument("--count", type=int, metavar="N", help="prompts for each length [1]")

    group = parser.add_argument_group("runs")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="[64]")
    group.add_argument("--runs", type=int, metavar="N", help="of each method on each prompt [2]")
    group.add_argument(
        "--warmup", type=int, default=1, metavar="N",
        help="short runs of each method before it is measured [1]",
    )  # fmt: skip
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: greedy [0]")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of prompts and of sampling [0]"
    )
    group.add_argument(
        "--gate", choices=("auto", "off"), default="off",
        help='"auto": let the gate stop speculation where it does not pay [off]',
    )  # fmt: skip
    group.add_argument(
        "--output", metavar="FOLDER", default="specextend-eval",
        help="results, tables and plots go here; with the same options a run that was interrupted "
        "goes on [specextend-eval]",
    )  # fmt: skip
