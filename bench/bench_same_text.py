"""Counts how often speculative decoding decides otherwise than plain decoding, and at what gap.

    python bench/bench_same_text.py --documents FILE.jsonl --lengths 1024 --new 256
    python bench/bench_same_text.py --target FOLDER --draft ngram --documents FILE.jsonl

Plain decoding writes a greedy continuation of every document. Speculative decoding is then led
along it: its decision at every token is what its own logits say, given the same text before; where
that is another token, plain decoding's is taken and both go on. So each token counts alone, and one
difference does not become a different text. Both run with `exact` off, and both with it on, where
there must be no difference.

A line has the tokens per document that were decided otherwise, median over documents, and behind
it the sum over all. The gap is that of plain decoding's logits, between its own token and the other
one, in logits and in steps of the models' dtype at the smaller one's size. `rows` is the share of
logit rows in which any bit differs, `ties` that of plain decoding's rows whose best two logits are
equal: what a last bit could decide.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bench_record import Report, add_pair, numbers, parse, parser
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from specextend import SpecConfig, SpecExtend, assets, ops
from specextend.eval.prompts import read_documents
from specextend.pair import Pair, load_pair
from specextend.testing import Spread


class Led(LogitsProcessor):
    """Lets the next token of a text be chosen, wherever that text stands before it.

    Args:
        text: [L] int64, prompt and continuation.
    """

    def __init__(self, text: Tensor):
        self.text = text

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        length = input_ids.shape[1]
        if length >= len(self.text):
            return scores
        on_it = (input_ids == self.text[:length]).all(1)
        led = torch.full_like(scores, -torch.inf)
        led[:, self.text[length]] = 0
        return torch.where(on_it[:, None], led, scores)


@dataclass
class Counts:
    """Holds what one document showed.

    Attributes:
        tokens: that were decided.
        gaps: of each that was decided otherwise, in logits.
        steps: the same in steps of the dtype.
        rows: logit rows with another bit.
        ties: rows of plain decoding whose two best logits are equal.
        seconds: of rounds, by "plain" and "speculative".
    """

    tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    rows: int = 0
    ties: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def step_size(x: float, dtype: torch.dtype) -> float:
    """Return the distance of neighbouring numbers of a dtype at the size of x."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(abs(x), info.tiny)))


def write(spec: SpecExtend, ids: Tensor, new: int, led: Tensor | None = None):
    """Return the continuation's tokens [n], its raw logits [n, V] and the seconds of its rounds."""
    processors = LogitsProcessorList([] if led is None else [Led(led)])
    start = time.perf_counter()
    out = spec.generate(
        ids, max_new_tokens=new, do_sample=False, logits_processor=processors,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    seconds = time.perf_counter() - start - spec.stats.seconds["prefill"]
    seconds -= spec.stats.seconds["draft_prefill"]
    return out.sequences[0, ids.shape[1] :], torch.cat(out.logits), seconds


def compare(plain: SpecExtend, spec: SpecExtend, ids: Tensor, new: int) -> Counts:
    """Count how two loops over the same target decide behind a prompt [1, L]."""
    dtype = plain.target.model.dtype
    text, logits, seconds = write(plain, ids, new)
    led = torch.cat([ids[0], text])
    again, others, _ = write(spec, ids, new, led)
    assert torch.equal(again, text), "led along a text, it wrote another one"
    *_, spec_seconds = write(spec, ids, new)  # at its own speed
    chosen = ops.sample_nodes(others[None])[0]
    best = logits.topk(2).values
    counts = Counts(
        len(text),
        rows=int((logits != others).any(1).sum()),
        ties=int((best[:, 0] == best[:, 1]).sum()),
        seconds={"plain": seconds, "speculative": spec_seconds},
    )
    for at in (chosen != text).nonzero()[:, 0].tolist():
        own, other = logits[at, text[at]].item(), logits[at, chosen[at]].item()
        counts.gaps.append(own - other)
        counts.steps.append((own - other) / step_size(min(abs(own), abs(other)), dtype))
    return counts


def remarks(found: list[Counts]) -> str:
    """Say what a line's median does not."""
    tokens = sum(c.tokens for c in found)
    gaps = sorted(g for c in found for g in c.gaps)
    steps = sorted(s for c in found for s in c.steps)
    rows, ties = (sum(n) / tokens for n in ((c.rows for c in found), (c.ties for c in found)))
    rates = ", ".join(
        f"{name} {tokens / sum(c.seconds[name] for c in found):.1f} tokens/s"
        for name in found[0].seconds
    )
    text = f"{len(gaps)} of {tokens} decided otherwise"
    if gaps:
        middle, upper = len(gaps) // 2, len(gaps) * 9 // 10
        text += (
            f", gap {gaps[middle]:.4f} (p90 {gaps[upper]:.4f}, largest {gaps[-1]:.4f}), in steps "
            f"{steps[middle]:.1f} (p90 {steps[upper]:.1f}, largest {steps[-1]:.1f})"
        )
    return f"{text}; rows {rows:.4f}, ties {ties:.4f}; {rates}"


def run(pair: Pair, documents: list[Tensor], new: int, report: Report, name: str) -> None:
    """Compare behind all documents [1, L], with `exact` off and on by turns."""
    found: dict[bool, list[Counts]] = {False: [], True: []}
    loops = {}
    for exact in found:
        config = SpecConfig(exact=exact, gate="off", **assets.SETTINGS)
        # Each reads its prompts anew: what they have before their rounds is the same, bit for bit.
        loops[exact] = tuple(make(config, keep_contexts=0) for make in (pair.plain, pair.spec))
    for ids in documents:
        for exact, counts in found.items():
            counts.append(compare(*loops[exact], ids, new))
    for exact, counts in found.items():
        report.add(
            f"{name} exact={exact}", Spread([float(len(c.gaps)) for c in counts]), "tokens",
            remarks=remarks(counts), exact=exact, tokens=sum(c.tokens for c in counts),
            gaps=[g for c in counts for g in c.gaps], steps=[s for c in counts for s in c.steps],
            rows=sum(c.rows for c in counts), ties=sum(c.ties for c in counts),
            seconds={k: sum(c.seconds[k] for c in counts) for k in counts[0].seconds},
        )  # fmt: skip


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    add_pair(made)
    made.add_argument("--count", type=int, help="documents; default 8, quick 2")
    made.add_argument("--lengths", type=numbers, help="of prompts; default 1024, quick 256")
    made.add_argument("--new", type=int, help="tokens behind each prompt; default 256, quick 24")
    return made


def main() -> None:
    arguments = parse(options())
    quick = arguments.quick
    lengths = arguments.lengths or [256 if quick else 1024]
    new, count = arguments.new or (24 if quick else 256), arguments.count or (2 if quick else 8)
    pair = load_pair(arguments.target, arguments.draft, arguments.dtype, torch.device("cpu"))
    pair.target.to(arguments.device)
    results = Report(arguments, dtype=arguments.dtype, new_tokens=new, documents=count)
    texts = [text for _, text in read_documents(arguments.documents)]
    for length in lengths:
        name = f"{Path(arguments.target or 'embedded').name} {arguments.draft or 'model'}"
        name += f" context={length}"
        if results.wants(name):
            prompts = (torch.tensor([pair.tokenizer(text).input_ids[:length]]) for text in texts)
            taken = [ids for ids in prompts if ids.shape[1] == length][:count]
            run(pair, [ids.to(arguments.device) for ids in taken], new, results, name)


if __name__ == "__main__":
    main()
