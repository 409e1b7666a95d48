"""Continues a document twice at once, plainly and with SpecExtend, as events for the page.

Both generations work on one model object, in one thread, round by round: the one that has decoded
for less time so far has the next round. So both columns get equal time, and each counts its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .. import __version__, assets
from ..config import SpecConfig
from ..decode import SpecExtend
from ..draft import WORDS, Draft
from ..errors import UsageError
from ..generation import Step
from ..guard import position_limit
from ..machine import device_text
from ..pair import Pair
from ..stats import PHASES
from ..terminal import Detokenizer, dtype_name, gap, last_lines, size_text
from ..timing import Timed, difference, timed_steps
from .conversation import Conversation

MAX_CHARS = 1_000_000  # of a text that a page may send
LENGTH = 8_000  # tokens of an included document, unless somebody says otherwise
# Fields of SpecConfig that the page has a switch for.
SWITCHES = ("draft_cache", "tree_shape", "tree_nodes", "tree_attention", "budget", "gate")
NAMES = {
    "model": "a small model",
    "eagle3": "EAGLE-3 head",
    "longspec": "LongSpec block",
    "ngram": "n-gram look-up",
    "self": "the target itself",
}

Emit = Callable[[dict], None]


class Order(BaseModel):
    """Says what a page asks for.

    Attributes:
        conversation: key of the one that ``instruction`` goes on with, of whose document the next
            two say nothing; None: a new one.
        document: key of an included document, of which ``length`` tokens are used; None: ``text``.
        text: a document of the page's own, all of which is used.
        instruction: stands behind the document or the conversation, or goes with them into the chat
            template.
        new_tokens: to write.
        temperature: 0: greedy; above: both columns sample, with the same noise.
        draft: key of a draft; the fields below are those of :class:`SpecConfig`.
    """

    model_config = ConfigDict(extra="forbid")

    conversation: str | None = None
    document: str | None = None
    length: int = Field(LENGTH, ge=2)
    text: str = Field("", max_length=MAX_CHARS)
    instruction: str = Field("", max_length=MAX_CHARS)
    new_tokens: int = Field(256, ge=1, le=4096)
    temperature: float = Field(0.0, ge=0, le=10)
    draft: str
    draft_cache: Literal["full", "window", "retrieval"]
    tree_shape: Literal["opt", "top_k", "fixed"]
    tree_nodes: int = Field(ge=1, le=256)
    tree_attention: bool
    budget: int = Field(ge=1)
    gate: Literal["auto", "off"]


class Stopped(Exception):
    """Says that nobody wants the rest."""


@dataclass
class _Source:
    """Holds a draft on offer.

    Attributes:
        draft: what ``SpecExtend`` takes: a path, a word, or a model, once it is loaded.
        tokenizer: its own, if it brings one.
        error: why it cannot be used.
        spec: the last loop made with it.
        caches: values of ``draft_cache`` that it can be used with.
    """

    draft: object
    tokenizer: object = None
    error: str | None = None
    spec: SpecExtend | None = None
    caches: tuple[str, ...] = ()


class Column:
    """Runs one of the two generations.

    Attributes:
        timed: what it wrote and took so far; other columns' rounds do not count.
        steps: its stream.
        over: nothing more comes.
    """

    def __init__(self, name: str, spec: SpecExtend, tokenizer, ids: Tensor, options: dict):
        self.name, self.spec = name, spec
        self.timed = Timed()
        self.over = False
        self.steps: Iterator[Step] = spec.stream(ids, **options)
        self._timed_steps = timed_steps(self.steps)
        self._retrievals = 0
        self._tokenizer, self._prompt = tokenizer, ids[0].tolist()
        self._text = Detokenizer(tokenizer)

    def round(self) -> dict | None:
        """Run the next round, and tell of it; None if there was none."""
        step, took = next(self._timed_steps, (None, 0.0))
        if step is None:
            self.over = True
            return None
        timed, stats, first = self.timed, self.spec.stats, not self.timed.tokens
        timed.stats = stats
        timed.add(step, took)
        event = {
            "event": "round",
            "column": self.name,
            "pieces": [self._text.add(token) for token in step.tokens],
            "accepted": step.num_accepted,
            "rate": timed.rate,
            "acceptance": stats.mean_acceptance_length,
        }
        if first:
            event["gap"] = gap(self._tokenizer, self._prompt, step.tokens)
            event["cached"] = stats.num_cached_tokens
        if len(stats.retrieved_ids) > self._retrievals:
            self._retrievals = len(stats.retrieved_ids)
            event["chunks"] = [i for i in stats.retrieved_ids[-1][0].tolist() if i >= 0]
        return event

    def result(self) -> dict:
        """Return what it came to."""
        stats = self.spec.stats
        return {
            "tokens": self.timed.tokens,
            "tail": self._text.end(),  # bytes that no token completed
            "rate": self.timed.rate,
            "acceptance": stats.mean_acceptance_length,
            "accepted": stats.num_accepted_tokens,
            "seconds": {phase: stats.seconds.get(phase) for phase in PHASES},
        }


class Race:
    """Has models, drafts and documents for one pair of generations at a time.

    Args:
        pair: the models.
        config: options that the page has no switch for.
        draft: the draft's name.
        embedded: the pair is the embedded one, whose other drafts are on offer, too.
        document: a file to include.
        length, new_tokens: what the page begins with.

    Raises:
        ValueError: the models are not to be used.
    """

    def __init__(
        self,
        pair: Pair,
        config: SpecConfig,
        draft: str,
        *,
        embedded: bool,
        document: str | None,
        length: int,
        new_tokens: int,
    ):
        if pair.draft is None:
            raise UsageError("the demonstration needs a draft")
        self.config, self.draft, self.length, self.new_tokens = config, draft, length, new_tokens
        self.target, self.tokenizer = pair.target, pair.tokenizer
        sources = {draft: _Source(pair.draft, pair.draft_tokenizer)}
        if embedded:
            sources = {kind: _Source(kind) for kind in assets.DRAFTS} | sources
        self._sources = sources | {word: _Source(word) for word in WORDS}
        for kind in self._sources:
            self._try(kind)
        if error := self._sources[self.draft].error:
            raise ValueError(error)
        # Both keep what they read, for the next question.
        self._plain = self._last = SpecExtend(self.target, None, self.config)
        self._conversation: Conversation | None = None
        self._documents = self._included(document)

    # ---- what is on offer ------------------------------------------------------------------------

    def _try(self, kind: str) -> None:
        """Load a draft, and note what it can do or why it cannot be used."""
        source = self._sources[kind]
        if source.draft in assets.DRAFTS:
            try:
                source.draft = assets.draft_path(source.draft)
            except ValueError as error:
                source.error = str(error)
                return
        try:
            config = self.config.replace(draft_cache="retrieval")
            source.caches = self._spec(kind, config).draft.cache_kinds
        except (ValueError, OSError, ImportError) as error:
            source.error = str(error)

    def _spec(self, kind: str, config: SpecConfig) -> SpecExtend:
        """Make a loop with a draft of this kind; weights that are there are not read again."""
        source = self._sources[kind]
        if source.spec is None or source.spec.config != config:
            draft = source.draft if source.spec is None else source.spec.draft.with_config(config)
            source.spec = SpecExtend(
                self.target, draft, config,
                tokenizer=self.tokenizer, draft_tokenizer=source.tokenizer,
            )  # fmt: skip
        return source.spec

    def _included(self, file: str | None) -> dict[str, tuple[str, Callable[[int], list[int]]]]:
        """Return, by key, name of a document and what gives its tokens, so many at most."""
        found = {}

        def add(key: str, name: str, text: str) -> None:
            found[key] = (name, lambda tokens: self.tokenizer(text).input_ids[:tokens])

        if file is not None:
            add("file", Path(file).name, Path(file).read_text(encoding="utf-8"))
        texts = assets.held_out_documents()
        if texts:
            found["demonstration"] = (
                f"{texts[0][0]}, to where it begins to repeat itself",
                lambda tokens: assets.demo_prompt(self.tokenizer, tokens)[1],
            )
        for name, text in texts:
            add(name, name, text)
        return found

    def offer(self) -> dict:
        """Say what a page has to know to show its switches."""
        names = {kind: NAMES.get(kind, kind) for kind in self._sources}
        return {
            "version": __version__,
            "target": f"{size_text(self.target.num_parameters())}, {dtype_name(self.target)}",
            "machine": device_text(self.target.device),
            "positions": position_limit(self.target),
            "has_template": bool(self.tokenizer.chat_template),
            "documents": {key: name for key, (name, _) in self._documents.items()},
            "drafts": {
                kind: {"name": names[kind], "caches": source.caches, "error": source.error}
                for kind, source in self._sources.items()
            },
            "max_chars": MAX_CHARS,
            "defaults": {
                "document": next(iter(self._documents), None),
                "length": self.length,
                "new_tokens": self.new_tokens,
                "temperature": 0,
                "draft": self.draft,
                **{name: getattr(self.config, name) for name in SWITCHES},
            },
        }

    # ---- a race ----------------------------------------------------------------------------------

    def run(self, order: Order, emit: Emit, stop: threading.Event) -> dict:
        """Continue a document or a conversation in both ways.

        Args:
            emit: called with each event but the last; the first is "start".
            stop: set by another thread, ends it before the next round.

        Returns:
            The last event, "done"; by then the models are free.

        Raises:
            ValueError: an order that cannot be met, before the first event.
        """
        conversation = self._conversation_of(order)
        ids = torch.tensor([conversation.ask(order.instruction)], device=self.target.device)
        options: dict = {
            "max_new_tokens": order.new_tokens,
            "do_sample": order.temperature > 0,
            "tokenizer": self.tokenizer,
        }
        if order.temperature:
            options["temperature"] = order.temperature
        seed = int(torch.randint(1 << 31, ()))
        columns: list[Column] = []

        def column(name: str, spec: SpecExtend) -> Column:
            def progress(phase: str, done: int, total: int) -> None:
                emit({"event": "prefill", "column": name, "done": done, "total": total})
                if stop.is_set():
                    raise Stopped

            spec.progress = progress
            noise = torch.Generator().manual_seed(seed)
            return Column(name, spec, self.tokenizer, ids, {**options, "generator": noise})

        try:
            columns.append(column("plain", self._plain))
            columns.append(column("spec", self._drafting(order)))
            self._make_equal(conversation, columns[1].spec)
            emit(self._start(order, ids, columns[1].spec.draft))
            try:
                self._take_turns(columns, emit, stop)
            except Stopped:
                pass
            return self._done(columns, conversation)
        finally:
            for each in columns:
                each.steps.close()

    def _conversation_of(self, order: Order) -> Conversation:
        """Return the conversation that goes on, or a new one about the document."""
        if order.conversation is not None:
            if self._conversation is None or order.conversation != self._conversation.key:
                raise ValueError("This conversation has made room for another; generate anew.")
            return self._conversation
        if order.document is None:
            ids = self.tokenizer(order.text).input_ids if order.text.strip() else []
        elif order.document not in self._documents:
            raise ValueError(f"there is no document {order.document!r}")
        else:
            ids = self._documents[order.document][1](order.length)
        return Conversation(self.tokenizer, ids)

    def _make_equal(self, conversation: Conversation, spec: SpecExtend) -> None:
        """Have both loops begin alike: with what both kept of the conversation, or with nothing."""
        if conversation is not self._conversation or spec is not self._last:
            for loop in (self._plain, self._last, spec):
                loop.forget()
        self._conversation, self._last = conversation, spec

    def _drafting(self, order: Order) -> SpecExtend:
        source = self._sources.get(order.draft)
        if source is None:
            raise ValueError(f"there is no draft {order.draft!r}, only {', '.join(self._sources)}")
        if source.error:
            raise ValueError(f"The draft {order.draft!r} cannot be used: {source.error}")
        switches = {name: getattr(order, name) for name in SWITCHES}
        if len(source.caches) == 1:  # the switch means nothing to it
            switches["draft_cache"] = source.caches[0]
        return self._spec(order.draft, self.config.replace(**switches))

    def _start(self, order: Order, ids: Tensor, draft: Draft) -> dict:
        prompt, size = ids[0].tolist(), self.config.chunk_size
        decode = self.tokenizer.decode
        return {
            "event": "start",
            "prompt_tokens": len(prompt),
            "new_tokens": order.new_tokens,
            "parameters": draft.num_parameters,
            "retrieves": draft.wants_scores,
            "budget": order.budget,
            "chunk_size": size,
            "chunks": [decode(prompt[i : i + size]) for i in range(0, len(prompt), size)],
            "tail": last_lines(self.tokenizer, prompt),
        }

    @staticmethod
    def _take_turns(columns: list[Column], emit: Emit, stop: threading.Event) -> None:
        running = list(columns)
        while running:
            # Prefills first, one behind the other; then whoever has had less time.
            column = min(running, key=lambda each: (bool(each.timed.tokens), each.timed.decode))
            event = column.round()
            if event is None:
                running.remove(column)
            else:
                emit(event)
            if stop.is_set():
                raise Stopped

    def _done(self, columns: list[Column], conversation: Conversation) -> dict:
        plain, spec = (each.timed.tokens for each in columns)
        stopped = not all(each.over for each in columns)
        if stopped:  # what both have
            common = min(len(plain), len(spec))
            plain, spec = plain[:common], spec[:common]
        return {
            "event": "done",
            "stopped": stopped,
            "difference": difference(self.tokenizer, spec, plain, "plain decoding"),
            "conversation": conversation.key,
            "answer": conversation.add(plain) if plain else None,  # the target's own, if they part
            "columns": {each.name: each.result() for each in columns},
        }
