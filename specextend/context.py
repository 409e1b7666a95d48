"""Keeps texts that have been read, so that one which begins in the same way is read from there on.

A :class:`Context` holds the tokens of a text, the target's cache of them, and what the draft keeps.
A generation takes it in, forgets what its prompt does not have, reads the rest, and leaves what it
has come to. A :class:`Shelf` holds those of the last generations.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from . import context_file
from .cache import KVCache, Pass
from .compat import num_cached
from .config import SpecConfig
from .draft import Draft
from .draft.base import Kept
from .longrope import factors
from .target import Target, identity


class Context:
    """Holds a text that has been read: its tokens, and what target and draft keep of them. Batch 1.

    Made by :meth:`SpecExtend.read` and :meth:`SpecExtend.load_context`, and returned by
    ``generate(return_dict_in_generate=True)``; it is given back as
    ``generate(..., past_key_values=)``, with the whole text as the prompt, and goes along with what
    is written. A prompt may leave the text at any token.

    Attributes:
        cache: the target's; None: nothing has been read.
        drafted: what the draft kept (:meth:`Draft.keep`).
    """

    def __init__(self):
        # Of the SpecExtend that it was last used by, for a file.
        self._owner: tuple[Target, Draft | None, SpecConfig] | None = None
        self.clear()
        self._in_use = threading.Lock()

    @property
    def ids(self) -> Tensor:
        """Return [1, n] int64 on the host, the tokens that have been read or written."""
        return self._text[None, : self.get_seq_length()]

    def get_seq_length(self) -> int:
        """Count the tokens, as a cache of `transformers` does."""
        return 0 if self.cache is None else self.cache.length

    def clear(self) -> None:
        """Forget the text."""
        # All that the cache has, and perhaps one token more, which is decided.
        self._text = torch.zeros(0, dtype=torch.int64)
        self.cache: KVCache | None = None
        self.drafted: Kept | None = None
        self._draft: Draft | None = None
        self._weights: int | None = None
        self._num_whole = 0

    @classmethod
    def of(cls, cache: Cache, target: Target, prompt: Tensor) -> Context:
        """Copy a cache of `transformers`.

        Args:
            cache: of the target, with the tokens that the prompt begins with.
            prompt: [1, L] int64.

        Raises:
            ValueError: the cache is not one of all of these tokens and of this target.
        """
        length, made = num_cached(cache), cls()
        if length > prompt.shape[1]:
            raise ValueError(
                f"the cache has {length} tokens and the prompt {prompt.shape[1]}: the prompt is "
                "wanted whole, with those that the cache has"
            )
        with torch.inference_mode():
            made.cache = target.make_cache(length)
            state = Pass(made.cache, [(made.cache, made.cache.lens)], 1)
            target.read(prompt[:, :1], torch.zeros_like(prompt[:, :1]), state)  # allocates
            made.cache.take_in(cache, length)
        made.cache.rotary_length = length
        made._text, made._weights = prompt[0, :length].cpu(), target.fingerprint()
        return made

    @classmethod
    def load(
        cls, path: str | os.PathLike, target: Target, draft: Draft | None, config: SpecConfig
    ) -> Context:
        """Read what :meth:`save` has written, by a :class:`SpecExtend` of the same models.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is no such file, or cut, or target, draft or what else its rows depend on
                are others.
        """
        said, read = context_file.read(path, target.device)
        _compare(path, said, _describe(target, draft, config))
        parts = read()
        made = cls()
        made.belong_to(target, draft, config)
        made.cache = target.make_cache(parts["cache"]["length"])
        made.cache.take_parts(parts["cache"])
        made._text, made._num_whole = parts["text"].cpu(), parts["num_whole"]
        made._draft, made._weights = draft, target.fingerprint()
        if parts["drafted"] is not None:
            made.drafted = draft.kept_from(parts["drafted"])
        return made

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a file, for :meth:`SpecExtend.load_context`. A file that is there already is
        whole until it is replaced.

        Raises:
            RuntimeError: a generation has it.
            ValueError: it has no text, or the target's weights are others than those that read it.
        """
        with self.in_use():
            if not self.get_seq_length():
                raise ValueError("the context has no text yet: there is nothing to save")
            target, draft, config = self._owner
            if self._weights != target.fingerprint():
                raise ValueError(
                    "the target's weights have changed since the context was read: no file can say "
                    "whose it is"
                )
            drafted = self.drafted if draft is self._draft else None
            parts = {
                "text": self._text,
                "num_whole": self._num_whole,
                "cache": self.cache.parts(),
                "drafted": None if drafted is None else drafted.parts(),
            }
            context_file.write(path, _describe(target, draft, config), parts)

    def belong_to(self, target: Target, draft: Draft | None, config: SpecConfig) -> None:
        """Note whose it is, which a file of it will say."""
        self._owner = target, draft, config

    @property
    def num_bytes(self) -> int:
        """Count the bytes that target and draft keep."""
        target = 0 if self.cache is None else self.cache.num_bytes
        return target + (0 if self.drafted is None else self.drafted.num_bytes)

    @property
    def is_free(self) -> bool:
        """Tell whether no generation has it."""
        return not self._in_use.locked()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Have it alone for a ``with`` block.

        Raises:
            RuntimeError: another generation has it.
        """
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError(
                "this context is in the middle of a generation; finish or close that stream first, "
                "or go on from a fork that was made before it"
            )
        try:
            yield
        finally:
            self._in_use.release()

    def common(self, prompt: Tensor) -> int:
        """Count the tokens that the text and a prompt [1, L] begin with, but for the prompt's last
        one, which is always run."""
        count = min(len(self._text), prompt.shape[1] - 1)
        same = self._text[:count] == prompt[0, :count].cpu()
        return count if bool(same.all()) else int(same.int().argmin())

    def open(
        self, target: Target, draft: Draft | None, config: SpecConfig, prompt: Tensor, rows: int
    ) -> tuple[KVCache, int, int]:
        """Go back to where a prompt leaves the text.

        Args:
            target, draft, config: of the generation.
            prompt: [1, L] int64.
            rows: that the target's cache is to have at least.

        Returns:
            The cache; the tokens of the prompt that are in it; those that were in the text, as many
            or more, of which the draft may know more than the target.
        """
        common = self.common(prompt)
        if common and not self._holds(target, prompt.shape[1]):
            common = 0
        start = min(common, self.cache.length if common else 0)
        if config.exact:
            # A row that was read in another part of the text, or not exactly, may have other bits.
            chunk = config.prefill_chunk or prompt.shape[1]
            alike = self._owner is not None and _reading(self._owner[2]) == _reading(config)
            start = common = min(start, self._num_whole if alike else 0) // chunk * chunk
        if draft is not self._draft:
            self.drafted = None
        if start and draft is not None:
            start = draft.reusable(self.drafted, start)
        if start:
            start = self.cache.go_back(start)
        if not start:
            self.clear()
            self.cache, common = target.make_cache(rows), 0
        self.cache.reserve(rows)
        self.cache.rotary_length = prompt.shape[1]
        self._text = self._text[:start]  # all that is true of the cache until it is left again
        return self.cache, start, common

    def _holds(self, target: Target, length: int) -> bool:
        """Tell whether what is kept is what a text of ``length`` tokens would have."""
        model = target.model
        alike = factors(model, self.cache.rotary_length) == factors(model, length)
        return alike and self._weights == target.fingerprint()

    def leave(
        self, target: Target, draft: Draft | None, ids: Tensor, num_read: int, drafted: Kept | None,
        sound: bool,
    ) -> None:  # fmt: skip
        """Note what a generation has come to.

        Args:
            target: with the weights that it has now.
            draft: that had a part in it.
            ids: [n] int64, the text: all that the cache has, and the token behind that, if it is
                decided.
            num_read: tokens of the prompt that were read in parts of ``prefill_chunk``, from its
                beginning on.
            drafted: what the draft keeps.
            sound: False: it was broken off in the middle of a call.
        """
        length = self.cache.go_back(self.cache.length, sound)
        self.cache.mark()
        self._text, self._draft, self.drafted = ids[: length + 1].cpu(), draft, drafted
        self._num_whole, self._weights = min(num_read, length), target.fingerprint()

    def share(self) -> None:
        """Be ready for forks."""
        for kept in (self.cache, self.drafted):
            if kept is not None:
                # A fork says so again, or there is room by then.
                with contextlib.suppress(torch.OutOfMemoryError):
                    kept.share()

    def fork(self) -> Context:
        """Return another context of the same text, which goes on by itself.

        On Linux, on the host, and on a GPU whose memory can be mapped, both see the same memory up
        to here, and the text is not copied; but once, by the first fork of one that
        :meth:`SpecExtend.read` has not made.

        Raises:
            RuntimeError: a generation has this one.
            torch.OutOfMemoryError: the GPU has no memory left for it. This one is what it was.
        """
        made = Context()
        with self.in_use(), torch.inference_mode():
            made._text, made._draft, made._owner = self._text, self._draft, self._owner
            made._num_whole, made._weights = self._num_whole, self._weights
            made.cache = None if self.cache is None else self.cache.fork()
            made.drafted = None if self.drafted is None else self.drafted.fork()
        return made


def _describe(target: Target, draft: Draft | None, config: SpecConfig) -> dict:
    """Say, as plain data, what the rows of a context depend on."""
    said = {
        "target": identity(target.model),
        "draft": {"kind": "none"} if draft is None else draft.identity(),
        "reading": _reading(config),
    }
    return json.loads(json.dumps(said, default=str))


def _reading(config: SpecConfig) -> dict:
    """Say how a text is read, where rows of other bits matter: for exact text."""
    return {"exact": config.exact, "prefill_chunk": config.exact and config.prefill_chunk}


#: what is to be said of a file that is of another
_ANOTHER = {
    "target": "is of another target",
    "draft": "is of another draft",
    "reading": "was read in another way",
}


def _compare(path: str | os.PathLike, there: dict, here: dict) -> None:
    """Refuse a file that is of others.

    Raises:
        ValueError: with the first thing that differs.
    """
    for role, words in _ANOTHER.items():
        got, wanted = dict(_leaves(there[role])), dict(_leaves(here[role]))
        for name in {**wanted, **got}:
            if got.get(name) != wanted.get(name):
                raise ValueError(
                    f"the context in {path} {words}: {name} is {got.get(name)!r} there and "
                    f"{wanted.get(name)!r} here"
                )


def _leaves(data: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield what is in nested dicts, by names with dots."""
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


