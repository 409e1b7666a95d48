"""``specextend chat``: talks with a model."""

from __future__ import annotations

import argparse
import sys

from torch import Tensor

from ..errors import EXPECTED
from ..machine import choose_device
from ..terminal import LiveText, Meter, standard_error, standard_output
from . import writing
from .config_options import add_config_options
from .options import add_models, config_from

SUMMARY = "talk with a model; /reset begins anew, end of input ends"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    sub.add_argument("--system", metavar="TEXT", help="system message, for a chat template")
    writing.add_generation(sub)
    add_models(sub, "auto")
    add_config_options(sub)


def run(args: argparse.Namespace) -> int:
    """Run the command, until the input ends."""
    from ..pair import load_pair

    config = config_from(args)
    pair = load_pair(args.target, args.draft, args.dtype, choose_device(args.device))
    tokenizer = pair.tokenizer
    options = writing.generation_options(args, tokenizer)
    output, notes = standard_output(), standard_error()
    meter = Meter(notes)
    spec = pair.spec(config, meter)
    has_template = bool(tokenizer.chat_template)
    if args.system and not has_template:
        raise ValueError("--system needs a chat template, which the target's tokenizer lacks")
    first = [{"role": "system", "content": args.system}] if args.system else []
    messages, written = list(first), ""
    interactive = sys.stdin.isatty() and output.is_terminal
    if interactive:
        import readline  # noqa: F401  editing and history for input()
    while True:
        try:
            line = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            break
        if line.strip() == "/reset":
            messages, written = list(first), ""
            spec.forget()
            continue
        if not line.strip():
            continue
        asked = [*messages, {"role": "user", "content": line}]
        live = LiveText(output, tokenizer, args.highlight)
        try:
            if has_template:
                ids = writing.template(tokenizer, asked)
            else:
                ids = writing.encode(tokenizer, f"{written}{line}\n")
            fitting = options | {"max_new_tokens": _room(pair.target, ids, args.max_new_tokens)}
            writing.run(spec, ids.to(pair.target.device), fitting, live, meter)
            notes.line(writing.summary(spec.stats), "dim")
        except KeyboardInterrupt:
            notes.line("interrupted", "dim")
        except BrokenPipeError:  # nobody reads on
            raise
        except EXPECTED as error:
            notes.line(f"error: {' '.join(str(error).split())} (this turn is taken back)")
            continue
        messages = [*asked, {"role": "assistant", "content": live.text}]
        written += f"{line}\n{live.text}"
    if interactive:
        output.line()
    return 0


def _room(target, ids: Tensor, wanted: int) -> int:
    """Return how many of the wanted new tokens the target has positions for, behind ``ids`` [1, L].

    Raises:
        ValueError: none.
    """
    from ..guard import position_limit

    limit, length = position_limit(target), ids.shape[1]
    if limit is not None and length >= limit:
        raise ValueError(
            f"the chat has {length} tokens, and the target {limit} positions, so that nothing can "
            "be answered; /reset begins anew"
        )
    return wanted if limit is None else min(wanted, limit - length)
