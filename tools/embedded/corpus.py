"""Gathers the text that the embedded models learn from, its tokenizer, and windows drawn from it.

    python -m tools.embedded.corpus corpus.jsonl [--prose FOLDER]

writes the text for ``specextend train``, documents in random order.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

VOCAB = 4096
MAX_CONTEXT = 16384
END = "<|endoftext|>"
HELD_OUT = re.compile(
    r"ipaddress|decimal|header_value|mock|argparse|tarfile|inspect|typing|datetime|smtp"
    r"|pickletools|statistics|_vendor|site-packages|__pycache__|encodings/|pydoc_data"
)
# Each source has a folder, megabytes at most, and its share of the training tokens.
SOURCES = {
    "stdlib": ("stdlib", 20, 0.40),
    "stdlib tests": ("stdlib/test", 12, 0.12),
    "transformers": ("transformers/models", 14, 0.14),
    "torch": ("torch", 10, 0.09),
    "sympy": ("sympy", 7, 0.07),
    "networkx": ("networkx", 4, 0.07),
    "numpy": ("numpy", 4, 0.05),
    "prose": ("", 4, 0.06),
}


def python_files(spec: str) -> list[Path]:
    """List Python files of a package or the standard library by path, without held-out ones."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    package, _, rest = spec.partition("/")
    if package == "stdlib":
        root = stdlib
    else:
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            return []
        root = Path(found.submodule_search_locations[0])
    files = []
    for path in sorted((root / rest).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        is_test = name.startswith("test/") or "/test" in name
        if not HELD_OUT.search(name) and (spec != "stdlib" or not is_test):
            files.append(path)
    return files


def held_out_lines() -> set[str]:
    """Return long lines of the held-out modules: files that share many are left out, too."""
    stdlib, lines = Path(sysconfig.get_path("stdlib")), set()
    for path in stdlib.rglob("*.py"):
        name = path.relative_to(stdlib).as_posix()
        if HELD_OUT.search(name) and "site-packages" not in name:
            lines |= {x.strip() for x in path.read_text("utf-8", "ignore").splitlines()}
    return {x for x in lines if len(x) >= 40 and "import" not in x}


def read_sources(prose: Path | None, rng: random.Random) -> dict[str, list[str]]:
    """Read the training texts, one list of documents per source."""
    held, texts = held_out_lines(), {}
    for name, (spec, megabytes, _) in SOURCES.items():
        documents, dropped = [], 0
        if name == "prose":
            for path in sorted(prose.glob("*16K.jsonl")) if prose else []:
                for line in path.read_text("utf-8").splitlines():
                    documents.append(json.loads(line)["text"].split("\n\n", 2)[-1])
            documents = documents[:-2]  # the last two books are for evaluation
        else:
            for path in python_files(spec):
                text = path.read_text("utf-8", "ignore")
                if not 400 < len(text) < 400_000 or not text.isascii():
                    continue
                lines = [x for x in map(str.strip, text.splitlines()) if len(x) >= 40]
                shared = sum(x in held for x in lines)
                if shared > 8 and shared > 0.04 * len(lines):
                    dropped += 1
                else:
                    documents.append(text)
        total = sum(map(len, documents))
        keep = min(1.0, megabytes * 1e6 / max(1, total))
        if keep < 1:  # neighbours stay together: runs of eight files are dropped
            documents = [
                x
                for i in range(0, len(documents), 8)
                if rng.random() < keep
                for x in documents[i : i + 8]
            ]
        texts[name] = documents
        size = sum(map(len, documents)) / 1e6
        print(
            f"data: {name}: {len(documents)} documents, {size:.1f} MB, "
            f"{dropped} dropped as too like the held-out ones",
            flush=True,
        )
    return texts


def train_tokenizer(texts: dict[str, list[str]], rng: random.Random) -> PreTrainedTokenizerFast:
    """Train byte-level BPE; a line break and the indentation after it can be one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    pattern = r" ?_?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|(?:[ \t]*\n)+[ \t]*|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    sample = [
        x
        for name, share in ((n, s[2]) for n, s in SOURCES.items())
        for x in take(texts[name], 12e6 * share, rng)
    ]
    tokenizer.train_from_iterator(
        sample,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=[END],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_CONTEXT + 1024,
    )


def take(documents: list[str], chars: float, rng: random.Random) -> list[str]:
    """Draw random documents, about `chars` characters in all."""
    out: list[str] = []
    for i in rng.sample(range(len(documents)), len(documents)):
        if chars <= 0:
            break
        out.append(documents[i][:100_000])
        chars -= len(out[-1])
    return out


def prepare(work: Path, prose: Path | None, seed: int) -> None:
    """Write tokenizer and one stream of tokens per source into the work folder."""
    start, rng = time.time(), random.Random(seed)
    texts = read_sources(prose, rng)
    tokenizer = train_tokenizer(texts, rng)
    tokenizer.save_pretrained(work / "tokenizer")
    print(f"data: tokenizer after {time.time() - start:.0f} s", flush=True)
    for name, documents in texts.items():
        stream: list[int] = []
        for i in range(0, len(documents), 200):
            for ids in tokenizer(documents[i : i + 200])["input_ids"]:
                stream.append(0)
                stream += ids
        np.save(work / f"{name.replace(' ', '_')}.npy", np.array(stream, np.uint16))
        ratio = sum(map(len, documents)) / max(1, len(stream))
        print(
            f"data: {name}: {len(stream) / 1e6:.2f} M tokens, {ratio:.2f} characters each",
            flush=True,
        )


class Windows:
    """Draws training windows: short excerpts at the positions they have in a long document.

    A window of a long document is a few of its passages in order, each with its true positions,
    so that distances of up to 16K are trained at the price of short attention. Passages are
    chosen because they share n-grams with the last one, or at random; spans are copied forward,
    sometimes with names exchanged.
    """

    def __init__(self, work: Path, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        names = [n for n in SOURCES if (work / f"{n.replace(' ', '_')}.npy").exists()]
        self.streams = [np.load(work / f"{n.replace(' ', '_')}.npy") for n in names]
        share = np.array(
            [SOURCES[n][2] * (len(s) > 40_000) for n, s in zip(names, self.streams, strict=True)]
        )
        self.share = share / share.sum()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
        self.words = np.array(
            [i for i in range(VOCAB) if re.fullmatch(r"[ _]?[A-Za-z]{3,}", tokenizer.decode([i]))],
            np.int64,
        )
        self.is_word = np.zeros(VOCAB, bool)
        self.is_word[self.words] = True

    def document(self, length: int) -> np.ndarray:
        """Draw a stretch of neighbouring files."""
        stream = self.streams[self.rng.choice(len(self.streams), p=self.share)]
        start = self.rng.integers(0, max(1, len(stream) - length))
        return stream[start : start + length].astype(np.int64)

    def copies(self, ids: np.ndarray, count: int, longest: int) -> None:
        """Copy `count` spans of 32..longest tokens to a later place, in place."""
        for _ in range(count):
            n = int(self.rng.integers(32, longest + 1))
            src = int(self.rng.integers(0, len(ids) - 2 * n))
            dst = int(self.rng.integers(src + n, len(ids) - n + 1))
            span = ids[src : src + n].copy()
            if self.rng.random() < 0.4:
                known = np.unique(span[self.is_word[span]])
                if len(known) > 2:
                    old = self.rng.choice(known, max(1, len(known) // 4), replace=False)
                    table = np.arange(VOCAB)
                    table[old] = self.rng.choice(self.words, len(old))
                    span = table[span]
            ids[dst : dst + n] = span

    def related(self, doc: np.ndarray, length: int) -> np.ndarray:
        """Find earlier passages of `doc` like its end: ascending indices, then the end itself."""
        recent = int(self.rng.integers(length // 4, length // 2))
        end = int(self.rng.integers(length * 2, len(doc) + 1))
        first = end - recent
        mix = np.zeros(len(doc), np.int64)
        for shift in range(6):  # a hash of the six tokens that start here
            mix[: len(doc) - 6] = mix[: len(doc) - 6] * 4099 + doc[shift : len(doc) - 6 + shift]
        hits = np.flatnonzero(np.isin(mix[: first - 6], mix[first : end - 6]))
        chosen = np.zeros(len(doc), bool)
        chosen[first:end] = True
        room = length - recent
        while room > 0:
            n = min(room, int(self.rng.integers(24, 160)))
            if len(hits) and self.rng.random() < 0.7:
                start = int(self.rng.choice(hits)) - int(self.rng.integers(0, n // 2 + 1))
            else:
                start = int(self.rng.integers(0, first - n))
            start = min(max(start, 0), first - n)
            chosen[start : start + n] = True
            room = length - int(chosen[:end].sum())
        return np.flatnonzero(chosen)[-length:]

    def window(self, length: int, copying: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw tokens, positions and labels of one window."""
        if length == MAX_CONTEXT:
            ids, at = self.document(length), np.arange(length)
            self.copies(ids, 16, 400)
        elif self.rng.random() < 0.5:
            doc = self.document(MAX_CONTEXT)
            at = self.related(doc, length)
            ids = doc[at]
            if self.rng.random() < copying / 2:
                self.copies(ids, 1 + length // 2048, min(400, length // 4))
        else:  # one passage, with gaps in its positions
            ids, at = self.document(length), np.arange(length)
            for cut in self.rng.integers(1, length, self.rng.integers(0, 4)):
                at[cut:] += self.rng.integers(0, (MAX_CONTEXT - at[-1]) // 2 + 1)
            at += self.rng.integers(0, MAX_CONTEXT - at[-1])
            if self.rng.random() < copying:
                self.copies(
                    ids, int(self.rng.integers(1, 4 + length // 1024)), min(400, length // 4)
                )
        labels = np.full(length, -100)
        labels[:-1] = ids[1:]
        labels[:-1][at[1:] != at[:-1] + 1] = -100  # nobody can know where the next passage begins
        return ids, at, labels

    def batch(self, count: int, length: int, copying: float) -> tuple[torch.Tensor, ...]:
        """Draw `count` windows, as tensors [count, length]."""
        rows = [self.window(length, copying) for _ in range(count)]
        return tuple(torch.from_numpy(np.stack(x)) for x in zip(*rows, strict=True))


def write_corpus(out: Path, prose: Path | None, seed: int) -> None:
    """Write the texts as JSON Lines, documents in random order."""
    texts = read_sources(prose, random.Random(seed))
    documents = [text for source in texts.values() for text in source]
    random.Random(1).shuffle(documents)
    with out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)


def main() -> None:
    """Write the text that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--prose", type=Path, help="folder of JSON Lines with a `text` field")
    parser.add_argument("--seed", type=int, default=20776)
    args = parser.parse_args()
    write_corpus(args.out, args.prose, args.seed)


if __name__ == "__main__":
    main()
