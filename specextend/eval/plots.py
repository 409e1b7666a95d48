"""Draws ``results.jsonl`` as plots, each an SVG file.

Text in the files stays text, and the same results give the same bytes. A method has one colour in
all plots; the same method with another draft has another stroke.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..config import SpecConfig
from ..terminal import standard_error
from .methods import METHODS
from .records import Results, Run
from .tables import (
    ROUND,
    Rows,
    file_name,
    lengths,
    milliseconds_per_token,
    quartiles,
    row_title,
    rows,
    size,
    sources,
    synthetic_label,
)

# The palette is Okabe and Ito's, which the colour-blind can tell apart; what is not ours is grey.
_BLACK, _ORANGE, _SKY, _GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
_YELLOW, _BLUE, _RED, _PINK, _GREY = "#C7B400", "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"
#: A method has the same colour and marker in all plots.
STYLE = {
    "hf": (_GREY, "o"),
    "hf_assisted": (_GREY, "s"),
    "hf_lookup": (_GREY, "^"),
    "plain": (_BLACK, "o"),
    "plain_eager": (_BLACK, "s"),
    "standard": (_YELLOW, "o"),
    "flash_prefill": (_ORANGE, "s"),
    "tree_attention": (_RED, "^"),
    "streaming": (_SKY, "D"),
    "retrieval": (_BLUE, "o"),
    "eagle1": (_PINK, "s"),
    "eagle3": (_PINK, "o"),
    "longspec": (_GREEN, "o"),
    "ngram": (_GREEN, "^"),
    "self": (_SKY, "v"),
}
_PHASES = dict(zip(ROUND, (_SKY, _BLUE, _GREY, _ORANGE), strict=True))
_STROKES = {"eagle3": (0, (4, 1.5)), "eagle1": (0, (1, 1)), "longspec": (0, (6, 2))}
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "specextend",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
}


def write(folder: Path | str) -> list[Path]:
    """Write every plot that the results have something for.

    Returns:
        The files; none, and a line on standard error, where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        standard_error().line("no plots: they need matplotlib, pip install specextend[eval]")
        return []
    results, files = Results.read(folder), []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's own settings apart
        matplotlib.rcParams.update(_SETTINGS)
        for source in sources(results.runs):
            table = rows(run for run in results.runs if run.source == source)
            for stem, draw in _PLOTS.items():
                figure = draw(table, results, source)
                if figure is not None:
                    name = file_name(f"{stem}-{source}", results.header)
                    figure.draw_without_rendering()  # lays it out, once: labels stay where they are
                    figure.set_layout_engine("none")
                    files.append(Path(folder) / f"{name}.svg")
                    figure.savefig(files[-1], metadata={"Date": None, "Creator": None})
    return files


def _figure(width: float, height: float, title: str, results: Results, source: str):
    from matplotlib.figure import Figure

    parts = [title, results.header.target, f"{source} prompts", synthetic_label(results.header)]
    title = ", ".join(filter(None, parts))
    width = max(width, 0.3 + 0.075 * len(title))  # a letter is about as wide
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure


def _runs(table: Rows) -> Iterable[Run]:
    return (run for by_length in table.values() for runs in by_length.values() for run in runs)


def _stroke(method: str, draft: str | None):
    """Return the stroke of a line: solid, but for methods that go with several drafts."""
    known = METHODS.get(method)
    return _STROKES.get(draft, "-") if known is None or known.draft == "first" else "-"


# ---- speed and acceptance ------------------------------------------------------------------------


def _speed_and_acceptance(table: Rows, results: Results, source: str):
    """Draw tokens per second and acceptance length against the prompt's length."""
    if not table:
        return None
    figure = _figure(11, 4.6, "Speed and acceptance", results, source)
    columns = lengths(table)
    speed, acceptance = figure.subplots(1, 2)
    labels = _lines_by_length(speed, table, columns, lambda run: run.tokens_per_second)
    speculating = {
        key: by_length
        for key, by_length in table.items()
        if any(run.acceptance_rate_per_position for runs in by_length.values() for run in runs)
    }
    others = _lines_by_length(
        acceptance, speculating, columns, lambda run: run.mean_acceptance_length
    )
    speed.set_title("decoding, tokens per second")
    acceptance.set_title("emitted tokens per forward of the target")
    speed.set_ylim(bottom=0)
    acceptance.set_ylim(bottom=min(1.0, acceptance.get_ylim()[0]))
    figure.draw_without_rendering()  # how high the panels are
    _label_lines(speed, labels)
    _label_lines(acceptance, others)
    return figure


