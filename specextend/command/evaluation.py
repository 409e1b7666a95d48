"""Shows an evaluation: how far it is, and what came out."""

from __future__ import annotations

import time
from collections.abc import Iterable

from ..eval import plots, report
from ..eval.evaluation import prepare
from ..eval.options import EvalOptions
from ..eval.records import FILE, Header, Run
from ..eval.run import Row, Task
from ..generation import Progress
from ..terminal import Output, standard_error, standard_output


def show(options: EvalOptions) -> None:
    """Run what is left of an evaluation, and show its results.

    Raises:
        ValueError: in float32, a method wrote other tokens than the reference.
    """
    evaluation = prepare(options)
    folder, tasks, left = options.output, evaluation.tasks, evaluation.left
    out, notes = standard_output(), standard_error()
    for text in evaluation.left_out:
        notes.line(text, "dim")
    if evaluation.done:
        notes.line(f"{len(tasks) - len(left)} of {len(tasks)} runs are in {folder} already", "dim")
    with RunProgress(notes, left) as progress:
        runs = evaluation.run(progress)
    _write_summary(out, runs, {task.row.key: task.row for task in tasks.values()})
    out.line(f"\nresults: {folder / FILE}")
    out.line(f"report: {report.write(folder)}")
    out.line(f"plots: {', '.join(path.name for path in plots.write(folder))}")
    _demand_exactness(runs, evaluation.header)


class RunProgress:
    """Shows how far it is, and what came out so far: a bar with the time left on a terminal, a line
    per run elsewhere."""

    def __init__(self, notes: Output, tasks: list[Task]):
        self._notes, self._number = notes, len(tasks)
        self._total, self._done, self._count = sum(task.weight for task in tasks), 0.0, 0
        self._start = time.monotonic()
        self._bar = None

    def __enter__(self) -> RunProgress:
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

    def begin(self, task: Task) -> Progress:
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
        """Count a run, and show what came out."""
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
