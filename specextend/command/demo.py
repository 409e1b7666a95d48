"""``specextend demo``: continues a long document in several ways, or serves a page that does."""

from __future__ import annotations

import argparse

from ..errors import UsageError
from ..machine import choose_device
from ..terminal import standard_output
from .config_options import add_config_options
from .options import add_models, config_from

SUMMARY = "continue a long document in several ways, and compare them"
LENGTHS = {False: (16_000, 256), True: (2_000, 48)}  # --short: prompt, new tokens
#: what the embedded pair's demonstration ends with
REAL = r"""
These models are small, and what they write makes little sense. With ones that people use,
4 GB from the hub:
specextend demo --short --target Qwen/Qwen2.5-Coder-1.5B-Instruct \
  --draft Qwen/Qwen2.5-Coder-0.5B-Instruct"""


def add_options(sub: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    sub.add_argument("--tokens", type=int, metavar="N", help="length of the prompt [16000]")
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help="[256]")
    sub.add_argument("--short", action="store_true", help="2000 tokens and 48 new ones")
    sub.add_argument("--document", metavar="FILE", help="[modules of Python's standard library]")
    group = sub.add_argument_group("page")
    group.add_argument(
        "--web", action="store_true",
        help="serve a page: a text of one's own, plain decoding and SpecExtend side by side, live",
    )  # fmt: skip
    group.add_argument("--host", metavar="ADDRESS", help="to serve it on [127.0.0.1]")
    group.add_argument("--port", type=int, metavar="N", help="0: any that is free [8765]")
    add_models(sub, "float32")
    add_config_options(sub, without=("draft_cache", "gate", "seed"))


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.web:
        return _serve(args)
    if args.host is not None or args.port is not None:
        raise UsageError("--host and --port go with --web")
    from ..pair import load_pair
    from .demonstration import show

    tokens, new = LENGTHS[args.short]
    tokens = tokens if args.tokens is None else args.tokens
    new = new if args.max_new_tokens is None else args.max_new_tokens
    if tokens < 2 or new < 2:
        raise UsageError("--tokens and --max-new-tokens must be at least 2")
    # Each row of the table is its method alone.
    config = config_from(args, gate="off")
    pair = load_pair(args.target, args.draft, args.dtype, choose_device(args.device))
    show(pair, config, args.document, args.draft, tokens, new)
    if args.target is None:
        standard_output().line(REAL)
    return 0


def _serve(args: argparse.Namespace) -> int:
    """Serve the page until it is interrupted."""
    try:
        from ..web.race import LENGTH, Race
        from ..web.server import serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "pydantic", "uvicorn"):
            raise
        raise ImportError(
            f"--web needs {error.name}, which is not installed: pip install 'specextend[web]'"
        ) from error
    from ..pair import load_pair

    def make_race() -> Race:
        # Each column is its method alone.
        config = config_from(args, gate="off")
        tokens, new = LENGTHS[args.short]
        for option, value in (("tokens", args.tokens), ("max-new-tokens", args.max_new_tokens)):
            if value is not None and value < 2:
                raise UsageError(f"--{option} must be at least 2, got {value}")
        pair = load_pair(args.target, args.draft, args.dtype, choose_device(args.device))
        return Race(
            pair, config, args.draft or "model", embedded=args.target is None,
            document=args.document, length=args.tokens or (tokens if args.short else LENGTH),
            new_tokens=args.max_new_tokens or new,
        )  # fmt: skip

    serve(make_race, args.host, args.port)
    return 0
