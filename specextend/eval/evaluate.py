"""Evaluates, from options to results, tables and plots."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import assets, machine
from ..config import SpecConfig
from ..decode import SpecExtend
from ..draft import WORDS, Draft, load_draft
from ..errors import UsageError
from ..guard import position_limit
from ..pair import choose_device, load_pair, named_draft
from ..target import Target
from ..terminal import Output, standard_error, standard_output
from . import options, plots, report
from .methods import METHODS
from .options import EvalOptions, Stage
from .presets import Preset, find
from .prompts import RANDOM, Prompt, Prompts, random_prompts
from .records import FILE, Header, Results, Run, Writer
from .run import Row, Runner, Task, rows_of, tasks_of
from .synthetic import SyntheticSpecExtend, random_pair

# Options that a sweep can change.
SWEPT = (
    "budget", "chunk_size", "retrieve_every", "sink_chunks", "recent_chunks", "tree_nodes",
    "tree_depth", "tree_top_k", "tree_width", "draft_prefill_window", "ngram_size",
)  # fmt: skip
# Of the header: what two parts of one evaluation must have in common.
_SAME = ("version", "target", "drafts", "dtype", "device", "threads", "seed", "settings")
_SAME_MACHINE = ("processor", "isa", "gpu")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Says what is to be run.

    Attributes:
        stages: one after the other.
        new_tokens: for each prompt.
        preset: a paper's setting; None without.
        asked: options that stand in it in place of the suite's own: lengths, methods, ...
    """

    stages: tuple[Stage, ...]
    new_tokens: int
    preset: Preset | None
    asked: set[str]

    def config(self, asked: EvalOptions, kind: str | None) -> SpecConfig:
        """Return the configuration for a draft of this kind."""
        return asked.config(**(self.preset.config_for(kind) if self.preset else {}))


@dataclasses.dataclass(frozen=True)
class Models:
    """Holds what is evaluated.

    Attributes:
        target: the model.
        tokenizer: None for random models.
        drafts: by kind.
        names: of the drafts, by kind, as they were named.
    """

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    drafts: dict[str, Draft]
    names: dict[str, str]


