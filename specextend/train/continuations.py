"""Writes training text in the target's own hand: passages of a text that the target continues.

    python -m specextend.train.continuations --data text.jsonl --output continued.jsonl

A draft is tried on what its target writes, which is not what people write: greedy output repeats
itself and its prompt. Each line of the output is a passage and its continuation, in one ``text``
field.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from ..decode import SpecExtend
from ..errors import EXPECTED
from ..machine import DEVICE_HELP, DTYPES, choose_device
from ..pair import load_target
from .data import TokenStream


def write_continuations(
    spec: SpecExtend,
    tokenizer: PreTrainedTokenizerBase,
    stream: TokenStream,
    file: Path,
    count: int,
    passage: int,
    new: int,
    seed: int = 0,
) -> None:
    """Continue random passages greedily.

    Args:
        spec: the target; its draft only makes it faster.
        tokenizer: the target's.
        stream: the text that passages are taken from.
        file: JSON Lines, written as they come.
        count: lines.
        passage: tokens of a passage.
        new: tokens of a continuation at most.
        seed: of the passages' places.

    Raises:
        ValueError: the text is shorter than a passage.
    """
    if len(stream) < passage:
        raise ValueError(f"the text has {len(stream)} tokens, passages of {passage} are wanted")
    places = np.random.default_rng(seed).integers(len(stream) - passage + 1, size=count)
    with file.open("w", encoding="utf-8") as out:
        for start in track(places.tolist(), "continuing"):
            ids = torch.from_numpy(stream.ids[start : start + passage].astype(np.int64))[None]
            ids = ids.to(spec.model.device)
            ids = spec.generate(ids, max_new_tokens=new, do_sample=False, tokenizer=tokenizer)[0]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            out.write(json.dumps({"text": text}) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", metavar="MODEL", help="[the embedded target]")
    parser.add_argument("--data", type=Path, metavar="FILE", required=True, help="as for training")
    parser.add_argument("--output", type=Path, metavar="FILE", required=True)
    parser.add_argument("--count", type=int, default=600, metavar="N", help="passages [600]")
    parser.add_argument("--passage", type=int, default=768, metavar="N", help="tokens [768]")
    parser.add_argument("--new", type=int, default=256, metavar="N", help="tokens [256]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="[0]")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32",
        help="of the target [float32]",
    )  # fmt: skip
    parser.add_argument("--device", help=DEVICE_HELP)
    args = parser.parse_args(argv)
    try:
        model, tokenizer = load_target(args.target, args.dtype, choose_device(args.device))
    except EXPECTED as error:
        parser.error(str(error))
    stream = TokenStream(args.data, tokenizer, args.output.parent)
    write_continuations(
        SpecExtend(model, "ngram"), tokenizer, stream, args.output,
        args.count, args.passage, args.new, args.seed,
    )  # fmt: skip


if __name__ == "__main__":
    main()
