"""Defines the records that ``specextend eval`` writes down and reads again.

``results.jsonl`` in the output folder holds JSON Lines: a header, then a line for each run, written
as soon as the run is over. Lengths are tokens, times seconds, memory bytes.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FILE = "results.jsonl"


@dataclass(frozen=True)
class Header:
    """Says where, when and how the runs were made.

    Attributes:
        version, machine, torch, transformers, python, commit, command, device, threads, date: see
            ``specextend.machine.header``.
        target: name of the target.
        drafts: name of each draft by its kind.
        dtype: that of the models, without "torch.".
        seed: that of prompts and of sampling.
        settings: what else decides about the runs: ``stages`` (each an ``options.Stage`` as a dict:
            sources, lengths, count, methods, sweep, runs), ``new_tokens``, ``warmup``,
            ``temperature``, ``documents`` (that prompts are made of, or None), ``config`` (fields
            of SpecConfig that are not at their defaults), ``preset`` (name or None), ``synthetic``
            (as in a run), ``read_once`` (see ``run.Runner``).
        peak_memory: what ``peak_memory_bytes`` is: ``"cuda"``, the most that torch's allocator had
            given out during the run, weights of all loaded models included, but not rows that forks
            share; ``"resident"``, the most memory that the process had, all of it included; None:
            not measured here.
    """

    version: str
    machine: dict
    torch: str
    transformers: str
    python: str
    commit: str | None
    command: str
    device: str
    threads: int
    date: str
    target: str
    drafts: dict[str, str]
    dtype: str
    seed: int
    settings: dict
    peak_memory: str | None


@dataclass(frozen=True)
class Difference:
    """Says where a run's tokens part from those of the reference run.

    Attributes:
        at: index among the new tokens.
        gap: how far apart the target sees the two tokens there, |difference of their logits|; None
            where one text only ends earlier.
    """

    at: int
    gap: float | None


@dataclass(frozen=True)
class Needle:
    """Says what the draft itself makes of an answer that stands far above.

    Attributes:
        accuracy: share of the answer's tokens that are the draft's first choice, the answer's own
            tokens standing before them.
        perplexity: that of the answer.
    """

    accuracy: float
    perplexity: float


@dataclass(frozen=True)
class Run:
    """Records one generation.

    ``method``, ``draft`` and ``sweep`` together say what ran, see :attr:`row`: a method can be run
    with several drafts, and with options swept.

    Attributes:
        length: nominal tokens of the prompt.
        prompt_tokens: its actual tokens.
        prompt: name of the prompt.
        source: where the prompt is from: ``"jsonl"``, ``"folder"``, ``"joined"``, ``"needle"``,
            ``"lookup"``, ``"code"``; ``"random"`` for synthetic runs.
        method: key in ``methods.METHODS``.
        draft: kind of the draft: ``"model"``, ``"eagle1"``, ``"eagle3"``, ``"longspec"``,
            ``"ngram"``, ``"self"``; None without.
        sweep: fields of the configuration that were changed for a sweep; None outside of one.
        repeat: which run of the same row and prompt it is, from 0.
        new_tokens: how many were written.
        prefill_seconds: the target's, first token included; None: another run had read the prompt.
        draft_prefill_seconds: the draft's; None without a draft, and for Hugging Face's own.
        decode_seconds: time from the first token to the last.
        tokens_per_second: speed of decoding.
        mean_acceptance_length: emitted tokens per forward of the target.
        acceptance_rate_per_position: share of rounds that accepted at least 1, 2, ... tokens.
        rounds: forwards of the target after the first token.
        seconds: time by phase, see ``specextend.stats.PHASES``; None for Hugging Face's own.
        peak_memory_bytes: see ``Header.peak_memory``.
        exact: whether the tokens are those of the reference run; None where there is none, or for
            it.
        first_difference: where they part, if they do.
        retrieved_chunks: ids of each retrieval; None for methods that do not retrieve.
        needle: for prompts with an answer, first repeat, drafts that are models; else None.
        synthetic: how drafts were imitated, ``{"acceptance": x}``; None for real ones.
        tokens: what was written; kept for the reference run of a prompt, else None.
    """

    length: int
    prompt_tokens: int
    prompt: str
    source: str
    method: str
    draft: str | None
    sweep: dict | None
    repeat: int
    new_tokens: int
    prefill_seconds: float | None
    draft_prefill_seconds: float | None
    decode_seconds: float
    tokens_per_second: float
    mean_acceptance_length: float
    acceptance_rate_per_position: list[float]
    rounds: int
    seconds: dict[str, float] | None
    peak_memory_bytes: int | None
    exact: bool | None
    first_difference: Difference | None = None
    retrieved_chunks: list[list[int]] | None = None
    needle: Needle | None = None
    synthetic: dict | None = None
    tokens: list[int] | None = None

    @property
    def row(self) -> tuple:
        """Return what the runs of one row of a table share: method, draft, swept fields."""
        return self.method, self.draft, tuple(sorted((self.sweep or {}).items()))

    @property
    def key(self) -> tuple:
        """Return what no two runs share."""
        return self.length, self.source, self.prompt, *self.row, self.repeat


_KINDS = {"header": Header, "run": Run}


def to_json(record: Header | Run) -> str:
    """Return a record as one line, without its end."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(record, cls))
    return json.dumps({"type": kind, **asdict(record)})


def from_json(line: str) -> Header | Run:
    """Read what :func:`to_json` wrote.

    Raises:
        ValueError: it is something else.
    """
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a line of JSON: {error}") from None
    kind = _KINDS.get(data.pop("type", None)) if isinstance(data, dict) else None
    if kind is None:
        raise ValueError('not a record: "type" must be "header" or "run"')
    names = {field.name for field in fields(kind)}
    if wrong := sorted(names ^ set(data)):
        raise ValueError(f"not a {kind.__name__.lower()} of this version: {', '.join(wrong)}")
    if kind is Run:
        for name, cls in (("first_difference", Difference), ("needle", Needle)):
            if data[name] is not None:
                data[name] = cls(**data[name])
    return kind(**data)


@dataclass
class Results:
    """Holds all that a folder's file has."""

    header: Header
    runs: list[Run]

    @staticmethod
    def read(folder: Path | str) -> Results:
        """Read ``results.jsonl``.

        A last line without its end does not count: its run was interrupted while it was written
        down.

        Raises:
            ValueError: the file is not one of ours; the line is named.
            FileNotFoundError: there is none.
        """
        file = Path(folder) / FILE
        records = []
        for number, line in enumerate(_whole_lines(file), 1):
            try:
                records.append(from_json(line))
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from None
        headers = [isinstance(record, Header) for record in records]
        if not records or headers != [True] + [False] * (len(records) - 1):
            raise ValueError(f"{file} must begin with a header, and have one only")
        return Results(records[0], records[1:])


def _whole_lines(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield line


class Writer:
    """Adds lines to ``results.jsonl``, each of them on disk when ``write`` returns."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / FILE
        if file.exists():  # drop what an interruption left half written
            whole = sum(len(line.encode()) for line in _whole_lines(file))
            with file.open("r+b") as out:
                out.truncate(whole)
        self._out: typing.TextIO = file.open("a", encoding="utf-8", newline="\n")

    def write(self, record: Header | Run) -> None:
        """Append a record as one line, which is in the file when this returns."""
        self._out.write(to_json(record) + "\n")
        self._out.flush()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_) -> None:
        self._out.close()