def plan_of(args: EvalOptions) -> Plan:
    """Return what the options ask for."""
    for name, least in (("count", 1), ("runs", 1), ("max_new_tokens", 2), ("warmup", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if args.temperature < 0:
        raise UsageError(f"--temperature must not be negative, got {args.temperature}")
    changes = {name: getattr(args, name) for name in ("lengths", "methods", "count", "runs")}
    changes["sweep"] = args.sweep
    changes["sources"] = args.generate or (("prompts",) if args.prompts else None)
    if args.synthetic is not None:
        changes["sources"] = (RANDOM,)
        changes["methods"] = args.methods or ("hf", "plain", *options.LADDER)
    changes = {name: value for name, value in changes.items() if value}
    preset, new_tokens = None, options.QUICK_NEW_TOKENS if args.quick else options.NEW_TOKENS
    stages = options.QUICK if args.quick else options.SUITE
    if args.preset not in (None, "suite"):
        preset = find(args.preset)
        stages, new_tokens = (preset.stage,), preset.new_tokens
        if stages[0].sources == ("prompts",) and "sources" not in changes:
            raise UsageError(f"--preset {args.preset} needs the paper's prompts: --prompts PATH")
    elif args.preset is None and changes.keys() - {"runs", "count"}:
        stages = stages[:1]
    stages = tuple(dataclasses.replace(stage, **changes) for stage in stages)
    for name in changes.get("sweep", ()):
        if name not in SWEPT:
            raise UsageError(f"--sweep: an option is one of {', '.join(SWEPT)}, got {name!r}")
    return Plan(stages, args.max_new_tokens or new_tokens, preset, set(changes))


# ---- models ----------------------------------------------------------------------------------


def load_models(args: EvalOptions, dtype: str, kinds: set[str]) -> Models:
    """Load the models that were named.

    Args:
        kinds: of the drafts that the methods name, so that those that need no file are made.
    """
    named = args.drafts or (tuple(assets.DRAFTS) if args.target is None else ())
    first = named[0] if named else None
    pair = load_pair(args.target, first, dtype, choose_device(args.device))
    target = Target(pair.target)
    drafts: dict[str, Draft] = {}
    names: dict[str, str] = {}

    def add(name: str, draft, draft_tokenizer) -> None:
        loaded = load_draft(draft, target, SpecConfig(), (pair.tokenizer, draft_tokenizer))
        if loaded.kind in drafts:
            raise UsageError(
                f"one draft of a kind at a time: {names[loaded.kind]} and {name} are both "
                f"of the kind {loaded.kind}"
            )
        drafts[loaded.kind], names[loaded.kind] = loaded, name

    if pair.draft is not None:
        add(first, pair.draft, pair.draft_tokenizer)
    for name in named[1:]:
        path = assets.draft_path(name) if name in assets.DRAFTS and args.target is None else name
        add(name, *named_draft(path))
    for word in WORDS:
        if word in kinds and word not in drafts:
            add(word, word, None)
    return Models(pair.target, pair.tokenizer, drafts, names)


def _synthetic_models(args: EvalOptions, dtype: str, plan: Plan) -> Models:
    """Make random models of the shapes that --target and --draft name, the draft as a kind."""
    if wrong := [m for s in plan.stages for m in s.methods if m in ("hf_assisted", "hf_lookup")]:
        raise UsageError(f"--synthetic: {wrong[0]} accepts what the models themselves say")
    torch.manual_seed(args.seed)
    positions = max(n for stage in plan.stages for n in stage.lengths) + plan.new_tokens + 1
    shape = args.drafts[0] if args.drafts else "one-layer"
    kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    device = choose_device(args.device)
    target, draft = random_pair(args.target, shape, args.synthetic, positions, device, kind)
    loaded = load_draft(draft, Target(target), SpecConfig())
    return Models(target, None, {loaded.kind: loaded}, {loaded.kind: shape})


def _possible(plan: Plan, drafts: dict[str, Draft], target) -> tuple[Stage, ...]:
    """Return the stages without what was not asked for and what these models cannot do."""
    limit, stages = position_limit(target), []
    for stage in plan.stages:
        changes: dict = {}
        if "methods" not in plan.asked:
            changes["methods"] = tuple(
                name for name in stage.methods if _runs_with(name, drafts, target.device.type)
            )
        if "lengths" not in plan.asked and plan.preset is None and limit is not None:
            fitting = tuple(n for n in stage.lengths if n + plan.new_tokens <= limit)
            if not fitting:
                continue
            changes["lengths"] = fitting
        stages.append(dataclasses.replace(stage, **changes))
    if not stages:
        raise ValueError(
            f"the target has {limit:,} positions, too few for prompts of "
            f"{min(n for stage in plan.stages for n in stage.lengths):,} tokens: give --lengths"
        )
    return tuple(stages)


def _runs_with(method: str, drafts: dict[str, Draft], device: str) -> bool:
    try:
        rows_of(Stage((), (method,)), drafts, device)
    except ValueError:
        return False
    return True


# ---- the folder ------------------------------------------------------------------------------


def _header(
    args: EvalOptions, plan: Plan, models: Models, config: SpecConfig, peak_memory
) -> Header:
    defaults = SpecConfig()
    settings = {
        "preset": args.preset,
        "stages": [dataclasses.asdict(stage) for stage in plan.stages],
        "new_tokens": plan.new_tokens,
        "warmup": args.warmup,
        "temperature": args.temperature,
        "documents": None if args.prompts is None else Path(args.prompts).name,
        "config": {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(SpecConfig)
            if getattr(config, field.name) != getattr(defaults, field.name)
        },
        "synthetic": _synthetic(args),
    }
    return Header(
        **machine.header(models.target.device.type),
        target=args.target or "the embedded target",
        drafts=models.names,
        dtype=str(models.target.dtype).removeprefix("torch."),
        seed=args.seed,
        settings=json.loads(json.dumps(settings)),  # as it will be read
        peak_memory=peak_memory,
    )


def _synthetic(args: EvalOptions) -> dict | None:
    return None if args.synthetic is None else {"acceptance": args.synthetic}


def _what_differs(before: Header, now: Header) -> str | None:
    """Say in words what two headers differ in; None if nothing."""
    pairs = [(name, getattr(before, name), getattr(now, name)) for name in _SAME[:-1]]
    pairs += [(name, before.machine.get(name), now.machine.get(name)) for name in _SAME_MACHINE]
    keys = sorted({*before.settings, *now.settings})
    pairs += [(key, before.settings.get(key), now.settings.get(key)) for key in keys]
    for name, was, wanted in pairs:
        if was != wanted:
            return f"{name}={json.dumps(was)}, but {name}={json.dumps(wanted)} is asked for"
    return None


def _resume(folder: Path, header: Header) -> list[Run]:
    """Read the runs that the folder has already.

    Raises:
        ValueError: it is another evaluation's.
    """
    if not (folder / FILE).exists() or not (folder / FILE).stat().st_size:
        return []
    results = Results.read(folder)
    if difference := _what_differs(results.header, header):
        raise ValueError(
            f"the results in {folder} were made with {difference}: name another folder with "
            "--output, or the same options to go on"
        )
    return results.runs


# ---- progress --------------------------------------------------------------------------------


class _Progress:
    """Shows how far it is, and what came out so far: a bar with the time left on a terminal, a line
    per run elsewhere."""

    def __init__(self, notes: Output, tasks: list[Task]):
        self._notes, self._number = notes, len(tasks)
        self._total, self._done, self._count = sum(task.weight for task in tasks), 0.0, 0
        self._start = time.monotonic()
        self._bar = None

    def __enter__(self) -> _Progress:
        if self._notes.is_live:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.fields[count]} of {task.fields[number]} runs"), BarColumn(),
                TimeRemainingColumn(), TextColumn("{task.description}"),
                console=self._notes.console, transient=True,
                auto_refresh=False,  # a thread that draws would take time from what is measured
                speed_estimate_period=600,
            )  # fmt: skip
            self._bar.start()
            self._id = self._bar.add_task("", total=self._total, count=0, number=self._number)
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, task: Task) -> Callable[[str, int, int], None]:
        """Return what shows the progress of a run."""
        text = f"{task.prompt.name}, {task.prompt.length:,} tokens: {task.row.title}"
        if self._bar is None:
            return lambda phase, done, total: None

        def progress(phase: str, done: int, total: int) -> None:
            if phase == "decoding" and done < total:
                return  # drawing would take time from what is measured
            self._bar.update(self._id, description=f"{text}, {phase.replace('_', ' ')}")
            self._bar.refresh()

        return progress

    def end(self, task: Task, run: Run) -> None:
        """Note that a run is over."""
        self._done += task.weight
        self._count += 1
        if self._bar is not None:
            self._bar.update(self._id, completed=self._done, count=self._count, refresh=True)
            return
        seconds = time.monotonic() - self._start
        left = seconds / self._done * (self._total - self._done)
        self._notes.line(
            f"run {self._count} of {self._number}: {task.prompt.name}, {task.prompt.length:,} "
            f"tokens: {task.row.title}: {run.tokens_per_second:.1f} tokens/s, acceptance length "
            f"{run.mean_acceptance_length:.2f}{'' if run.exact is not False else ', NOT EXACT'}"
            f" | about {_minutes(left)} left"
        )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


