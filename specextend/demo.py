"""The demonstration: a long document continued in five ways, and what each of them cost."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from . import _C, __version__, assets
from .cli import UsageError, config_from, difference, load_pair
from .decode import SpecExtend, Step
from .stats import PHASES, SpecStats
from .terminal import LiveText, Meter, Output, standard_error, standard_output

LENGTHS = {False: (16_000, 256), True: (2_000, 48)}  # --short: prompt, new tokens

HUGGING_FACE = "Hugging Face generate"
PLAIN = "plain decoding"
RETRIEVAL = "tree, retrieval"
TREES = {"tree, full cache": "full", "tree, window": "window", RETRIEVAL: "retrieval"}


@dataclass
class Run:
    """One way to continue the document.

    Attributes:
        tokens: what it wrote.
        first: how many of them came first; their time is the prefill's.
        prefill: seconds to the first token, the draft's prefill apart.
        decode: seconds from then to the last.
        stats: of our own loop.
    """

    tokens: list[int]
    first: int
    prefill: float
    decode: float
    stats: SpecStats | None = None

    @property
    def rate(self) -> float:
        """Tokens per second, decoding only."""
        return (len(self.tokens) - self.first) / self.decode if self.decode else 0.0


class _Clock(BaseStreamer):
    """Notes when each token came."""

    def __init__(self, meter: Meter, total: int):
        self.times: list[float] = []
        self._meter, self._total = meter, total
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self.times.append(time.perf_counter())
        self._meter("decoding", len(self.times), self._total)

    def end(self) -> None:
        pass


def _hugging_face(model, ids: Tensor, max_new_tokens: int, meter: Meter) -> Run:
    clock = _Clock(meter, max_new_tokens)
    meter("decoding", 0, max_new_tokens)
    start = time.perf_counter()
    out = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock)
    first, last = clock.times[0], clock.times[-1]
    return Run(out[0, ids.shape[1] :].tolist(), 1, first - start, last - first)


def _timed(steps: Iterator[Step]) -> Iterator[tuple[Step, float]]:
    """Steps and the seconds that each took, without those that its reader takes."""
    while True:
        start = time.perf_counter()
        step = next(steps, None)
        if step is None:
            return
        yield step, time.perf_counter() - start


def _ours(spec: SpecExtend, ids: Tensor, max_new_tokens: int, show) -> Run:
    tokens, seconds, first = [], [], 0
    for step, took in _timed(spec.stream(ids, max_new_tokens=max_new_tokens, do_sample=False)):
        first = first or len(step.tokens)
        tokens += step.tokens
        seconds.append(took)
        show(step, len(tokens))
    prefill = seconds[0] - spec.stats.seconds.get("draft_prefill", 0.0)
    return Run(tokens, first, prefill, sum(seconds[1:]), spec.stats)


def run_demo(args: argparse.Namespace) -> int:
    """``specextend demo``.

    Raises:
        ValueError: two ways wrote different tokens.
    """
    tokens, new = LENGTHS[args.short]
    tokens, new = args.tokens or tokens, args.max_new_tokens or new
    if tokens < 2 or new < 2:
        raise UsageError("--tokens and --max-new-tokens must be at least 2")
    config = config_from(args, gate="off")
    out, notes = standard_output(), standard_error()
    target, draft, tokenizer, draft_tokenizer = load_pair(args)
    if draft is None:
        raise UsageError("the demonstration needs a draft")
    name, ids = _document(args.document, tokenizer, tokens)
    prompt = ids[0].tolist()

    out.line(f"{name}: {tokens:,} tokens, then {new} new ones", "bold")
    out.line(f"target {_size(target)}, draft {_size(draft)}, {_dtype(target)}, on the CPU")

    def speculator(kind: str | None, meter: Meter) -> SpecExtend:
        changed = config.replace(draft_cache=kind) if kind else config
        return SpecExtend(
            target, draft if kind else None, changed,
            tokenizer=tokenizer, draft_tokenizer=draft_tokenizer, progress=meter,
        )  # fmt: skip

    def live(title: str, kind: str | None) -> Run:
        out.line()
        out.line(f"-- {title} ".ljust(72, "-"), "bold")
        with Meter(notes) as meter:
            text = LiveText(out, tokenizer, prompt, highlight=kind is not None)
            beginning = _tail(tokenizer, prompt)

            def show(step: Step, count: int) -> None:
                nonlocal beginning
                if beginning:
                    meter.close()
                    out.write(beginning, "dim")
                    beginning = ""
                text.add(step.tokens, step.num_accepted)

            run = _ours(speculator(kind, meter), ids, new, show)
        text.end()
        out.line(_line(run), "dim")
        return run

    def silent(title: str, kind: str) -> Run:
        with Meter(notes, title, least=1) as meter:
            return _ours(
                speculator(kind, meter), ids, new, lambda _, count: meter("decoding", count, new)
            )

    runs: dict[str, Run] = {}
    runs[PLAIN] = live("plain decoding, our kernels", None)
    runs[RETRIEVAL] = live("SpecExtend: tree speculation, cross-model retrieval", "retrieval")
    if out.has_style:
        out.write("accepted from the draft", "accepted")
        out.write(", ")
        out.write("the target's own", "own")
        out.line()
    out.line()
    with Meter(notes, HUGGING_FACE, least=1) as meter:
        runs[HUGGING_FACE] = _hugging_face(target, ids, new, meter)
    for title, kind in TREES.items():
        if title not in runs:
            runs[title] = silent(title, kind)

    rows = [HUGGING_FACE, PLAIN, *TREES]
    _table(out, {row: runs[row] for row in rows})
    _footnotes(out, args, target, tokens, new)
    for row in rows[1:]:
        text = difference(tokenizer, runs[row].tokens, runs[HUGGING_FACE].tokens, HUGGING_FACE)
        if text:
            raise ValueError(f"{row}: {text}")
    return 0


def _document(file: str | None, tokenizer, tokens: int) -> tuple[str, Tensor]:
    """Name and first ``tokens`` tokens [1, tokens] of the document."""
    if file is not None:
        name, text = Path(file).name, Path(file).read_text(encoding="utf-8")
    else:
        name, text = assets.demo_document(min_chars=max(assets.MIN_CHARS, 5 * tokens))
    ids = tokenizer(text).input_ids[:tokens]
    if len(ids) < tokens:
        raise ValueError(f"{name} has {len(ids):,} tokens, {tokens:,} are wanted")
    return name, torch.tensor([ids])


def _tail(tokenizer, prompt: list[int], lines: int = 4) -> str:
    """The last lines of the prompt."""
    text = tokenizer.decode(prompt[-200:], skip_special_tokens=True)
    return "\n".join(text.split("\n")[-lines:])


def _size(model) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"


def _dtype(model) -> str:
    return str(model.dtype).removeprefix("torch.")


def _line(run: Run) -> str:
    text = f"{len(run.tokens)} tokens | {run.rate:.1f} tokens/s"
    if run.stats.num_draft_tokens:
        text += f" | mean acceptance length {run.stats.mean_acceptance_length:.2f}"
    return f"{text} | prefill {run.prefill:.1f} s"


def _table(out: Output, runs: dict[str, Run]) -> None:
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


def _footnotes(out: Output, args: argparse.Namespace, target, tokens: int, new: int) -> None:
    gate = getattr(args, "config_gate", "off")
    out.line()
    out.line("tokens /s: decoding alone, from the first token on. accept. length: tokens per forward")
    out.line("of the target. prefill ... draft: seconds. Every way ran once, with its own prefill, and")
    out.line(f"with the gate {gate}, which would stop speculation where it does not pay.")
    machine = f"{_processor()}, {torch.get_num_threads()} threads, {_C.cpu_isa()}"
    versions = (
        f"specextend {__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}"
    )
    command = f"specextend demo --tokens {tokens} --max-new-tokens {new} --dtype {_dtype(target)}"
    out.line(f"{machine}, {_dtype(target)} | {versions} | {command}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
