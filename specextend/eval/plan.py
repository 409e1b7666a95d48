"""Plans what an evaluation is to run: stages, new tokens, configurations."""

from __future__ import annotations

import dataclasses

from ..config import SpecConfig
from ..errors import UsageError
from . import options as suite
from .methods import METHODS
from .options import EvalOptions, Stage
from .presets import Preset, find
from .prompts import RANDOM

# Options that a sweep can change.
SWEPT = (
    "budget", "chunk_size", "retrieve_every", "sink_chunks", "recent_chunks", "tree_nodes",
    "tree_depth", "tree_top_k", "tree_width", "draft_prefill_window", "ngram_size",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds what is to be run.

    Attributes:
        options: what was asked for.
        stages: one after the other.
        new_tokens: for each prompt.
        preset: a paper's setting; None without.
        asked: fields of the stages that stand there in place of the suite's own.
        left_out: what is not run, in words, with the reasons.
    """

    options: EvalOptions
    stages: tuple[Stage, ...]
    new_tokens: int
    preset: Preset | None
    asked: frozenset[str]
    left_out: tuple[str, ...] = ()

    def config(self, kind: str | None) -> SpecConfig:
        """Return the configuration for a draft of this kind; None: for plain decoding.

        Raises:
            UsageError: fields that do not go together, or out of range.
        """
        options = self.options
        preset = self.preset.config_for(kind) if self.preset else {}
        own = {**options.own_settings, **preset, "gate": options.gate, "seed": options.seed}
        try:
            return SpecConfig(**{**own, **options.given})
        except ValueError as error:
            raise UsageError(error) from error

    @property
    def dtype(self) -> str:
        """Name the target's dtype."""
        if self.options.dtype is not None:
            return self.options.dtype
        if self.options.device.type == "cpu":
            return "float32"
        return self.preset.dtype if self.preset else "auto"

    @property
    def synthetic(self) -> dict | None:
        """Return ``records.Run.synthetic`` of the runs."""
        acceptance = self.options.synthetic
        return None if acceptance is None else {"acceptance": acceptance}

    @property
    def draft_kinds(self) -> set[str | None]:
        """Name the kinds of drafts that the methods ask for."""
        return {METHODS[m].draft for s in self.stages for m in s.methods if m in METHODS}


def plan_of(options: EvalOptions) -> Plan:
    """Return what the options ask for.

    Raises:
        UsageError: options that do not go together.
        ValueError: a preset that is not known.
    """
    preset, new_tokens = None, suite.QUICK_NEW_TOKENS if options.quick else suite.NEW_TOKENS
    stages = suite.QUICK if options.quick else suite.SUITE
    changes = _changes(options)
    if options.preset not in (None, "suite"):
        preset = find(options.preset)
        stages, new_tokens = (preset.stage,), preset.new_tokens
        if stages[0].sources == ("prompts",) and "sources" not in changes:
            raise UsageError(f"--preset {options.preset} needs the paper's prompts: --prompts PATH")
    elif options.preset is None and changes.keys() - {"runs", "count"}:
        stages = stages[:1]
    if preset is not None and preset.with_prefill and options.read_once:
        raise UsageError(
            f"--read-once: the table of --preset {preset.name} counts every method's own prefill"
        )
    stages = tuple(dataclasses.replace(stage, **changes) for stage in stages)
    for name in changes.get("sweep", ()):
        if name not in SWEPT:
            raise UsageError(f"--sweep: an option is one of {', '.join(SWEPT)}, got {name!r}")
    return Plan(options, stages, options.max_new_tokens or new_tokens, preset, frozenset(changes))


def _changes(options: EvalOptions) -> dict:
    """Return the fields of a stage that the options set."""
    changes = {name: getattr(options, name) for name in ("lengths", "methods", "count", "runs")}
    changes["sweep"] = options.sweep
    changes["sources"] = options.generate or (("prompts",) if options.prompts else None)
    if options.synthetic is not None:
        changes["sources"] = (RANDOM,)
        changes["methods"] = options.methods or ("hf", "plain", *suite.LADDER)
    return {name: value for name, value in changes.items() if value}