# ---- the command -----------------------------------------------------------------------------


def evaluate(args: EvalOptions) -> None:
    """Run what is asked for, and write its results.

    Raises:
        ValueError: in float32, a method wrote other tokens than the reference.
    """
    plan = plan_of(args)
    plan.config(args, None)  # errors in options come before anything is loaded
    dtype = args.dtype
    if dtype is None:
        on_gpu = choose_device(args.device).type == "cuda"
        dtype = (plan.preset.dtype if plan.preset else "auto") if on_gpu else "float32"
    if args.synthetic is None:
        kinds = {METHODS[m].draft for s in plan.stages for m in s.methods if m in METHODS}
        models = load_models(args, dtype, kinds)
    else:
        models = _synthetic_models(args, dtype, plan)
    plan = dataclasses.replace(plan, stages=_possible(plan, models.drafts, models.target))
    configs = {kind: plan.config(args, kind) for kind in (None, *models.drafts)}
    make = SpecExtend
    if args.synthetic is not None:
        make = functools.partial(SyntheticSpecExtend, acceptance=args.synthetic)
    runner = Runner(
        models.target, models.drafts, configs, plan.new_tokens, args.warmup, args.temperature,
        args.seed, make, _synthetic(args),
    )  # fmt: skip
    config = configs[next(iter(models.drafts), None)]
    header = _header(args, plan, models, config, runner.memory.kind)
    folder = Path(args.output)
    done = {run.key: run for run in _resume(folder, header)}
    tasks = _tasks(args, plan, models.tokenizer, runner)
    left = [task for task in tasks.values() if task.key not in done]
    out, notes = standard_output(), standard_error()
    if done:
        notes.line(f"{len(tasks) - len(left)} of {len(tasks)} runs are in {folder} already", "dim")
    with Writer(folder) as writer, _Progress(notes, left) as show:
        if not done and not (folder / FILE).stat().st_size:
            writer.write(header)
        for task in left:
            reference = _reference(done, task)
            run = runner.run(task, reference, show.begin(task))
            done[run.key] = run
            writer.write(run)
            show.end(task, run)
    runs = [done[key] for key in tasks]
    _write_summary(out, runs, {task.row.key: task.row for task in tasks.values()})
    out.line(f"\nresults: {folder / FILE}")
    out.line(f"report: {report.write(folder)}")
    out.line(f"plots: {', '.join(path.name for path in plots.write(folder))}")
    _demand_exactness(runs, header)


