"""The demonstration: a long document continued in several ways, and what each of them cost."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from . import _C, __version__, assets
from .cli import UsageError, config_from, difference, load_pair
from .config import SpecConfig
from .decode import SpecExtend
from .generation import Step
from .machine import device_text
from .stats import PHASES
from .terminal import LiveText, Meter, Output, standard_error, standard_output
from .timing import Timed, logit_gap, time_hugging_face, time_loop

LENGTHS = {False: (16_000, 256), True: (2_000, 48)}  # --short: prompt, new tokens

HUGGING_FACE = "Hugging Face generate"
PLAIN = "plain decoding"
RETRIEVAL = "tree, retrieval"
TREES = {"tree, full cache": "full", "tree, window": "window", RETRIEVAL: "retrieval"}
TREE = "tree"  # of a draft that has no cache, or one of its own kind


@dataclass
class Demonstration:
    """The pair, the document, and where to show what happens.

    Attributes:
        pair: target, draft, and the tokenizers of both.
        ids: [1, L] int64, the document.
        new: tokens to write.
    """

    pair: tuple
    config: SpecConfig
    ids: Tensor
    new: int
    out: Output
    notes: Output

    def hugging_face(self) -> Timed:
        """``generate`` of the target itself."""
        with Meter(self.notes, HUGGING_FACE, least=1) as meter:
            return time_hugging_face(self.pair[0], self.ids, self.new, meter, do_sample=False)

    def live(self, title: str, draft_cache: str | None) -> Timed:
        """Write the text as it comes; plain decoding without a ``draft_cache``."""
        out, tokenizer, prompt = self.out, self.pair[2], self.ids[0].tolist()
        out.line()
        out.line(f"-- {title} ".ljust(72, "-"), "bold")
        text = LiveText(out, tokenizer, prompt, highlight=draft_cache is not None)
        with Meter(self.notes) as meter:

            def show(step: Step, count: int) -> None:
                if count == len(step.tokens):  # the first
                    meter.close()
                    out.write(last_lines(tokenizer, prompt), "dim")
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
        target, draft, tokenizer, draft_tokenizer = self.pair
        config = self.config.replace(draft_cache=draft_cache or "full")
        spec = SpecExtend(
            target, draft if draft_cache else None, config,
            tokenizer=tokenizer, draft_tokenizer=draft_tokenizer, progress=meter,
        )  # fmt: skip
        return time_loop(spec, self.ids, self.new, show, do_sample=False)


def run_demo(args: argparse.Namespace) -> int:
    """``specextend demo``.

    Raises:
        ValueError: two ways wrote different tokens.
    """
    tokens, new = LENGTHS[args.short]
    tokens = tokens if args.tokens is None else args.tokens
    new = new if args.max_new_tokens is None else args.max_new_tokens
    if tokens < 2 or new < 2:
        raise UsageError("--tokens and --max-new-tokens must be at least 2")
    config = config_from(args, gate="off")  # each row of the table is its method alone
    pair = load_pair(args)
    if pair[1] is None:
        raise UsageError("the demonstration needs a draft")
    # Tried once for its size and the ways to use it, and for errors to come early.
    draft = SpecExtend(pair[0], pair[1], config, tokenizer=pair[2], draft_tokenizer=pair[3]).draft
    ways = {title: kind for title, kind in TREES.items() if kind in draft.cache_kinds}
    if len(ways) == 1:
        ways = dict.fromkeys([TREE], *draft.cache_kinds)
    best, title = list(ways)[-1], "SpecExtend: tree speculation"
    if best == RETRIEVAL:
        title += ", cross-model retrieval"
    name, ids = _document(args.document, pair[2], tokens)
    device = pair[0].device
    ids = ids.to(device)
    out = standard_output()
    out.line(f"{name}: {tokens:,} tokens, then {new} new ones", "bold")
    kind = {"ngram": "n-gram look-up", "self": "the target itself"}.get(args.draft)
    kind = kind or size_text(draft.num_parameters)
    size = size_text(pair[0].num_parameters())
    out.line(f"target {size}, draft {kind}, {dtype_name(pair[0])}, on {device_text(device)}")
    show = Demonstration(pair, config, ids, new, out, standard_error())

    runs: dict[str, Timed] = {}
    runs[PLAIN] = show.live("plain decoding, our kernels", None)
    runs[best] = show.live(title, ways[best])
    if out.has_style:
        out.write("accepted from the draft", "accepted")
        out.write(", the target's own\n", "own")
    out.line()
    runs[HUGGING_FACE] = show.hugging_face()
    for title, kind in ways.items():
        if title not in runs:
            runs[title] = show.silent(title, kind)

    rows = [HUGGING_FACE, PLAIN, *ways]
    _write_table(out, {row: runs[row] for row in rows})
    _write_notes(out, pair[0], args.draft, tokens, new)
    for row in rows[1:]:
        text = difference(pair[2], runs[row].tokens, runs[HUGGING_FACE].tokens, HUGGING_FACE)
        if text:
            gap = logit_gap(pair[0], ids, runs[row].tokens, runs[HUGGING_FACE].tokens)
            if gap is not None:
                text += f"; in {dtype_name(pair[0])} their logits are {gap:.2g} apart"
            raise ValueError(f"{row}: {text}")
    return 0


def _document(file: str | None, tokenizer, tokens: int) -> tuple[str, Tensor]:
    """Name and tokens [1, tokens] of the document."""
    if file is None:
        name, ids = assets.demo_prompt(tokenizer, tokens)
    else:
        name, text = Path(file).name, Path(file).read_text(encoding="utf-8")
        ids = tokenizer(text).input_ids[:tokens]
    if len(ids) < tokens:
        raise ValueError(f"{name} has {len(ids):,} tokens, {tokens:,} are wanted")
    return name, torch.tensor([ids])


def last_lines(tokenizer, prompt: list[int], count: int = 4) -> str:
    text = tokenizer.decode(prompt[-200:], skip_special_tokens=True)
    return "\n".join(text.split("\n")[-count:])


def size_text(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M parameters"


def dtype_name(model) -> str:
    return str(model.dtype).removeprefix("torch.")


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
