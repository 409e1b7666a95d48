"""Shows what the commands have to show: text as it is written, progress, tables.

Text goes to standard output, progress and remarks to standard error. Escape codes are written to
terminals only, and none for looks where NO_COLOR is set or the terminal is dumb.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

_CODES = {"accepted": "32", "own": "33", "bold": "1", "dim": "2"}
# Control characters that a model may write, but that are not for a terminal to obey.
_HARMLESS = {c: "\ufffd" for c in (*range(32), *range(127, 160)) if c not in (9, 10)}


class Output:
    """Writes to a stream what it can show, and "?" for characters that its encoding lacks."""

    def __init__(self, stream: TextIO):
        self.console = Console(file=stream, highlight=False)
        self.is_terminal = self.console.is_terminal
        self.is_live = self.is_terminal and not self.console.is_dumb_terminal
        self.has_style = self.is_live and not self.console.no_color
        self.width = self.console.width if self.is_terminal else None
        self._stream, self._encoding = stream, getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str, style: str | None = None) -> None:
        """Write ``text`` as it is, at once; ``style`` is a key of ``_CODES``."""
        if self.is_terminal:
            text = text.translate(_HARMLESS)
        text = text.encode(self._encoding, "replace").decode(self._encoding)
        if style and self.has_style and text:
            text = f"\x1b[{_CODES[style]}m{text}\x1b[0m"
        self._stream.write(text)
        self._stream.flush()

    def line(self, text: str = "", style: str | None = None) -> None:
        """Write text and end the line."""
        self.write(text, style)
        self.write("\n")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write aligned columns, the first to the left, the others to the right; lying on its side
        where the terminal is too narrow."""
        lines, top = _grid(header, rows)
        if self.width is not None and max(map(len, lines)) > self.width:
            turned = list(zip(header, *rows, strict=True))
            lines, top = _grid(turned[0], turned[1:])
        for i, line in enumerate(lines):
            self.line(line, "bold" if i < top else None)


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], int]:
    """Return the lines of a table and how many are its header: one word of each name per line."""
    words = [name.split() for name in header]
    top = max(map(len, words))
    stacked = zip(*[[""] * (top - len(w)) + w for w in words], strict=True)
    cells = [*stacked, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *right]).rstrip())
    return lines, top


class Meter:
    """Shows how far a long task is: a bar on a terminal, a line every few seconds elsewhere.

    Called as ``meter(phase, done, total)``, the interface of ``SpecExtend(progress=)``.

    Args:
        output: where to.
        label: before the name of the phase.
        least: a phase of fewer steps is not shown.
    """

    EVERY = 5.0  # seconds between lines
    REFRESH = 0.1  # seconds between two states of a bar

    def __init__(self, output: Output, label: str = "", least: int = 2048):
        self.output = output
        self.label = f"{label}: " if label else ""
        self.least = least
        self._bars: Progress | None = None
        self._tasks: dict[str, int] = {}
        self._shown = time.monotonic()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if total < self.least:
            return
        now, name = time.monotonic(), phase.replace("_", " ")
        if self.output.is_live:
            if phase not in self._tasks:
                self._add(phase, f"{self.label}{name}", total)
            elif now - self._shown < self.REFRESH and done < total:
                return
            self._bars.update(self._tasks[phase], completed=done, refresh=True)
        elif now - self._shown < self.EVERY:
            return
        else:
            self.output.line(f"{self.label}{name}: {done:,} of {total:,} tokens")
        self._shown = now

    def _add(self, phase: str, text: str, total: int) -> None:
        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,} of {task.total:,} tokens"),
                TimeElapsedColumn(),
                console=self.output.console,
                auto_refresh=False,  # a thread that draws would take time from what is measured
                transient=True,
            )
            self._bars.start()
        self._tasks[phase] = self._bars.add_task(text, total=total)

    def close(self) -> None:
        """Remove the bars. Calling again shows new ones."""
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._tasks = None, {}

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Detokenizer:
    """Makes text of tokens as they come: joined, the pieces are what the tokenizer's ``decode``
    makes of all tokens at once, without special ones.

    What a later token may change is held back: the bytes of a character that is not whole; tokens
    that stand for single bytes, of which the whole row becomes other text where it turns out not to
    be UTF-8; and, with ``clean_up_tokenization_spaces``, spaces before signs.

    Args:
        tokenizer: of the tokens.
    """

    WINDOW = 64  # so many tokens, twice as many at most, are decoded for each that comes
    MARGIN = 32  # characters by which a shorter window must agree with a longer one
    # All that `clean_up_tokenization` looks for is made of these characters, and is so short that
    # none further from the end can be changed by what comes.
    SIGNS, REACH = " .?!,'ntmsvre", 16

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._ids: list[int] = []  # the last ones; what they stand for does not depend on others
        self._written = 0  # characters of their text
        self._in_bytes = False

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def add(self, token: int) -> str:
        """Return what is certain of the text with ``token``, and has not been returned yet."""
        self._ids.append(token)
        if self._is_byte(token):
            self._in_bytes = True
        elif self._in_bytes and self._decode([token]):  # special tokens do not part the bytes
            self._in_bytes = False
        if self._in_bytes:
            return ""
        text = self._decode(self._ids)
        new = text[self._written : self._certain(text)]
        self._written += len(new)
        if len(self._ids) > 2 * self.WINDOW:
            self._shorten(text)
        return new

    def end(self) -> str:
        """Return what is left."""
        text = self._decode(self._ids)
        new, self._written = text[self._written :], len(text)
        return new

    def _is_byte(self, token: int) -> bool:
        """Tell whether a token is a byte of a tokenizer that falls back on bytes."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        return isinstance(name, str) and re.fullmatch("<0x[0-9A-Fa-f]{2}>", name) is not None

    def _certain(self, text: str) -> int:
        """Count the characters that stay, whatever token comes."""
        end = len(text.rstrip("\ufffd"))
        if not self._cleans:
            return end
        return max(len(text[:end].rstrip(self.SIGNS)), end - self.REACH)

    def _shorten(self, text: str) -> None:
        """Forget tokens that no longer matter: those without which ``text`` ends alike."""
        ids = self._ids[-self.WINDOW :]
        short, pending = self._decode(ids), len(text) - self._written
        common = pending + self.MARGIN
        if len(short) >= common and text.endswith(short[-common:]):
            self._ids, self._written = ids, len(short) - pending


def gap(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Return the space between a prompt and what follows that neither has on its own."""
    before = list(prompt[-8:])
    text, end, joint = (
        tokenizer.decode(ids, skip_special_tokens=True)
        for ids in (before, tokens, [*before, *tokens])
    )
    fits = joint.startswith(text) and joint.endswith(end)
    return joint[len(text) : len(joint) - len(end)] if fits else ""


