"""Makes ``results.md``, what was measured as tables, from ``results.jsonl``.

Every figure is a median over prompts and repeats with its quartiles, unless its table says
otherwise. What was not run is "-".
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..config import SpecConfig
from .beside import beside
from .methods import METHODS, REFERENCE
from .presets import PRESETS
from .records import Header, Results, Run
from .tables import (
    ROUND,
    Rows,
    escape,
    file_name,
    lengths,
    markdown,
    milliseconds_per_token,
    needle_cell,
    quartiles,
    row_title,
    rows,
    size,
    sources,
    synthetic_label,
)

HUGGING_FACE = "hf"


def write(folder: Path | str) -> Path:
    """Write ``results.md`` beside ``results.jsonl``.

    Results of synthetic acceptance say so in the file's name, too.

    Returns:
        The file.

    Raises:
        ValueError, FileNotFoundError: there are no results in the folder.
    """
    results = Results.read(folder)
    file = Path(folder) / f"{file_name('results', results.header)}.md"
    file.write_text(render(results), encoding="utf-8")
    return file


def _median(values: Iterable[float], form: str) -> tuple[str, str]:
    """Return a median, and its quartiles where there is more than one value, as text."""
    values = list(values)
    low, middle, high = quartiles(values)
    spread = f"{low:{form}}–{high:{form}}" if len(values) > 1 else ""
    return f"{middle:{form}}", spread


def _with_spread(parts: Sequence[tuple[str, str]], more: Sequence[str] = ()) -> str:
    spread = " / ".join(low_high or "-" for _, low_high in parts)
    cell = " / ".join([*(middle for middle, _ in parts), *more])
    return f"{cell}<br><sub>{spread}</sub>" if any(low_high for _, low_high in parts) else cell


def _speed(runs: Iterable[Run]) -> float:
    return statistics.median(run.tokens_per_second for run in runs)


def _per_length(table: Rows, cell: Callable[[list[Run]], str | None]) -> str:
    """Make a table of methods by lengths; a row without a single cell is left out."""
    columns = lengths(table)
    body = []
    for key, by_length in table.items():
        cells = [cell(by_length[n]) if n in by_length else None for n in columns]
        if any(cells):
            body.append([row_title(*key), *(text or "-" for text in cells)])
    return markdown(["", *map(size, columns)], body) if body else ""


def _speed_table(table: Rows) -> str:
    def ratio(runs: list[Run], base: str) -> str:
        known = table.get((base, None), {}).get(runs[0].length)
        return f"{_speed(runs) / _speed(known):.2f}×" if known else "-"

    def cell(runs: list[Run]) -> str:
        return _with_spread(
            [
                _median((run.mean_acceptance_length for run in runs), ".2f"),
                _median((run.tokens_per_second for run in runs), ".1f"),
            ],
            [ratio(runs, HUGGING_FACE), ratio(runs, REFERENCE)],
        )

    return _per_length(table, cell)


def _prefill_table(table: Rows) -> str:
    def part(seconds: Iterable[float | None]) -> tuple[str, str]:
        known = [s for s in seconds if s is not None]
        return _median(known, ".3f") if known else ("-", "")

    def cell(runs: list[Run]) -> str:
        target = part(run.prefill_seconds for run in runs)
        return _with_spread([target, part(run.draft_prefill_seconds for run in runs)])

    return _per_length(table, cell)


def _phase_table(table: Rows) -> str:
    def cell(runs: list[Run]) -> str | None:
        runs = [run for run in runs if run.seconds]
        parts = [
            _median((milliseconds_per_token(r, p) for r in runs), ".2f") for p in ROUND if runs
        ]
        return _with_spread(parts) if parts else None

    return _per_length(table, cell)


def _memory_table(table: Rows) -> str:
    def cell(runs: list[Run]) -> str | None:
        known = [r.peak_memory_bytes for r in runs if r.peak_memory_bytes is not None]
        return _with_spread([_median((n / 2**30 for n in known), ".2f")]) if known else None

    return _per_length(table, cell)


def _exact_table(table: Rows) -> str:
    def cell(runs: list[Run]) -> str | None:
        known = [run.exact for run in runs if run.exact is not None]
        return f"{sum(known)} of {len(known)}" if known else None

    return _per_length(table, cell)


def _differences(runs: Iterable[Run]) -> str:
    body = [
        [
            row_title(run.method, run.draft)
            + "".join(f", {name} {value}" for name, value in (run.sweep or {}).items()),
            size(run.length), escape(run.prompt), str(run.repeat),
            str(run.first_difference.at),
            "-" if run.first_difference.gap is None else f"{run.first_difference.gap:.2g}",
        ]
        for run in runs
        if run.first_difference is not None
    ]  # fmt: skip
    header = ["", "length", "prompt", "repeat", "first at token", "gap of logits"]
    return markdown(header, body) if body else ""


def _sweep_tables(results: Results) -> Iterable[tuple[str, str]]:
    """Yield title and table for each source, length, method and draft with swept options."""
    groups: dict[tuple, list[Run]] = {}
    for run in results.runs:
        if run.sweep:
            key = run.source, run.length, run.method, run.draft
            groups.setdefault(key, []).append(run)
    for (source, length, method, draft), runs in groups.items():
        base = [
            run
            for run in results.runs
            if (run.source, run.length, run.method, run.draft) == (source, length, method, draft)
            and not run.sweep
        ]
        columns = _sweep_columns(runs, base, results.header)
        body = [
            [text for column in columns.values() for text in (column + [("", "")] * 99)[i]]
            for i in range(max(map(len, columns.values())))
        ]
        header = [text for name in columns for text in (name, "τ / tok/s")]
        yield (
            f"{row_title(method, draft)}, {source} prompts of {size(length)}",
            markdown(header, body),
        )


def _sweep_columns(
    runs: list[Run], base: list[Run], header: Header
) -> dict[str, list[tuple[str, str]]]:
    """Return value and cell by swept field; the value that was configured has a "*"."""
    fields: dict[str, dict] = {}
    for run in runs:
        name, value = (" × ".join(map(str, part)) for part in zip(*run.sweep.items(), strict=True))
        value = next(iter(run.sweep.values())) if len(run.sweep) == 1 else value
        fields.setdefault(name, {}).setdefault(value, []).append(run)
    defaults = dataclasses.asdict(SpecConfig()) | header.settings.get("config", {})
    columns = {}
    for name, by_value in fields.items():
        usual = defaults.get(name)
        if base and usual is not None:
            by_value[usual] = by_value.get(usual, []) + base
        best = max(_speed(group) for group in by_value.values())
        columns[name] = [
            (
                f"{value}{' *' if value == usual and base else ''}",
                ("**{}**" if _speed(group) == best else "{}").format(
                    _with_spread(
                        [
                            _median((run.mean_acceptance_length for run in group), ".2f"),
                            _median((run.tokens_per_second for run in group), ".1f"),
                        ]
                    )
                ),
            )
            for value, group in sorted(by_value.items())
        ]
    return columns


# ---- the whole -----------------------------------------------------------------------------------


def _header_table(header: Header) -> str:
    machine, settings = header.machine, header.settings
    where = [machine.get("gpu"), machine.get("processor"), f"{machine.get('cores')} cores"]
    computed = f"{header.device}, {header.dtype}, {header.threads} threads, {machine.get('isa')}"
    plain = {
        key: value
        for key, value in settings.items()
        if key not in ("stages", "config", "synthetic") and value is not None
    }
    config = settings.get("config", {})
    drafts = [f"{kind}: {name}" for kind, name in header.drafts.items()]
    entries = {
        "target": header.target,
        "drafts": "; ".join(drafts) or "none",
        "machine": ", ".join(part for part in where if part),
        "computed": computed,
        "versions": f"specextend {header.version}, torch {header.torch}, transformers "
        f"{header.transformers}, Python {header.python}",
        "commit": header.commit or "-",
        "command": f"`{header.command}`",
        "settings": ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in plain.items()),
        "configuration": ", ".join(f"{k}={v}" for k, v in config.items()) or "the defaults",
        "seed": str(header.seed),
        "date": header.date,
    }
    return markdown(["", ""], [[key, escape(value)] for key, value in entries.items()])


_MEMORY = {
    "cuda": "the most that torch's allocator had given out, weights of all loaded models included",
    "resident": "the most memory that the process had, all of it included",
    None: "not measured here",
}


def render(results: Results) -> str:
    """Return the whole of ``results.md``."""
    header = results.header
    synthetic = synthetic_label(header)
    suffix = f" ({synthetic})" if synthetic else ""
    out = [f"# Evaluation of {header.target}{suffix}\n"]
    if synthetic:
        out.append(
            f"**This is {synthetic}.** Models of these shapes with random weights; proposals are "
            "made and verified as ever and cost what they cost, but how often they are accepted "
            "was set, not measured. Times and memory are real; acceptance, and all speed that "
            "comes of it, is an assumption. The text is noise.\n"
        )
    out.append(_header_table(header))
    out.append(
        "Medians over prompts and repeats, quartiles below them where there are several runs. "
        "τ: emitted tokens per forward of the target. Tokens per second are of decoding; the "
        'prefill is apart. "-": not run.\n'
    )

    def section(title: str, about: str, table: str) -> None:
        if table:
            out.extend([f"### {title}{suffix}\n", f"{about}\n", table])

    for source in sources(results.runs):
        runs = [run for run in results.runs if run.source == source]
        table = rows(runs)
        count = len({(run.length, run.prompt) for run in runs})
        out.append(f"## Prompts: {source}{suffix}\n")
        out.append(
            f"{count} prompt{'s' * (count != 1)}, {len(runs)} run{'s' * (len(runs) != 1)}.\n"
        )
        section(
            "Speed and acceptance", "τ / tokens per second / speed-up over Hugging Face's generate "
            "/ over plain decoding. Columns are tokens of the prompt.", _speed_table(table),
        )  # fmt: skip
        section("Phases", f"Milliseconds per new token: {' / '.join(ROUND)}.", _phase_table(table))
        section(
            "Prefill", "Seconds: the target's, first token included / the draft's.",
            _prefill_table(table),
        )  # fmt: skip
        section("Peak memory", f"GiB: {_MEMORY[header.peak_memory]}.", _memory_table(table))
        if not synthetic:
            section(
                "Exactness", f"Runs whose tokens are those of {METHODS[REFERENCE].title}.",
                _exact_table(table),
            )  # fmt: skip
            section(
                "Differences", "The gap is how far apart the target sees the two tokens.",
                _differences(runs),
            )  # fmt: skip
        section(
            "Needle", "What the draft itself makes of the answer: share of tokens that are its "
            "first choice / perplexity, means over prompts.", _per_length(table, needle_cell),
        )  # fmt: skip
    for title, table in _sweep_tables(results):
        section(
            f"Options: {title}", "τ / tokens per second; \\*: as configured; bold: the fastest.",
            table,
        )  # fmt: skip
    preset = PRESETS.get(header.settings.get("preset"))
    if preset is not None:
        out.extend([f"## Beside {preset.table}{suffix}\n", beside(results, preset)])
    return "\n".join(out)
