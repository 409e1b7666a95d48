"""Loads the models of an evaluation, a target and its drafts, or makes random ones."""

from __future__ import annotations

import dataclasses

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import assets
from ..config import SpecConfig
from ..draft import WORDS, Draft, load_draft
from ..errors import UsageError
from ..guard import position_limit
from ..machine import free_memory
from ..pair import find_draft, load_pair
from ..target import Target
from ..terminal import bytes_text
from .memory import cache_bytes
from .options import Stage
from .plan import Plan
from .run import rows_of
from .synthetic import random_pair


@dataclasses.dataclass(frozen=True)
class Models:
    """Holds what is evaluated.

    Attributes:
        target: the model.
        tokenizer: the target's; None: of random models.
        drafts: by kind, the first one named first.
        names: of the drafts, by kind, as they were named.
    """

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    drafts: dict[str, Draft]
    names: dict[str, str]


def load_models(plan: Plan) -> Models:
    """Load the target, the drafts named, and those that methods ask for and that need no file.

    Raises:
        UsageError: two drafts of one kind.
        ValueError: models that are not there, or do not go together.
    """
    options, named = plan.options, list(plan.options.drafts)
    if options.target is None and not named:
        named = list(assets.DRAFTS)
    pair = load_pair(options.target, named[0] if named else None, plan.dtype, options.device)
    target = Target(pair.target)
    drafts: dict[str, Draft] = {}
    names: dict[str, str] = {}

    def add(name: str, draft, draft_tokenizer) -> None:
        loaded = load_draft(draft, target, SpecConfig(), (pair.tokenizer, draft_tokenizer))
        if loaded.kind in drafts:
            raise UsageError(
                f"one draft of a kind at a time: {names[loaded.kind]} and {name} are both of the "
                f"kind {loaded.kind}"
            )
        drafts[loaded.kind], names[loaded.kind] = loaded, name

    if pair.draft is not None:
        add(named[0], pair.draft, pair.draft_tokenizer)
    for name in named[1:]:
        add(name, *find_draft(name, pair.target, embedded=options.target is None))
    for word in WORDS:
        if word in plan.draft_kinds and word not in drafts:
            add(word, word, None)
    return Models(pair.target, pair.tokenizer, drafts, names)


def synthetic_models(plan: Plan) -> Models:
    """Make random models of the shapes that --target and --draft name, the draft as a kind.

    Raises:
        UsageError: a method that needs models with something to say.
    """
    options = plan.options
    if wrong := [m for s in plan.stages for m in s.methods if m in ("hf_assisted", "hf_lookup")]:
        raise UsageError(f"--synthetic: {wrong[0]} accepts what the models themselves say")
    torch.manual_seed(options.seed)
    positions = max(n for stage in plan.stages for n in stage.lengths) + plan.new_tokens + 1
    draft_shape = (*options.drafts, "one-layer")[0]
    dtype = torch.float32 if plan.dtype == "auto" else getattr(torch, plan.dtype)
    target, draft = random_pair(
        options.target, draft_shape, options.synthetic, positions, options.device, dtype
    )
    loaded = load_draft(draft, Target(target), SpecConfig())
    return Models(target, None, {loaded.kind: loaded}, {loaded.kind: draft_shape})


@dataclasses.dataclass(frozen=True)
class Limit:
    """Says how long a text can be, prompt and new tokens, and why no longer."""

    tokens: int
    why: str


def possible_plan(plan: Plan, models: Models) -> Plan:
    """Return the plan without what was not asked for and what these models cannot do here.

    Raises:
        ValueError: nothing is left, or what was asked for does not fit into memory.
    """
    positions, memory = _positions(models), _memory(plan, models)
    limit = min((x for x in (positions, memory) if x is not None), key=_tokens, default=None)
    stages, dropped = [], set()
    for stage in plan.stages:
        changes: dict = {}
        if "methods" not in plan.asked:
            changes["methods"] = tuple(name for name in stage.methods if _runs_with(name, models))
        own = "lengths" not in plan.asked and plan.preset is None
        over = _over(stage, plan, limit if own else memory)
        if over and not own:
            raise ValueError(f"prompts of {min(over):,} tokens do not fit: {memory.why}")
        dropped |= over
        changes["lengths"] = tuple(n for n in stage.lengths if n not in over)
        if changes["lengths"]:
            stages.append(dataclasses.replace(stage, **changes))
    if not stages:
        raise ValueError(
            f"{limit.why}, too few for prompts of {min(dropped):,} tokens: give --lengths"
        )
    left_out = tuple(f"without prompts of {n:,} tokens: {limit.why}" for n in sorted(dropped))
    return dataclasses.replace(plan, stages=tuple(stages), left_out=left_out)


def _tokens(limit: Limit) -> int:
    return limit.tokens


def _over(stage: Stage, plan: Plan, limit: Limit | None) -> set[int]:
    """Return the lengths of a stage that are beyond a limit."""
    return {n for n in stage.lengths if limit is not None and n + plan.new_tokens > limit.tokens}


def _positions(models: Models) -> Limit | None:
    limit = position_limit(models.target)
    return None if limit is None else Limit(limit, f"the target has {limit:,} positions")


def _memory(plan: Plan, models: Models) -> Limit | None:
    """Return how long a text the caches have room for."""
    free = free_memory(models.target.device)
    if free is None:
        return None
    drafts: list[tuple[str | None, Draft | None]] = [(None, None), *models.drafts.items()]

    def taken_with(kind: str | None, draft: Draft | None) -> int:
        config = plan.config(kind)
        own = draft and draft.with_config(config)
        return cache_bytes(models.target, own, config, models.tokenizer)

    taken = max(taken_with(kind, draft) for kind, draft in drafts)
    if plan.options.read_once:  # a context stays beside the cache of the run
        taken += taken_with(None, None)
    why = (
        f"caches take {bytes_text(taken)} for each token, and {bytes_text(free)} of memory are free"
    )
    return Limit(free // max(taken, 1), why)


def _runs_with(method: str, models: Models) -> bool:
    try:
        rows_of(Stage((), (method,)), models.drafts, models.target.device.type)
    except ValueError:
        return False
    return True