def _lines_by_length(
    axes, table: Rows, columns: Sequence[int], value: Callable[[Run], float]
) -> list[tuple[float, float, str, str]]:
    """Draw a line for each row of the table.

    Returns:
        y and x of each line's end, its name, its colour.
    """
    labels = []
    for (method, draft), by_length in table.items():
        color, marker = STYLE.get(method, (_GREY, "x"))
        spread = [quartiles(map(value, runs)) for runs in by_length.values()]
        low, middle, high = zip(*spread, strict=True)
        errors = [
            [m - x for m, x in zip(middle, low, strict=True)],
            [x - m for m, x in zip(middle, high, strict=True)],
        ]
        axes.errorbar(
            list(by_length), middle, yerr=errors if any(map(any, errors)) else None, color=color,
            marker=marker, linestyle=_stroke(method, draft), elinewidth=0.8, capsize=2,
        )  # fmt: skip
        labels.append((middle[-1], max(by_length), row_title(method, draft), color))
    _length_axis(axes, columns)
    return labels


def _length_axis(axes, columns: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(columns, list(map(size, columns)))
    axes.minorticks_off()
    axes.set_xlabel("tokens of the prompt")


def _label_lines(axes, labels: Iterable[tuple[float, float, str, str]]) -> None:
    """Write names at the right ends of lines, moved apart where they would overlap."""
    labels = sorted(labels)
    if not labels:
        return
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height / axes.figure.dpi * 72
    step = (high - low) * 10.5 / height  # a line of text
    places = [label[0] for label in labels]
    for _ in range(100):  # push neighbours apart, both ways
        for i in range(len(places) - 1):
            gap = step - (places[i + 1] - places[i])
            if gap > 1e-9:
                places[i] -= gap / 2
                places[i + 1] += gap / 2
    shift = max(0.0, low - places[0])
    for place, (y, x, name, color) in zip(places, labels, strict=True):
        axes.annotate(
            name, (x, y), (1.06, place + shift), xycoords="data",
            textcoords=axes.get_yaxis_transform(), color=color, va="center", fontsize=8,
            arrowprops=dict(
                arrowstyle="-", color=color, linewidth=0.5, relpos=(0, 0.5), shrinkA=1, shrinkB=4
            ),
        )  # fmt: skip
    axes.set_ylim(low, high)


# ---- phases --------------------------------------------------------------------------------------


def _phases(table: Rows, results: Results, source: str):
    """Draw where the time of a token goes: bars for each method, a panel for each length."""
    timed = {
        key: {n: [run for run in runs if run.seconds] for n, runs in by_length.items()}
        for key, by_length in table.items()
    }
    timed = {key: by_length for key, by_length in timed.items() if any(by_length.values())}
    if not timed:
        return None
    columns, names = lengths(timed), list(timed)
    figure = _figure(
        3.2 + 1.6 * len(columns), 1.4 + 0.24 * len(names), "Phases of a token", results, source
    )
    panels = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    for axes, length in zip(panels, columns, strict=True):
        left = [0.0] * len(names)
        for phase, color in _PHASES.items():
            widths = [
                quartiles(milliseconds_per_token(run, phase) for run in runs)[1] if runs else 0.0
                for runs in (timed[name].get(length) for name in names)
            ]
            axes.barh(range(len(names)), widths, 0.7, left, color=color, label=phase)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_title(f"prompt of {size(length)}")
        axes.tick_params(left=False)
        axes.spines["left"].set_visible(False)
    panels[0].set_yticks(range(len(names)), [row_title(*name) for name in names])
    panels[0].invert_yaxis()
    figure.supxlabel("milliseconds per new token", fontsize=9)
    handles, phases = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, phases, loc="outside right center", frameon=False, handlelength=1, handleheight=1
    )
    return figure


