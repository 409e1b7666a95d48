"""``specextend eval``: measures speed, acceptance and exactness over lengths."""

from __future__ import annotations

import argparse
import dataclasses

from ..config import SpecConfig
from ..eval.options import EvalOptions
from ..eval.options import add_options as add_eval_options
from .options import add_config_options, add_models, config_from

SUMMARY = "measure speed, acceptance and exactness over lengths"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_eval_options(sub)
    add_models(sub, None, several=True)
    add_config_options(sub, without=("draft_cache", "tree_attention", "gate", "seed"))


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..eval.evaluate import evaluate

    evaluate(options_from(args))
    return 0


def options_from(args: argparse.Namespace) -> EvalOptions:
    """Return what the options ask for."""
    names = [field.name for field in dataclasses.fields(EvalOptions)]
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    target = args.target
    if args.synthetic is not None:
        target = target or "small"
    drafts = tuple(args.draft or ())

    def config(**defaults) -> SpecConfig:
        defaults |= {"gate": args.gate, "seed": args.seed}
        return config_from(args, target, drafts[0] if drafts else None, **defaults)

    given |= {"target": target, "drafts": drafts, "config": config}
    return EvalOptions(**{**given, "sweep": dict(args.sweep or ())})
