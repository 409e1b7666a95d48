"""``specextend train``: trains a draft for a model."""

from __future__ import annotations

import argparse

from ..train.options import add_options as add_train_options
from .options import add_device

SUMMARY = "train a draft for a model: a LongSpec block or an EAGLE-3 head"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_train_options(sub)
    add_device(sub.add_argument_group("machine"))


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..train.run import train

    train(args)
    return 0
