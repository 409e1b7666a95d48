"""Runs every method on every prompt, and writes down what came out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compat import CACHE
from ..config import SpecConfig
from ..context import Context
from ..decode import SpecExtend
from ..draft import Draft
from ..generation import Progress
from ..guard import check_length
from ..timing import Timed, logit_gap, parting, time_hugging_face, time_loop
from .memory import PeakMemory
from .methods import METHODS, REFERENCE, Method
from .needle import needle
from .options import Stage
from .prompts import Prompt
from .records import Difference, Run

LOOKUP_TOKENS = 10  # that Hugging Face's prompt look-up proposes; the value of its documentation
WARMUP_TOKENS = (256, 8)  # of the prompt, and new ones
WARMUP = "warming up"


@dataclass(frozen=True)
class Row:
    """Holds a method with its draft and, in a sweep, one option changed."""

    method: Method
    draft: str | None = None
    sweep: tuple[tuple[str, int], ...] = ()

    @property
    def key(self) -> tuple:
        """Return ``records.Run.row`` of its runs."""
        return self.method.key, self.draft, self.sweep

    @property
    def title(self) -> str:
        """Name it for people."""
        parts = [self.method.title.removeprefix("+ ")]
        if self.draft and self.method.draft == "first":
            parts.append(f"({self.draft})")
        return " ".join([*parts, *(f"{name}={value}" for name, value in self.sweep)])


def rows_of(stage: Stage, drafts: dict[str, Draft], device: str) -> list[Row]:
    """Return the rows that a stage asks for, the reference first.

    Args:
        drafts: by kind, the first one first.

    Raises:
        ValueError: a method that is not known, or a draft that is not there or does not know the
            method's cache.
    """
    wanted = [REFERENCE, *(name for name in stage.methods if name != REFERENCE)]
    rows: dict[tuple, Row] = {}
    for name in wanted:
        key, colon, kind = name.partition(":")
        method = METHODS.get(key)
        if method is None:
            raise ValueError(f"a method is one of {', '.join(METHODS)}, got {key!r}")
        if key == "plain_eager" and device != "cuda":
            raise ValueError("plain_eager differs from plain on a GPU only")
        if colon and method.draft != "first":
            raise ValueError(f"{name}: the draft of {key} cannot be chosen")
        row = Row(method, _draft_of(method, kind, drafts))
        rows[row.key] = row
        if method.draft is None or method.hugging_face:
            continue
        for field_name, values in stage.sweep.items():
            for value in values:
                row = Row(method, row.draft, ((field_name, value),))
                rows[row.key] = row
    return list(rows.values())


def _draft_of(method: Method, kind: str, drafts: dict[str, Draft]) -> str | None:
    """Kind of the draft that a method uses."""
    if method.draft is None:
        return None
    if method.draft == "first":
        if not drafts:
            raise ValueError(f"{method.key} needs a draft, and none was named")
        kind = kind or next(iter(drafts))
    else:
        kind = method.draft
    if kind not in drafts:
        raise ValueError(
            f"{method.key} needs a draft of the kind {kind}; there is {', '.join(drafts) or 'none'}"
        )
    cache = method.changes.get("draft_cache")
    if cache is not None and cache not in drafts[kind].cache_kinds:
        raise ValueError(
            f"{method.key} sets draft_cache={cache!r}, which a draft of the kind {kind} does not "
            f"know; its own row is {kind!r}"
        )
    return kind


@dataclass(frozen=True)
class Task:
    """Holds one run to be made."""

    prompt: Prompt
    row: Row
    repeat: int

    @property
    def key(self) -> tuple:
        """Return ``records.Run.key`` of what comes out."""
        prompt = self.prompt
        return prompt.length, prompt.source, prompt.name, *self.row.key, self.repeat

    @property
    def weight(self) -> float:
        """About how long it takes, in no unit; for the time that is left."""
        return self.prompt.length + 2048


def tasks_of(prompts: list[Prompt], rows: list[Row], runs: int) -> Iterator[Task]:
    """Order runs: the reference first, the others in another order each time, so that what
    else happens on the machine meets all of them."""
    reference, others = rows[0], rows[1:]
    for index, prompt in enumerate(prompts):
        for repeat in range(runs):
            turn = (index + repeat) % len(others) if others else 0
            for row in (reference, *others[turn:], *others[:turn]):
                yield Task(prompt, row, repeat)


@dataclass
class Runner:
    """Makes runs with one target.

    Attributes:
        target: the model.
        drafts: by kind.
        configs: what methods change, by kind of the draft; None: without one.
        new_tokens: to write.
        warmup: short runs of each row before its first.
        temperature: 0: greedy.
        seed: of sampling.
        make: ``SpecExtend`` or one of its kin.
        tokenizer: the target's, for stop strings that its checkpoint may bring; None: of random
            models.
        synthetic: see ``records.Run``.
        read_once: our methods go on from forks of one context, so that the target reads each prompt
            once; its time is that of the first of these runs.
    """

    target: PreTrainedModel
    drafts: dict[str, Draft]
    configs: dict[str | None, SpecConfig]
    new_tokens: int
    warmup: int = 1
    temperature: float = 0.0
    seed: int = 0
    make: Callable[..., SpecExtend] = SpecExtend
    synthetic: dict | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    read_once: bool = False
    _context: Context | None = field(default=None, init=False)
    _specs: dict[tuple, SpecExtend] = field(default_factory=dict, init=False)
    _warm: set[tuple] = field(default_factory=set, init=False)

    def __post_init__(self):
        self.memory = PeakMemory(self.target.device)

    def check(self, prompt: Prompt) -> None:
        """Refuse a prompt for which the target has too few positions."""
        try:
            check_length(self.target, len(prompt.ids), len(prompt.ids) + self.new_tokens)
        except ValueError as error:
            raise ValueError(f"prompts of {prompt.length:,} tokens: {error}") from error

    def run(self, task: Task, reference: list[int] | None, progress: Progress) -> Run:
        """Make a run.

        Args:
            reference: tokens that have to come out; None: this is the run that says so.
            progress: called as ``progress(phase, done, total)``.
        """
        row, prompt = task.row, task.prompt
        ids = torch.tensor([prompt.ids], device=self.target.device)
        if row.key not in self._warm:
            for done in range(self.warmup):
                progress(WARMUP, done, self.warmup)
                self._timed(row, ids[:, : WARMUP_TOKENS[0]], WARMUP_TOKENS[1], _nothing)
            self._warm.add(row.key)
        self.memory.start()
        context, read = None, 0.0
        if self.read_once and not row.method.hugging_face:
            context, read = self._read(ids, progress)
        timed = self._timed(row, ids, self.new_tokens, progress, context)
        peak = self.memory.peak()
        stats = timed.stats
        # Hugging Face draws its samples otherwise, and what is synthetic is drawn anyhow.
        comparable = not (row.method.hugging_face and self.temperature) and not self.synthetic
        difference = None
        if reference is not None and comparable:
            difference = self._difference(ids, timed.tokens, reference)
        emitted = len(timed.tokens) - timed.first
        if stats is not None:
            acceptance = stats.mean_acceptance_length
        else:
            acceptance = emitted / timed.rounds if timed.rounds else 1.0
        retrieves = stats is not None and row.draft and self._specs[row.key].draft.wants_scores
        return Run(
            length=prompt.length,
            prompt_tokens=len(prompt.ids),
            prompt=prompt.name,
            source=prompt.source,
            method=row.method.key,
            draft=row.draft,
            sweep=dict(row.sweep) or None,
            repeat=task.repeat,
            new_tokens=len(timed.tokens),
            prefill_seconds=read + timed.prefill if read or context is None else None,
            draft_prefill_seconds=stats.seconds.get("draft_prefill") if stats else None,
            decode_seconds=timed.decode,
            tokens_per_second=timed.rate,
            mean_acceptance_length=acceptance,
            acceptance_rate_per_position=stats.acceptance_rate_per_position if stats else [],
            rounds=timed.rounds,
            seconds=dict(stats.seconds) if stats else None,
            peak_memory_bytes=peak,
            exact=None if reference is None or not comparable else difference is None,
            first_difference=difference,
            retrieved_chunks=stats.retrieved_chunks if retrieves else None,
            needle=self._needle(task),
            synthetic=self.synthetic,
            tokens=timed.tokens if reference is None else None,
        )

    def config(self, row: Row) -> SpecConfig:
        """Return the options of a row.

        Raises:
            ValueError: they do not go together.
        """
        return self.configs[row.draft].replace(**row.method.changes, **dict(row.sweep))

    def _spec(self, row: Row, progress: Progress) -> SpecExtend:
        if row.key not in self._specs:
            config = self.config(row)
            draft = None if row.draft is None else self.drafts[row.draft].with_config(config)
            # Every run reads its whole prompt, also where the one before had the same.
            self._specs[row.key] = self.make(self.target, draft, config, keep_contexts=0)
        spec = self._specs[row.key]
        spec.progress = progress
        return spec

    def _read(self, ids: torch.Tensor, progress: Progress) -> tuple[Context, float]:
        """Return a context of a prompt [1, L] for one run, and the seconds that reading took; 0: it
        was there."""
        took = 0.0
        if self._context is None or not torch.equal(self._context.ids, ids.cpu()):
            self._context = None  # room for the next one
            spec = self.make(
                self.target, None, self.configs[None], progress=progress, keep_contexts=0
            )
            start = time.perf_counter()
            self._context = spec.read(ids, tokenizer=self.tokenizer)
            took = time.perf_counter() - start
        return self._context.fork(), took

    def _timed(
        self, row: Row, ids: torch.Tensor, new: int, progress: Progress,
        context: Context | None = None,
    ) -> Timed:  # fmt: skip
        options: dict = {"do_sample": self.temperature > 0, "tokenizer": self.tokenizer}
        if context is not None:
            options[CACHE] = context
        if self.temperature > 0:
            options["temperature"] = self.temperature
        if not row.method.hugging_face:
            spec = self._spec(row, progress)
            return time_loop(
                spec, ids, new, lambda _, done: progress("decoding", done, new), **options
            )
        torch.manual_seed(self.seed)
        if row.method.key == "hf_lookup":
            options["prompt_lookup_num_tokens"] = LOOKUP_TOKENS
        if row.draft is None:
            return time_hugging_face(self.target, ids, new, progress, **options)
        assistant = self.drafts[row.draft].causal_lm
        before = copy.deepcopy(assistant.generation_config)  # the assistance adapts it
        try:
            return time_hugging_face(
                self.target, ids, new, progress, assistant_model=assistant, **options
            )
        finally:
            assistant.generation_config = before

    def _difference(
        self, ids: torch.Tensor, tokens: list[int], reference: list[int]
    ) -> Difference | None:
        at = parting(tokens, reference)
        if at is None:
            return None
        return Difference(at, logit_gap(self.target, ids, tokens, reference))

    def _needle(self, task: Task):
        row, prompt = task.row, task.prompt
        asked = prompt.answer and not task.repeat and row.draft == "model" and not self.synthetic
        if not asked or row.method.hugging_face:
            return None
        draft = self._specs[row.key].draft
        total = len(prompt.ids) + len(prompt.answer)
        if draft.max_length is not None and total > draft.max_length:
            return None  # it does not see the answer, or not all of it
        return needle(self.target, draft, self.config(row), prompt.ids, prompt.answer)


def _nothing(phase: str, done: int, total: int) -> None:
    pass