class LiveText:
    """Writes the tokens of :class:`specextend.Step` as text.

    Args:
        output: where to; None: nowhere.
        tokenizer: of the tokens.
        highlight: tell accepted tokens from the target's own, where ``output`` has colours.

    Attributes:
        text: everything so far; behind the end, what ``decode`` makes of all tokens.
    """

    def __init__(
        self,
        output: Output | None,
        tokenizer: PreTrainedTokenizerBase,
        highlight: bool = False,
    ):
        self.text = ""
        self._output = output
        self._detokenizer = Detokenizer(tokenizer)
        self._styles = ("accepted", "own") if highlight else (None, None)

    def add(self, tokens: Sequence[int], num_accepted: int = 0) -> None:
        """Write the tokens of a round, the first ``num_accepted`` of them from the draft."""
        for i, token in enumerate(tokens):
            self._write(self._detokenizer.add(token), self._styles[i >= num_accepted])

    def end(self) -> None:
        """Write what the detokenizer still holds back, and end the line."""
        self._write(self._detokenizer.end(), None)
        if self._output is not None and self.text and not self.text.endswith("\n"):
            self._output.write("\n")

    def _write(self, text: str, style: str | None) -> None:
        self.text += text
        if self._output is not None:
            self._output.write(text, style)


def standard_output() -> Output:
    """Return the standard output, as it is now."""
    return Output(sys.stdout)


def standard_error() -> Output:
    """Return the standard error, as it is now."""
    return Output(sys.stderr)


def last_lines(tokenizer, prompt: list[int], count: int = 4) -> str:
    """Return the last lines of a prompt, from its last 200 tokens."""
    text = tokenizer.decode(prompt[-200:], skip_special_tokens=True)
    return "\n".join(text.split("\n")[-count:])


def size_text(parameters: int) -> str:
    """Say how large a model is."""
    return f"{parameters / 1e6:.1f} M parameters"


def bytes_text(count: float) -> str:
    """Write a number of bytes for people."""
    for unit, least, digits in (("GiB", 2**30, 1), ("MiB", 2**20, 0), ("KiB", 2**10, 0)):
        if count >= least:
            return f"{count / least:.{digits}f} {unit}"
    return f"{count:.0f} bytes"


def dtype_name(model) -> str:
    """Name the dtype of a model, as options do."""
    return str(model.dtype).removeprefix("torch.")
