"""Makes prompts by length: reads them from files, or cuts them to measure from documents.

A made prompt has exactly as many tokens as are asked for. Those with an answer end where it is
about to be given, so that it can be told whether a draft knows it.
"""

from __future__ import annotations

import json
import keyword
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .. import assets

RANDOM = "random"  # the source of prompts for random models
TEXTS = (".txt", ".md", ".py")
CLOSING = 64  # a cut keeps so many tokens at the end of a record: an instruction stands there
DEPTHS = (0.5, 0.1, 0.9, 0.3, 0.7)  # what is asked for stands here, one prompt after the other
STEP = 500  # prompts that begin in the same document are so many tokens apart
ORIGINAL = 0.55  # the original has this share of repeated code; the copy is not finished


@dataclass(frozen=True)
class Prompt:
    """Holds what a method continues.

    Attributes:
        name: which prompt of its source and length it is.
        source: see ``records.Run``.
        length: nominal tokens.
        ids: tokens.
        answer: tokens that should follow; None where nothing is asked.
    """

    name: str
    source: str
    length: int
    ids: list[int]
    answer: list[int] | None = None


def random_prompts(vocab: int, length: int, count: int, seed: int) -> list[Prompt]:
    """Draw tokens without meaning, for models without one."""
    prompts = []
    for i in range(count):
        rng = random.Random(f"{seed} {RANDOM} {length} {i}")
        ids = [rng.randrange(1, vocab) for _ in range(length)]  # 0 would be taken for padding
        prompts.append(Prompt(f"{RANDOM}-{i}", RANDOM, length, ids))
    return prompts


def named_length(file: Path) -> int | None:
    """Return the tokens that a file's name tells, as in name_16K.jsonl or name_512.jsonl."""
    found = re.search(r"_(\d+)([kK]?)$", file.stem)
    return int(found[1]) * (1024 if found[2] else 1) if found else None


def read_records(file: Path) -> list[str]:
    """Read the texts of a file of JSON Lines.

    Raises:
        ValueError: a line is not an object with "text".
    """
    texts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError(f'{file}, line {number}: an object with "text" is wanted')
        texts.append(text)
    return texts


def _kind(path: Path) -> tuple[str, list[Path]]:
    """Return "jsonl" or "folder", and the files."""
    if path.is_file():
        return ("jsonl" if path.suffix == ".jsonl" else "folder"), [path]
    if not path.is_dir():
        raise ValueError(f"there is no file or folder {path}")
    for kind, endings in (("jsonl", (".jsonl",)), ("folder", TEXTS)):
        if files := sorted(p for p in path.rglob("*") if p.suffix in endings and p.is_file()):
            return kind, files
    raise ValueError(f"{path} has no .jsonl, {', '.join(TEXTS[:-1])} or {TEXTS[-1]} files")


def read_documents(path: Path | None) -> list[tuple[str, str]]:
    """Return name and text of each document that prompts are made of; ``path`` None: of the modules
    of the standard library that the embedded models have not seen."""
    if path is None:
        return assets.held_out_documents()
    kind, files = _kind(path)
    if kind == "folder":
        return [(file.name, file.read_text(encoding="utf-8", errors="replace")) for file in files]
    return [
        (f"{file.stem}-{i}", text) for file in files for i, text in enumerate(read_records(file))
    ]


