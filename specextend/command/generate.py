"""``specextend generate``: continues a text."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import UsageError
from ..machine import choose_device
from ..terminal import LiveText, Meter, standard_error, standard_output
from . import writing
from .config_options import add_config_options
from .options import add_models, config_from

SUMMARY = "continue a text"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    source = sub.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--prompt-file", metavar="FILE", help='"-": standard input, the default')
    sub.add_argument(
        "--chat", action="store_true", help="put the prompt into the tokenizer's chat template"
    )
    sub.add_argument(
        "--compare", action="store_true",
        help="decode plainly as well, report speed and equality; a difference is an error",
    )  # fmt: skip
    sub.add_argument(
        "--json", action="store_true", help="print one JSON object: text, tokens, statistics"
    )
    sub.add_argument(
        "--context", type=Path, metavar="FILE",
        help="a file of a text that has been read, to go on from where the prompt begins like it; "
        "prompt and output are saved there in the end, also where it is not there yet",
    )  # fmt: skip
    writing.add_generation(sub)
    add_models(sub, "auto")
    add_config_options(sub)


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file not in (None, "-"):
        return Path(args.prompt_file).read_text(encoding="utf-8")
    if args.prompt_file is None and sys.stdin.isatty():
        raise UsageError("a prompt is wanted: --prompt, --prompt-file, or standard input")
    return sys.stdin.read()


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ValueError: with ``--compare``, plain decoding wrote another text.
    """
    from ..pair import load_pair

    config = config_from(args)
    if args.context is not None and not args.context.absolute().parent.is_dir():
        raise UsageError(f"--context {args.context}: there is no folder {args.context.parent}")
    text = _read_prompt(args)
    pair = load_pair(args.target, args.draft, args.dtype, choose_device(args.device))
    tokenizer = pair.tokenizer
    options = writing.generation_options(args, tokenizer)
    if options["do_sample"] and config.seed is None:  # so that a comparison draws the same
        config = config.replace(seed=int(torch.randint(1 << 62, ())))
    if args.chat:
        if not tokenizer.chat_template:
            raise ValueError("the target's tokenizer has no chat template: leave out --chat")
        ids = writing.template(tokenizer, [{"role": "user", "content": text}])
    else:
        ids = writing.encode(tokenizer, text)
    ids = ids.to(pair.target.device)

    notes = standard_error()
    meter = Meter(notes)
    spec = pair.spec(config, meter)
    live = LiveText(None if args.json else standard_output(), tokenizer, args.highlight)
    with _context(spec, args.context) as past:
        tokens = writing.run(spec, ids, options | past, live, meter)
    result = {
        "text": live.text,
        "tokens": tokens,
        "stats": spec.stats.as_dict(),
        "target": str(args.target or "embedded"),
        "draft": None if pair.draft is None else str(args.draft or "embedded"),
        "dtype": str(pair.target.dtype).removeprefix("torch."),
        "seed": config.seed if options["do_sample"] else None,
    }
    if not args.json:
        notes.line(writing.summary(spec.stats), "dim")
    difference = None
    if args.compare:
        result["plain"], difference = _compare(
            pair.plain(config, meter), ids, options, tokenizer, result, meter
        )
        if not args.json:
            plain = result["plain"]
            notes.line(
                f"plain decoding {plain['stats']['tokens_per_second']:.1f} tokens/s | speed-up "
                f"{plain['speed_up']:.2f} | identical: {'yes' if plain['identical'] else 'no'}",
                "dim",
            )
    if args.json:
        print(json.dumps(result))
    if difference:
        raise ValueError(difference)
    return 0


@contextlib.contextmanager
def _context(spec, file: Path | None) -> Iterator[dict]:
    """Yield the argument of a generation that goes on from a file, and save what it comes to, also
    where it is broken off."""
    from ..context import Context

    if file is None:
        yield {}
        return
    context = spec.load_context(file) if file.exists() else Context()
    try:
        yield {"past_key_values": context}
    finally:
        if context.is_free and context.get_seq_length():
            context.save(file)


def _compare(plain, ids, options, tokenizer, result, meter) -> tuple[dict, str | None]:
    """Decode plainly, and say what came out and where it differs."""
    from ..timing import difference

    live = LiveText(None, tokenizer)
    tokens: list[int] = []
    for step in plain.stream(ids, **options):
        tokens += step.tokens
        meter("plain decoding", len(tokens), options["max_new_tokens"])
    meter.close()
    live.add(tokens)
    live.end()
    stats = plain.stats
    ours = result["stats"]["tokens_per_second"]
    report = {
        "identical": tokens == result["tokens"],
        "speed_up": ours / stats.tokens_per_second if stats.tokens_per_second else 0.0,
        "text": live.text,
        "tokens": tokens,
        "stats": stats.as_dict(),
    }
    return report, difference(tokenizer, result["tokens"], tokens, "plain decoding")
