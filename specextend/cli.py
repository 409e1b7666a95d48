"""Parses the command line: ``specextend generate | chat | demo | eval | train | info``."""

from __future__ import annotations

import argparse
import os
import sys
import typing

import torch

from . import _C, __version__
from .command import chat, demo, evaluate, generate, info, train
from .errors import EXPECTED, UsageError

COMMANDS = {
    "generate": generate,
    "chat": chat,
    "demo": demo,
    "eval": evaluate,
    "train": train,
    "info": info,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, _error_line(message))


def _error_line(message: object) -> str:
    return f"specextend: error: {' '.join(str(message).split())}\n"


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands."""
    parser = _Parser(
        prog="specextend", description="Lossless long-context speculative decoding.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"specextend {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        text = command.SUMMARY
        sub = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
        )
        sub.set_defaults(run=command.run)
        command.add_options(sub)
    return parser


def _check_isa() -> None:
    """Have SPECEXTEND_CPU_ISA read while an error in it can be told as one."""
    try:
        _C.cpu_isa()
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        raise ValueError(text[text.find("SPECEXTEND_CPU_ISA") :]) from error


def main(argv: list[str] | None = None) -> int:
    """Run a command; return 0, 1 for a failure, 2 for bad usage, 130 if interrupted."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        *names, last = COMMANDS
        parser.error(f"a command is wanted: {', '.join(names)} or {last}")
    try:
        if getattr(args, "threads", None) is not None:
            if args.threads < 1:
                parser.error(f"--threads must be at least 1, got {args.threads}")
            torch.set_num_threads(args.threads)
        _check_isa()
        return args.run(args)
    except KeyboardInterrupt:
        sys.stderr.write("specextend: interrupted\n")
        return 130
    except BrokenPipeError:  # the reader of the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        parser.error(str(error))
    except EXPECTED as error:
        sys.stderr.write(_error_line(error))
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