class Prompts:
    """Reads and makes prompts for one tokenizer.

    Args:
        tokenizer: the target's.
        path: file or folder with texts; None: documents of the standard library.
        seed: that of what is drawn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, path: Path | None, seed: int = 0):
        self.path, self.seed = path, seed
        self._tokenizer = tokenizer
        with_special, bare = tokenizer("a").input_ids, self._encode("a")
        self._opening = with_special[: max(0, len(with_special) - len(bare))]
        if self._opening + bare != with_special:  # it puts something at the end
            self._opening = []
        self._documents: list[tuple[str, str]] | None = None
        self._tokens: dict[int, list[int]] = {}

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def make(self, source: str, length: int, count: int) -> list[Prompt]:
        """Return ``count`` prompts of ``length`` tokens.

        Args:
            source: "prompts", those in the files, or a kind of ``options.GENERATED``.

        Raises:
            ValueError: there is not enough text.
        """
        if source == "prompts":
            return self._from_files(length, count)
        made: dict[str, Callable[[int, int], Prompt]] = {
            "joined": self._joined,
            "needle": self._needle,
            "lookup": self._lookup,
            "code": self._code,
        }
        return [made[source](length, i) for i in range(count)]

    # ---- from files ------------------------------------------------------------------------------

    def _from_files(self, length: int, count: int) -> list[Prompt]:
        kind, files = _kind(self.path)
        found = []
        for name, text in self._texts(kind, files, length):
            ids = self._opening + self._encode(text)
            named = kind == "jsonl" and named_length(Path(name.rpartition("-")[0])) is not None
            if len(ids) < length and not named:
                continue
            closing = CLOSING if kind == "jsonl" and length > 2 * CLOSING else 0
            if len(ids) > length:
                ids = ids[: length - closing] + ids[len(ids) - closing :]
            found.append(Prompt(name, kind, length, ids))
            if len(found) == count:
                return found
        if found:
            return found
        lengths = sorted({n for n in map(named_length, files) if n}) if kind == "jsonl" else []
        there = f"its files have prompts of {', '.join(map(str, lengths))}; " if lengths else ""
        raise ValueError(
            f"{self.path} has no text of {length:,} tokens: {there}--generate joined makes long "
            "prompts of short texts"
        )

    @staticmethod
    def _texts(kind: str, files: list[Path], length: int) -> Iterator[tuple[str, str]]:
        """Yield texts for prompts of a length, those of files named after it if there are any."""
        if kind == "jsonl":
            named = [file for file in files if named_length(file) == length]
            for file in named or [file for file in files if named_length(file) is None]:
                for i, text in enumerate(read_records(file)):
                    yield f"{file.stem}-{i}", text
        else:
            for file in files:
                yield file.name, file.read_text(encoding="utf-8", errors="replace")

    # ---- made ------------------------------------------------------------------------------------

    def _text(self, count: int, first: int) -> list[int]:
        """Join ``count`` tokens of documents, from the ``first`` one on, around to the others."""
        if self._documents is None:
            self._documents = [d for d in read_documents(self.path) if d[1].strip()]
        documents, ids = self._documents, []
        # Once every document has been the first, the next prompts begin further down.
        skip = first // len(documents) * STEP
        for i in range(len(documents)):
            index = (first + i) % len(documents)
            if index not in self._tokens:
                self._tokens[index] = self._encode(documents[index][1].rstrip() + "\n\n\n")
            ids += self._tokens[index]
            if len(ids) >= count + skip:
                return ids[skip : skip + count]
        if len(ids) >= count:
            return (ids[skip % len(ids) :] + ids[: skip % len(ids)])[:count]
        raise ValueError(
            f"the documents have {len(ids):,} tokens together, {count:,} are wanted for a prompt"
        )

    @property
    def _is_code(self) -> bool:
        """Tell whether the documents are Python."""
        self._text(1, 0)
        return all(name.endswith(".py") for name, _ in self._documents)

    def _random(self, source: str, length: int, index: int) -> random.Random:
        return random.Random(f"{self.seed} {source} {length} {index}")

    def _joined(self, length: int, index: int) -> Prompt:
        ids = self._opening + self._text(length - len(self._opening), index)
        return Prompt(f"joined-{index}", "joined", length, ids)

    def _needle(self, length: int, index: int) -> Prompt:
        """Hide one fact in the midst of documents, and ask for it at the end."""
        rng, depth = self._random("needle", length, index), DEPTHS[index % len(DEPTHS)]
        name, value = f"{_word(rng)}_{_word(rng)}", f"{rng.randrange(10**7, 10**8)}"
        if self._is_code:
            constant = name.upper()
            fact, question = f'{constant} = "{value}"\n', f'\n\nassert {constant} == "'
        else:
            person = name.split("_")[0].title()
            fact = f"\nThe secret number of {person} is {value}. Remember it.\n"
            question = (
                f"\n\nWhat is the secret number of {person}?\nThe secret number of {person} is "
            )
        needle, (asked, answer) = self._encode(fact), self._split(question, value)
        room = self._room(length, len(needle) + len(asked))
        text = self._text(room, index)
        at = self._line(text, int(depth * room))
        ids = self._opening + text[:at] + needle + text[at:] + asked
        return Prompt(f"needle-{depth}-{index}", "needle", length, ids, answer)

    def _lookup(self, length: int, index: int) -> Prompt:
        """List as many keys with their values as there is room for, and ask for one of them."""
        rng, depth = self._random("lookup", length, index), DEPTHS[index % len(DEPTHS)]
        lines: list[tuple[str, str]] = []
        head, body, keys = self._encode("TABLE = {\n"), [], set()
        while True:
            key, value = f"{_word(rng)}_{_word(rng)}", f"{rng.randrange(10**5, 10**6)}"
            if key in keys:
                continue
            line = self._encode(f'    "{key}": {value},\n')
            # What is asked for has as many tokens as a line, or a few more.
            if lines and len(head) + len(body) + 3 * len(line) + 16 > length:
                break
            keys.add(key)
            lines.append((key, value))
            body += line
        key, value = lines[min(int(depth * len(lines)), len(lines) - 1)]
        asked, answer = self._split(f'}}\n\nassert TABLE["{key}"] == ', value)
        room = self._room(length, len(head) + len(body) + len(asked))
        ids = self._opening + self._text(room, index) + head + body + asked
        return Prompt(f"lookup-{depth}-{index}", "lookup", length, ids, answer)

    def _code(self, length: int, index: int) -> Prompt:
        """Repeat documents with other names; the prompt ends within the copy."""
        rng = self._random("code", length, index)
        original = self._text(int(ORIGINAL * length), index)
        text = self._tokenizer.decode(original, clean_up_tokenization_spaces=False)
        copy = self._encode(_renamed(text, rng))
        ids = (self._opening + original + copy)[:length]
        if len(ids) < length:  # other names can be shorter
            more = length - len(ids)
            ids = self._opening + self._text(len(original) + more, index) + copy
        return Prompt(f"code-{index}", "code", length, ids)

    def _room(self, length: int, taken: int) -> int:
        room = length - taken - len(self._opening)
        if room < 0:
            raise ValueError(
                f"a prompt of {length} tokens is too short: {length - room} are needed at least"
            )
        return room

    def _split(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a question and of what follows it: both are encoded together, and
        parted where the question's own tokens end."""
        whole, asked = self._encode(question + answer), self._encode(question)
        same = next((i for i, (a, b) in enumerate(zip(whole, asked, strict=False)) if a != b), None)
        at = min(len(whole), len(asked)) if same is None else same
        return whole[:at], whole[at:]

    def _line(self, ids: list[int], at: int) -> int:
        """Find the next place at or before ``at`` where a line begins, if one is close by."""
        for i in range(at, max(0, at - 256), -1):
            if "\n" in self._tokenizer.decode(ids[i - 1 : i]):
                return i
        return at


_SYLLABLES = [c + v for c in "bdfgklmnprst" for v in "aeio"]


def _word(rng: random.Random) -> str:
    """Make up a name that no text has."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(3))


def _renamed(text: str, rng: random.Random) -> str:
    """Rename what the code defines; in prose, some of the long words."""
    defined = set(re.findall(r"\b(?:def|class)\s+([A-Za-z]\w{2,})", text))
    names = sorted(defined - set(keyword.kwlist))  # "class for ..." stands in comments
    if not names:
        words = sorted(set(re.findall(r"\b[A-Z][a-z]{3,}\b", text)))
        names = rng.sample(words, min(len(words), 32))
    if not names:
        return text
    table = {name: f"{_word(rng)}_{name}" for name in names}
    return re.sub(rf"\b({'|'.join(map(re.escape, names))})\b", lambda m: table[m[0]], text)
