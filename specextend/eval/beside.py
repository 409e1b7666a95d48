"""Puts ours under each row of a paper's table, where the models are the paper's."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from ..config import SpecConfig
from .methods import METHODS
from .papers import MODELS, Cell, PaperRow
from .presets import Preset, last_name
from .records import Results, Run
from .tables import markdown, needle_cell, size


def beside(results: Results, preset: Preset) -> str:
    """Return the tables with their notes, or one sentence where the models are others."""
    theirs = preset.rows_for(results.header)
    if not theirs:
        models = dict.fromkeys(f"{row.target} / {row.draft}" for row in preset.rows)
        return (
            f"{preset.table} is of other models ({', '.join(models)}), so its figures are not "
            "printed beside these.\n"
        )
    form = f"τ / tokens per second / speed-up over {METHODS[preset.baseline].title}"
    if preset.with_prefill:
        form += ", with the prefill's time counted"
    if theirs[0].cells and next(iter(theirs[0].cells.values())).accuracy is not None:
        form = "accuracy / perplexity"
    lines = [f"The paper's rows, and ours (→) in the paper's form: {form}.\n"]

    named = _data_named(theirs, results.header.command)
    blocks: dict[tuple, list[PaperRow]] = {}
    for row in theirs:
        if row.data in named:
            key = row.data, row.target, row.draft, row.title if row.sweep else None
            blocks.setdefault(key, []).append(row)
    for (data, target, draft, _), block in blocks.items():
        lines += [f"{preset.table}: {data}, {target} / {draft}\n", _block(results, preset, block)]
    return "\n".join(lines) + "\n" + "".join(f"* {note}\n" for note in preset.notes)


def _data_named(theirs: Sequence[PaperRow], command: str) -> set[str]:
    """Return the paper's data sets that the command line names, as in govreport_8K.jsonl; all of
    them if it names none."""

    def plain(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "")

    data = {row.data for row in theirs}
    return {name for name in data if plain(name.split()[0]) in plain(command)} or data


def _block(results: Results, preset: Preset, block: Sequence[PaperRow]) -> str:
    """Make the table of one data set and pair of models. Where its columns are data sets, which
    runs do not know, ours have one column of their own."""
    columns, sweep = list(block[0].cells), block[0].sweep
    apart = isinstance(columns[0], str)
    header = [f"{block[0].title} ({sweep})" if sweep else ""]
    header += ["these prompts"] if apart else []
    header += [size(c) if isinstance(c, int) and not sweep else str(c) for c in columns]
    body = []
    for row in block:
        shown = [_paper_cell(cell) for cell in row.cells.values()]
        body.append([f"{row.title} (paper)", *(["-"] if apart else []), *shown])
        wanted = [None] if apart else columns
        ours = [_own_cell(results, preset, row, column) or "-" for column in wanted]
        if set(ours) != {"-"}:
            body.append(["→ ours", *ours, *(["-"] * len(columns) if apart else [])])
    return markdown(header, body)


def _paper_cell(cell: Cell) -> str:
    if cell.accuracy is not None:
        return f"{cell.accuracy:.3f} / {cell.perplexity:.3f}"
    return _cell(cell.acceptance, cell.tokens_per_second, cell.speedup)


def _cell(*values: float | None) -> str:
    return " / ".join("-" if value is None else f"{value:.2f}" for value in values)


def _own_cell(results: Results, preset: Preset, row: PaperRow, column) -> str | None:
    """Return ours for a cell of the paper; ``column`` None: over all prompts."""
    header = results.header
    configured = dataclasses.asdict(SpecConfig()) | header.settings.get("config", {})

    def belongs(run: Run) -> bool:
        drafted = run.draft is None or last_name(header.drafts.get(run.draft, "")) in MODELS.get(
            row.draft, ()
        )
        if run.method not in row.methods or not (drafted or run.draft == "self"):
            return False
        if row.sweep is None:
            return run.sweep is None and column in (None, run.length)
        swept = run.sweep or {row.sweep: configured[row.sweep]}
        return swept == {row.sweep: column}

    def rate(run: Run) -> float:
        if not preset.with_prefill:
            return run.tokens_per_second
        prefill = run.prefill_seconds + (run.draft_prefill_seconds or 0.0)
        return run.new_tokens / (prefill + run.decode_seconds)

    runs = [run for run in results.runs if belongs(run)]
    if not runs or next(iter(row.cells.values())).accuracy is not None:
        return needle_cell(runs)
    lengths = {run.length for run in runs}
    base = [
        rate(run)
        for run in results.runs
        if run.method == preset.baseline and run.sweep is None and run.length in lengths
    ]
    speed = statistics.median(map(rate, runs))
    return _cell(
        statistics.median(run.mean_acceptance_length for run in runs),
        speed,
        speed / statistics.median(base) if base else None,
    )