# ---- acceptance by position ----------------------------------------------------------------------


def _acceptance_by_position(table: Rows, results: Results, source: str):
    """Draw the share of rounds that accepted at least so many tokens, a panel for each length."""
    known: Rows = {}
    for key, by_length in table.items():
        for length, runs in by_length.items():
            runs = [run for run in runs if run.acceptance_rate_per_position]
            if runs:
                known.setdefault(key, {})[length] = runs
    if not known:
        return None
    columns = lengths(known)
    figure = _figure(2.2 + 2.1 * len(columns), 3.6, "Acceptance by position", results, source)
    panels = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    for axes, length in zip(panels, columns, strict=True):
        for (method, draft), by_length in known.items():
            rates = [run.acceptance_rate_per_position for run in by_length.get(length, ())]
            deepest = max(map(len, rates), default=0)
            middle = [
                quartiles(rate[i] if i < len(rate) else 0.0 for rate in rates)[1]
                for i in range(deepest)
            ]
            color, marker = STYLE.get(method, (_GREY, "x"))
            axes.plot(
                range(1, deepest + 1), middle, color=color, marker=marker,
                linestyle=_stroke(method, draft), label=row_title(method, draft),
            )  # fmt: skip
        axes.set_title(f"prompt of {size(length)}")
    panels[0].set_ylim(0, 1.02)
    panels[0].set_ylabel("share of rounds")
    deepest = max(len(run.acceptance_rate_per_position) for run in _runs(known))
    panels[0].set_xticks(range(1, deepest + 1, 1 + deepest // 10))
    figure.supxlabel("accepted tokens, at least", fontsize=9)
    handles = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False)
    return figure


# ---- chunks retrieved over time ------------------------------------------------------------------


def _retrieved_chunks(table: Rows, results: Results, source: str):
    """Draw what the draft sees of the context, from retrieval to retrieval, for the longest prompt
    of each method that retrieves."""
    shown = {}
    for key, by_length in table.items():
        runs = [run for runs in by_length.values() for run in runs if run.retrieved_chunks]
        if runs:
            shown[key] = max(runs, key=lambda run: (run.length, -run.repeat))
    if not shown:
        return None
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    chunk_size = (SpecConfig().replace(**results.header.settings.get("config", {}))).chunk_size
    figure = _figure(7.5, 0.8 + 2.4 * len(shown), "Chunks retrieved over time", results, source)
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (key, run) in zip(panels, shown.items(), strict=True):
        boxes = [
            Rectangle((i - 0.45, first * chunk_size), 0.9, (last - first) * chunk_size)
            for i, ids in enumerate(run.retrieved_chunks, 1)
            for first, last in _spans(ids)
        ]
        axes.add_collection(
            PatchCollection(boxes, color=STYLE.get(key[0], (_BLUE, ""))[0], lw=0.5, snap=False)
        )
        newest = max(ids[-1] for ids in run.retrieved_chunks) + 1
        axes.set_ylim(0, newest * chunk_size)
        step = 2 ** math.ceil(math.log2(newest * chunk_size / 6))
        ticks = range(0, newest * chunk_size + 1, step)
        axes.set_yticks(ticks, [size(tick) if tick else "0" for tick in ticks])
        axes.set_title(f"{row_title(*key)}, prompt of {size(run.length)}")
        axes.set_ylabel("place in the context")
        axes.xaxis.get_major_locator().set_params(integer=True)
    most = max(len(run.retrieved_chunks) for run in shown.values())
    panels[-1].set_xlim(0.4, most + 0.6)
    panels[-1].set_xlabel("retrieval")
    return figure


def _spans(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Return first and last + 1 of each unbroken stretch of ascending ids."""
    spans: list[tuple[int, int]] = []
    for chunk in ids:
        if spans and spans[-1][1] == chunk:
            spans[-1] = (spans[-1][0], chunk + 1)
        else:
            spans.append((chunk, chunk + 1))
    return spans


_PLOTS = {
    "speed-and-acceptance": _speed_and_acceptance,
    "phases": _phases,
    "acceptance-by-position": _acceptance_by_position,
    "retrieved-chunks": _retrieved_chunks,
}