def _tasks(args: EvalOptions, plan: Plan, tokenizer, runner: Runner) -> dict[tuple, Task]:
    """Return all runs by their keys, in their order."""
    path = None if args.prompts is None else Path(args.prompts)
    prompts = None if tokenizer is None else Prompts(tokenizer, path, args.seed)
    vocab = runner.target.config.get_text_config().vocab_size
    made: dict[tuple[str, int, int], list[Prompt]] = {}
    tasks: dict[tuple, Task] = {}
    for stage in plan.stages:
        rows = rows_of(stage, runner.drafts, runner.target.device.type)
        for row in rows:  # errors in options come before the first run
            runner.config(row)
        for source in stage.sources:
            for length in stage.lengths:
                key = (source, length, stage.count)
                if key not in made:
                    if prompts is None:
                        made[key] = random_prompts(vocab, length, stage.count, args.seed)
                    else:
                        made[key] = prompts.make(*key)
                    for prompt in made[key]:
                        runner.check(prompt)
                for task in tasks_of(made[key], rows, stage.runs):
                    tasks.setdefault(task.key, task)
    return tasks


def _reference(done: dict[tuple, Run], task: Task) -> list[int] | None:
    """Return the tokens that a run has to write, None for the one that says so."""
    prompt = (task.prompt.length, task.prompt.source, task.prompt.name)
    run = done.get((*prompt, "plain", None, (), 0))
    return None if run is None else run.tokens


def _write_summary(out: Output, runs: Iterable[Run], rows: dict[tuple, Row]) -> None:
    """Write a line for each length, source and method: means over prompts and repeats."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.length, run.source, run.row), []).append(run)

    def rate(group: list[Run]) -> float:
        return sum(run.tokens_per_second for run in group) / len(group)

    header = ["", "length", "prompts", "tokens /s", "times plain", "accept. length", "identical"]
    lines = []
    for (length, source, row), group in sorted(groups.items(), key=lambda item: item[0][:2]):
        plain = groups.get((length, source, ("plain", None, ())))
        exact = [run.exact for run in group if run.exact is not None]
        acceptance = sum(run.mean_acceptance_length for run in group) / len(group)
        speed_up = rate(group) / rate(plain) if plain and rate(plain) else 0.0
        lines.append(
            [
                rows[row].title, f"{length:,}", source, f"{rate(group):.1f}", f"{speed_up:.2f}",
                f"{acceptance:.2f}", "-" if not exact else "yes" if all(exact) else "NO",
            ]
        )  # fmt: skip
    out.table(header, lines)


def _demand_exactness(runs: list[Run], header: Header) -> None:
    """Raise ValueError where a run in float32 wrote other tokens than the reference."""
    wrong = [run for run in runs if run.exact is False]
    if not wrong or header.dtype != "float32":
        return
    run = wrong[0]
    at = run.first_difference
    gap = "" if at.gap is None else f", where the two tokens' logits are {at.gap:.2g} apart"
    raise ValueError(
        f"{len(wrong)} of {len(runs)} runs are not exact; the first: {run.method} on {run.prompt} "
        f"of {run.length:,} tokens, from new token {at.at} on{gap}"
    )
