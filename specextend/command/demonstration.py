"""Continues a long document in several ways, and shows what each of them cost."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from .. import _C, __version__, assets
from ..config import SpecConfig
from ..draft import beside_lookup
from ..errors import UsageError
from ..generation import Step
from ..machine import device_text
from ..pair import Pair
from ..stats import PHASES
from ..terminal import (
    LiveText,
    Meter,
    Output,
    dtype_name,
    gap,
    last_lines,
    size_text,
    standard_error,
    standard_output,
)
from ..timing import Timed, difference, logit_gap, time_hugging_face, time_loop

HUGGING_FACE = "Hugging Face generate"
PLAIN = "plain decoding"
RETRIEVAL = "tree, retrieval"
TREES = {"tree, full cache": "full", "tree, window": "window", RETRIEVAL: "retrieval"}
TREE = "tree"  # of a draft that has no cache, or one of its own kind


@dataclass
class Demonstration:
    """Knows the pair and the document, and shows what happens.

    Attributes:
        pair: the models.
        config: options of the loop.
        ids: [1, L] int64, the document.
        new: tokens to write.
    """

    pair: Pair
    config: SpecConfig
    ids: Tensor
    new: int
    out: Output
    notes: Output

    def hugging_face(self) -> Timed:
        """Time ``generate`` of the target itself."""
        with Meter(self.notes, HUGGING_FACE, least=1) as meter:
            return time_hugging_face(
                self.pair.target, self.ids, self.new, meter, do_sample=False,
                tokenizer=self.pair.tokenizer,
            )  # fmt: skip

    def live(self, title: str, draft_cache: str | None) -> Timed:
        """Write the text as it comes; plain decoding without a ``draft_cache``."""
        out, tokenizer, prompt = self.out, self.pair.tokenizer, self.ids[0].tolist()
        out.line()
        out.line(f"-- {title} ".ljust(72, "-"), "bold")
        text = LiveText(out, tokenizer, highlight=draft_cache is not None)
        with Meter(self.notes) as meter:

            def show(step: Step, count: int) -> None:
                if count == len(step.tokens):  # the first
                    meter.close()
                    out.write(last_lines(tokenizer, prompt), "dim")
                    out.write(gap(tokenizer, prompt, step.tokens))
                text.add(step.tokens, step.num_accepted)

            run = self._generate(draft_cache, meter, show)
        text.end()
        out.line(_summary(run), "dim")
        return run

    def silent(self, title: str, draft_cache: str) -> Timed:
        """Show how far it is."""
        with Meter(self.notes, title, least=1) as meter:
            return self._generate(
                draft_cache, meter, lambda _, count: meter("decoding", count, self.new)
            )

    def _generate(
        self, draft_cache: str | None, meter: Meter, show: Callable[[Step, int], None]
    ) -> Timed:
        config = self.config.replace(draft_cache=draft_cache or "full")
        make = self.pair.spec if draft_cache else self.pair.plain
        spec = make(config, meter)
        tokenizer = self.pair.tokenizer
        return time_loop(spec, self.ids, self.new, show, do_sample=False, tokenizer=tokenizer)


def show(
    pair: Pair,
    config: SpecConfig,
    document: str | None,
    draft_name: str | None,
    tokens: int,
    new: int,
) -> None:
    """Continue a document in all ways, and show it.

    Args:
        config: of all ways, but for the draft's cache.
        document: a file; None: modules of Python's standard library.
        draft_name: as the user named it.
        tokens, new: of the prompt and of what is written, at least 2.

    Raises:
        ValueError: two ways wrote different tokens.
    """
    if pair.draft is None:
        raise UsageError("the demonstration needs a draft")
    target, tokenizer = pair.target, pair.tokenizer
    # Tried once for its size and the ways to use it, and for errors to come early.
    draft = pair.spec(config).draft
    ways = {title: kind for title, kind in TREES.items() if kind in draft.cache_kinds}
    if len(ways) == 1:
        ways = dict.fromkeys([TREE], *draft.cache_kinds)
    best, title = list(ways)[-1], "SpecExtend: tree speculation"
    if best == RETRIEVAL:
        title += ", cross-model retrieval"
    name, ids = _document(document, tokenizer, tokens)
    device = target.device
    ids = ids.to(device)
    out = standard_output()
    out.line(f"{name}: {tokens:,} tokens, then {new} new ones", "bold")
    model = draft_name and beside_lookup(draft_name)
    kind = {"ngram": "n-gram look-up", "self": "the target itself"}.get(model or draft_name)
    kind = (kind or size_text(draft.num_parameters)) + " with look-up" * bool(model)
    size = size_text(target.num_parameters())
    out.line(f"target {size}, draft {kind}, {dtype_name(target)}, on {device_text(device)}")
    demonstration = Demonstration(pair, config, ids, new, out, standard_error())

    runs: dict[str, Timed] = {}
    runs[PLAIN] = demonstration.live("plain decoding, our kernels", None)
    runs[best] = demonstration.live(title, ways[best])
    if out.has_style:
        out.write("accepted from the draft", "accepted")
        out.write(", the target's own\n", "own")
    out.line()
    runs[HUGGING_FACE] = demonstration.hugging_face()
    for title, kind in ways.items():
        if title not in runs:
            runs[title] = demonstration.silent(title, kind)

    rows = [HUGGING_FACE, PLAIN, *ways]
    _write_table(out, {row: runs[row] for row in rows})
    _write_notes(out, target, draft_name, tokens, new)
    for row in rows[1:]:
        text = difference(tokenizer, runs[row].tokens, runs[HUGGING_FACE].tokens, HUGGING_FACE)
        if text:
            gap = logit_gap(target, ids, runs[row].tokens, runs[HUGGING_FACE].tokens)
            if gap is not None:
                text += f"; in {dtype_name(target)} their logits are {gap:.2g} apart"
            raise ValueError(f"{row}: {text}")


def _document(file: str | None, tokenizer, tokens: int) -> tuple[str, Tensor]:
    """Return name and tokens [1, tokens] of the document."""
    if file is None:
        name, ids = assets.demo_prompt(tokenizer, tokens)
    else:
        name, text = Path(file).name, Path(file).read_text(encoding="utf-8")
        ids = tokenizer(text).input_ids[:tokens]
    if len(ids) < tokens:
        raise ValueError(f"{name} has {len(ids):,} tokens, {tokens:,} are wanted")
    return name, torch.tensor([ids])


def _summary(run: Timed) -> str:
    parts = [f"{len(run.tokens)} tokens", f"{run.rate:.1f} tokens/s"]
    if run.stats.num_draft_tokens:
        parts.append(f"mean acceptance length {run.stats.mean_acceptance_length:.2f}")
    return " | ".join([*parts, f"prefill {run.prefill:.1f} s"])


def _write_table(out: Output, runs: dict[str, Timed]) -> None:
    header = [
        "", "tokens /s", "times plain", "times HF", "accept. length", "target prefill",
        "draft prefill", "verify", "accept", "retrieve", "draft", "identical",
    ]  # fmt: skip
    hugging_face, plain = runs[HUGGING_FACE], runs[PLAIN]
    rows = []
    for name, run in runs.items():
        row = [name, f"{run.rate:.1f}", f"{run.rate / plain.rate:.2f}"]
        row.append(f"{run.rate / hugging_face.rate:.2f}")
        if run.stats is None:
            row += ["1.00", f"{run.prefill:.1f}", *["-"] * len(PHASES[1:]), "-"]
        else:
            row += [f"{run.stats.mean_acceptance_length:.2f}", f"{run.prefill:.1f}"]
            seconds = (run.stats.seconds.get(phase) for phase in PHASES[1:])
            row += ["-" if s is None else f"{s:.2f}" for s in seconds]
            row.append("yes" if run.tokens == hugging_face.tokens else "NO")
        rows.append(row)
    out.table(header, rows)


def _write_notes(out: Output, target, draft: str | None, tokens: int, new: int) -> None:
    out.line()
    out.line("tokens /s: decoding alone, from the first token on; accept. length: tokens per")
    out.line("forward of the target; target prefill to draft: seconds. Every way ran once,")
    out.line("with its own prefill; no gate stopped speculation where it did not pay.")
    out.line(
        f"{device_text(target.device)}, {_C.cpu_isa()}, "
        f"{dtype_name(target)} | specextend {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
        f" | specextend demo{f' --draft {draft}' * bool(draft)} --tokens {tokens} "
        f"--max-new-tokens {new} --dtype {dtype_name(target)}"
    )
