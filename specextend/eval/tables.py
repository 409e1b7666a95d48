"""Holds what report and plots share: names, groups of runs, and Markdown's tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from .methods import METHODS
from .records import Header, Run
from .synthetic import label

#: A round has these phases, in this order.
ROUND = ("draft", "verify", "accept", "retrieve")


def synthetic_label(header: Header) -> str | None:
    """Return what must stand on everything that was measured with a set acceptance, else None."""
    synthetic = header.settings.get("synthetic")
    return label(synthetic["acceptance"]) if synthetic else None


def file_name(stem: str, header: Header) -> str:
    """Return ``stem``, followed by the label of synthetic acceptance where it was set."""
    synthetic = synthetic_label(header)
    return f"{stem}-{synthetic.replace(', ', '-').replace(' ', '-')}" if synthetic else stem


def row_title(method: str, draft: str | None) -> str:
    """Return a method's name in tables and plots, with its draft where the method has several."""
    known = METHODS.get(method)
    title = known.title if known else method
    named = known is None or known.draft == "first"
    return f"{title} ({draft})" if named and draft not in (None, "model") else title


def sources(runs: Iterable[Run]) -> list[str]:
    """Return the sources of the prompts, in the order that they were run in."""
    return list(dict.fromkeys(run.source for run in runs))


Rows = dict[tuple[str, "str | None"], dict[int, list[Run]]]


def rows(runs: Iterable[Run]) -> Rows:
    """Group runs outside of sweeps by method and draft, as ``METHODS`` has them, and by length."""
    order = {key: i for i, key in enumerate(METHODS)}
    found: Rows = {}
    for run in runs:
        if run.sweep is None:
            by_length = found.setdefault((run.method, run.draft), {})
            by_length.setdefault(run.length, []).append(run)
    ranked = sorted(found, key=lambda key: order.get(key[0], len(order)))
    return {key: dict(sorted(found[key].items())) for key in ranked}


def lengths(table: Rows) -> list[int]:
    """Return the lengths of all rows, ascending."""
    return sorted({length for by_length in table.values() for length in by_length})


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Return lower quartile, median, upper quartile."""
    values = list(values)
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def size(tokens: int) -> str:
    """Return a length as it is named: 16K."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def milliseconds_per_token(run: Run, phase: str) -> float:
    """Return what a token of decoding takes in one phase of the rounds."""
    return 1e3 * (run.seconds or {}).get(phase, 0.0) / max(1, run.new_tokens - 1)


def needle_cell(runs: Iterable[Run]) -> str | None:
    """Return accuracy and perplexity over prompts; None where nothing was asked."""
    known = [run.needle for run in runs if run.needle is not None]
    if not known:
        return None
    accuracy = statistics.fmean(needle.accuracy for needle in known)
    perplexity = statistics.geometric_mean(needle.perplexity for needle in known)
    return f"{accuracy:.3f} / {perplexity:.3f}"


def escape(text: str) -> str:
    """Return text as a cell of a table in Markdown has it."""
    return text.replace("|", "\\|").replace("\n", " ")


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a table, its first column aligned to the left, the others to the right."""
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
