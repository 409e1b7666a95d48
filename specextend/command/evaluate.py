"""``specextend eval``: measures speed, acceptance and exactness over lengths."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..errors import UsageError
from ..eval.options import GENERATED, EvalOptions
from ..machine import choose_device
from .config_options import add_config_options, given_fields
from .options import add_models, own_settings

SUMMARY = "measure speed, acceptance and exactness over lengths"


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ValueError: in float32, a method wrote other tokens than the reference.
    """
    from .evaluation import show

    show(options_from(args))
    return 0


def options_from(args: argparse.Namespace) -> EvalOptions:
    """Return what the options say.

    Raises:
        UsageError: one is out of range.
    """
    for name, least in (("count", 1), ("runs", 1), ("max_new_tokens", 2), ("warmup", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if args.temperature < 0:
        raise UsageError(f"--temperature must not be negative, got {args.temperature}")
    target = args.target
    if args.synthetic is not None:
        target = target or "small"  # a shape
    drafts = tuple(args.draft or ())
    return EvalOptions(
        target=target,
        drafts=drafts,
        device=choose_device(args.device),
        dtype=args.dtype,
        own_settings=own_settings(target, drafts[0] if drafts else None),
        given=given_fields(args),
        preset=args.preset,
        quick=args.quick,
        lengths=args.lengths,
        methods=args.methods,
        sweep=dict(args.sweep or ()),
        synthetic=args.synthetic,
        prompts=None if args.prompts is None else Path(args.prompts),
        generate=args.generate,
        count=args.count,
        max_new_tokens=args.max_new_tokens,
        runs=args.runs,
        warmup=args.warmup,
        temperature=args.temperature,
        seed=args.seed,
        gate=args.gate,
        read_once=args.read_once,
        output=Path(args.output),
    )


def add_options(sub: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    _add_own_options(sub)
    add_models(sub, None, several=True)
    add_config_options(sub, without=("draft_cache", "tree_attention", "gate", "seed"))


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


def _add_own_options(parser: argparse.ArgumentParser) -> None:
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
        "--read-once", action="store_true",
        help="the target reads each prompt once for all methods of ours, which go on from forks of "
        "what it has read; only the first one's prefill is known then",
    )  # fmt: skip
    group.add_argument(
        "--output", metavar="FOLDER", default="specextend-eval",
        help="results, tables and plots go here; with the same options a run that was interrupted "
        "goes on [specextend-eval]",
    )  # fmt: skip
