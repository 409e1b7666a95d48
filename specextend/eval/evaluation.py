"""Evaluates: what a plan has to run, but for what a folder has of it already."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..decode import SpecExtend
from ..generation import Progress
from .models import Models, load_models, possible_plan, synthetic_models
from .options import EvalOptions
from .plan import Plan, plan_of
from .prompts import Prompt, Prompts, random_prompts
from .records import FILE, Header, Run, Writer
from .resume import header_of, resume
from .run import Runner, Task, rows_of, tasks_of
from .synthetic import SyntheticSpecExtend


class Observer(Protocol):
    """Hears of runs, one after the other."""

    def begin(self, task: Task) -> Progress:
        """Hear that a run begins; return what hears of its progress."""

    def end(self, task: Task, run: Run) -> None:
        """Hear that a run is over."""


@dataclass
class Evaluation:
    """Runs the tasks of a plan, and writes down what came out.

    Attributes:
        options: what was asked for.
        runner: runs a task.
        header: of the results.
        tasks: all runs by their keys, in their order.
        done: runs that were made, by the same keys.
        left_out: what is not run, in words, with the reasons.
    """

    options: EvalOptions
    runner: Runner
    header: Header
    tasks: dict[tuple, Task]
    done: dict[tuple, Run]
    left_out: tuple[str, ...]

    @property
    def left(self) -> list[Task]:
        """Return what is still to be run."""
        return [task for task in self.tasks.values() if task.key not in self.done]

    def run(self, observer: Observer) -> list[Run]:
        """Run what is left; return all runs in their order."""
        folder = self.options.output
        with Writer(folder) as writer:
            if not self.done and not (folder / FILE).stat().st_size:
                writer.write(self.header)
            for task in self.left:
                run = self.runner.run(task, self._reference(task), observer.begin(task))
                self.done[run.key] = run
                writer.write(run)
                observer.end(task, run)
        return [self.done[key] for key in self.tasks]

    def _reference(self, task: Task) -> list[int] | None:
        """Return the tokens that a run has to write, None for the one that says so."""
        prompt = (task.prompt.length, task.prompt.source, task.prompt.name)
        run = self.done.get((*prompt, "plain", None, (), 0))
        return None if run is None else run.tokens


def prepare(options: EvalOptions) -> Evaluation:
    """Load the models, and find out what is to be run.

    Raises:
        ValueError: options or models that do not go together, or results of another evaluation in
            the folder.
    """
    plan = plan_of(options)
    plan.config(None)  # errors in options come before anything is loaded
    synthetic = options.synthetic is not None
    models = synthetic_models(plan) if synthetic else load_models(plan)
    plan = possible_plan(plan, models)
    configs = {kind: plan.config(kind) for kind in (None, *models.drafts)}
    make: Callable[..., SpecExtend] = SpecExtend
    if synthetic:
        make = functools.partial(SyntheticSpecExtend, acceptance=options.synthetic)
    runner = Runner(
        models.target, models.drafts, configs, plan.new_tokens, options.warmup,
        options.temperature, options.seed, make, plan.synthetic, models.tokenizer,
        options.read_once,
    )  # fmt: skip
    config = configs[next(iter(models.drafts), None)]
    header = header_of(plan, models, config, runner.memory.kind)
    done = {run.key: run for run in resume(options.output, header)}
    return Evaluation(options, runner, header, _tasks(plan, models, runner), done, plan.left_out)


def _tasks(plan: Plan, models: Models, runner: Runner) -> dict[tuple, Task]:
    """Return all runs by their keys, in their order."""
    seed, prompts = plan.options.seed, None
    if models.tokenizer is not None:
        prompts = Prompts(models.tokenizer, plan.options.prompts, seed)
    vocab = models.target.config.get_text_config().vocab_size
    made: dict[tuple[str, int, int], list[Prompt]] = {}
    tasks: dict[tuple, Task] = {}
    for stage in plan.stages:
        rows = rows_of(stage, models.drafts, models.target.device.type)
        for row in rows:  # errors in options come before the first run
            runner.config(row)
        for source in stage.sources:
            for length in stage.lengths:
                key = (source, length, stage.count)
                if key not in made:
                    if prompts is None:
                        made[key] = random_prompts(vocab, length, stage.count, seed)
                    else:
                        made[key] = prompts.make(*key)
                    for prompt in made[key]:
                        runner.check(prompt)
                for task in tasks_of(made[key], rows, stage.runs):
                    tasks.setdefault(task.key, task)
    return tasks
