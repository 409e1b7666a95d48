"""Reads training text, plain or JSON Lines, as one stream of tokens, and cuts windows from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

DOCUMENTS = 256  # so many are tokenized in one call


@dataclass
class Batch:
    """Holds windows of text.

    Attributes:
        ids: [B, L] int64.
        counts: [B, L] bool, tokens that are worth predicting: all of a text, the response of a
            dialogue.
    """

    ids: Tensor
    counts: Tensor

    def to(self, device: torch.device) -> Batch:
        """Copy to another device."""
        return Batch(self.ids.to(device), self.counts.to(device))


def read_documents(path: Path) -> list[tuple[str, str]]:
    """Return (context, text) of every document of a file; only ``text`` is learnt from.

    ``.jsonl``: an object a line, with ``text``, or with ``prompt`` and ``response``. Anything else
    is one plain text.

    Raises:
        ValueError: a line that is neither, by its number.
    """
    if path.suffix != ".jsonl":
        return [("", path.read_text(encoding="utf-8"))]
    documents = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if isinstance(record, dict) and isinstance(record.get("text"), str):
                documents.append(("", record["text"]))
            elif isinstance(record, dict) and all(
                isinstance(record.get(key), str) for key in ("prompt", "response")
            ):
                documents.append((record["prompt"], record["response"]))
            else:
                got = sorted(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(
                    f'{path}, line {number}: "text", or "prompt" and "response", are wanted, '
                    f"got {got}"
                )
    if not documents:
        raise ValueError(f"{path} has no documents")
    return documents


class TokenStream:
    """Holds the tokens of all documents of a file in a row, an end-of-text token after each.

    Tokens are kept in ``folder`` under a name made of the file's and the tokenizer's content, so
    that a second run, or a resumed one, does not tokenize again.
    """

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, folder: Path):
        digest = hashlib.sha256(path.read_bytes())
        digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
        self.name = digest.hexdigest()[:16]
        stem = folder / f"tokens-{self.name}"
        files = stem.with_suffix(".ids.npy"), stem.with_suffix(".counts.npy")
        if not all(file.exists() for file in files):
            ids, counts = _tokenize(read_documents(path), tokenizer)
            folder.mkdir(parents=True, exist_ok=True)
            for file, array in zip(files, (ids, counts), strict=True):
                part = file.with_suffix(".part")
                with part.open("wb") as out:
                    np.save(out, array)
                part.replace(file)  # an interrupted run leaves no half a file
        self.ids = np.load(files[0], mmap_mode="r")
        self.counts = np.load(files[1], mmap_mode="r")
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, step: int, count: int, length: int, seed: int) -> Batch:
        """Return ``count`` windows for ``step``, a function of the arguments and of nothing else.

        Windows are the stream cut at multiples of ``length`` (from another offset in every epoch),
        in random order, each once per epoch.
        """
        per_epoch = (len(self) - length + 1) // length
        if per_epoch < 1:
            raise ValueError(
                f"the training text has {len(self)} tokens, fewer than a window and the length's "
                f"remainder need ({2 * length - 1})"
            )
        rows = []
        for index in range(step * count, (step + 1) * count):
            epoch, at = divmod(index, per_epoch)
            offset, order = self._order(seed, epoch, per_epoch, length)
            start = offset + int(order[at]) * length
            rows.append(slice(start, start + length))
        ids = np.stack([self.ids[row] for row in rows]).astype(np.int64)
        counts = np.stack([self.counts[row] for row in rows])
        return Batch(torch.from_numpy(ids), torch.from_numpy(counts))

    @staticmethod
    def _draw_order(seed: int, epoch: int, windows: int, length: int) -> tuple[int, np.ndarray]:
        rng = np.random.default_rng((seed, epoch))
        return int(rng.integers(length)), rng.permutation(windows)


def _tokenize(
    documents: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids, counts = [], []
    for start in range(0, len(documents), DOCUMENTS):
        part = documents[start : start + DOCUMENTS]
        contexts = tokenizer([context for context, _ in part]).input_ids
        texts = tokenizer([text for _, text in part]).input_ids
        for (context, text), before, new in zip(part, contexts, texts, strict=True):
            if context:  # no beginning-of-text between a prompt and its response
                new = tokenizer(text, add_special_tokens=False).input_ids
                ids.append(np.array(before, np.uint32))
                counts.append(np.zeros(len(before), bool))
            ids.append(np.array(new + end, np.uint32))
            counts.append(np.ones(len(new) + len(end), bool))
    return np.concatenate(ids), np.concatenate(counts)