class Shelf:
    """Holds the contexts of the last generations.

    Args:
        count: contexts at most.
        num_bytes: of all of them at most; None: any number.
    """

    def __init__(self, count: int, num_bytes: int | None = None):
        if count < 0:
            raise ValueError(f"keep_contexts must not be negative, got {count}")
        if num_bytes is not None and num_bytes < 0:
            raise ValueError(f"keep_bytes must not be negative, got {num_bytes}")
        self.count, self.num_bytes = count, num_bytes
        self._contexts: list[Context] = []  # the one that was used last is the last one

    def take(self, prompt: Tensor) -> Context:
        """Take the context to go on from with a prompt [1, L], or a new one.

        It is the one that begins most like the prompt; or, where that would lose more than it has
        in common with the prompt, a fork of it, if another one can be kept.
        """
        free = [context for context in self._contexts if context.is_free]
        best = max(free, key=lambda c: c.common(prompt), default=None)
        common = 0 if best is None else best.common(prompt)
        if common and (len(best._text) <= 2 * common or self.count == 1):
            self._contexts.remove(best)
            return best
        del self._contexts[: len(self._contexts) + 1 - self.count]  # room for the new one
        return best.fork() if common else Context()

    def put(self, context: Context) -> None:
        """Keep a context, as the one that was used last."""
        self._contexts.append(context)
        while len(self._contexts) > self.count or self._is_over():
            del self._contexts[0]

    def _is_over(self) -> bool:
        total = sum(context.num_bytes for context in self._contexts)
        return self.num_bytes is not None and total > self.num_bytes

    def clear(self) -> None:
        """Forget all of them."""
        self._contexts.clear()
