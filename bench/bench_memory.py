"""Measures memory against the length of the context, and that nothing grows with its square.

    python bench/bench_memory.py [--device cuda] [--quick] [--lengths 4096,...] [--json out.json]

The cases are peaks of plain decoding and of SpecExtend with each kind of the draft's cache, prefill
and rounds apart, at a small shape with random weights. Each runs in a process of its own; on a CPU
its resident memory counts, on a GPU what torch's allocator has handed out. The bound is what the
shapes predict: weights, caches, the activations of one chunk of the prompt.

A line is fitted through each way's peaks, and a parabola: a tensor of L x L would show in its
quadratic term, as one byte for a mask of booleans. "standard" is the target's own forward with
attention written out, as the papers' starting points have it: a mask and weights over the whole
prompt. It is measured on shorter contexts, to show that such a tensor would be seen.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_record import UNITS, Bound, Report, digits, name_of, numbers, parse, parser
from transformers import PreTrainedModel

from specextend import SpecConfig, SpecExtend
from specextend.compat import CACHE
from specextend.eval.synthetic import SHAPES, random_model
from specextend.testing import Spread

# Attention over 128K tokens takes minutes at the shapes of models; a cache row is 1 KiB here.
TINY = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1,
    num_key_value_heads=1, head_dim=64, vocab_size=1024,
)  # fmt: skip
NEW_TOKENS = 48
LENGTHS, QUICK = (4, 8, 16, 32, 64, 128), (2, 4, 8, 12)  # thousands of tokens
STANDARD, STANDARD_QUICK = (2, 4, 8, 12), (1, 2, 3, 4)  # the same for the standard way
#: A quadratic term of fewer bytes than this counts as none: a mask packed into bits, of which only
#: the causal half is kept, would have more.
ABSENT = 1 / 32

PHASES = ("prefill", "rounds")
BASE = SpecConfig(gate="off", seed=0)
WAYS = {
    "plain": BASE,
    "full": BASE.replace(draft_cache="full"),
    "window": BASE.replace(draft_cache="window"),
    "retrieval": BASE,
    "standard": BASE.replace(prefill_chunk=None),
}


# ---- what the shapes say -------------------------------------------------------------------------


def weights(model: PreTrainedModel) -> int:
    """Return the bytes of all parameters."""
    return sum(p.numel() * p.itemsize for p in model.parameters())


def cache_row(model: PreTrainedModel) -> int:
    """Return the bytes that a token takes in all layers of a cache."""
    c = model.config
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize


def predict(
    target: PreTrainedModel, draft: PreTrainedModel | None, config: SpecConfig, length: int
) -> dict[str, dict[str, int]]:
    """Predict bytes by phase and purpose, for a prompt of ``length`` tokens and the new ones behind
    it."""
    c, tokens = target.config, length + NEW_TOKENS
    rows = min(length, config.prefill_chunk or length)
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    wide = 3 * c.hidden_size + max(3 * c.intermediate_size, 2 * heads)
    common = {
        "weights": weights(target),
        "target's cache": tokens * cache_row(target),
        "token ids": 2 * 8 * tokens,
    }
    working = {}
    if draft is not None:
        common["weights"] += weights(draft)
        common["draft's full cache"] = tokens * cache_row(draft)
        if config.draft_cache != "full":
            working = {"working cache": config.budget * cache_row(draft)}
    chunk = {"a chunk's activations": rows * wide * target.dtype.itemsize}
    return {"prefill": {**common, **chunk}, "rounds": {**common, **working}}


# ---- what is taken -------------------------------------------------------------------------------


class Resident:
    """Reads the peaks of this process's resident memory (Linux)."""

    def current(self) -> int:
        return self._read("VmRSS")

    def peak(self) -> int:
        """Return the peak since :meth:`reset`, in bytes."""
        return self._read("VmHWM")

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def _read(self, name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) << 10
        raise RuntimeError(f"/proc/self/status has no {name}")


def give_back_freed() -> None:
    """Make glibc hand freed tensors back at once, so that what is resident is in use."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_threshold = -3
        libc.mallopt(mmap_threshold, 1 << 16)


class Allocated:
    """Reads the same of torch's allocator on a GPU."""

    def current(self) -> int:
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()


def ours(spec: SpecExtend, ids: torch.Tensor, peak: Callable[[], int]) -> list[int]:
    """Generate with SpecExtend; return ``peak`` after the prefill and after the rounds."""
    stream = spec.stream(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    next(stream)  # the prefill, and the first token
    prefill = peak()
    for _ in stream:
        pass
    return [prefill, peak()]


@torch.inference_mode()
def standard(target: PreTrainedModel, ids: torch.Tensor, peak: Callable[[], int]) -> list[int]:
    """Run the model's own forward, with one more token as the only round; return the same."""
    target.set_attn_implementation("eager")
    cache = getattr(target(input_ids=ids, use_cache=True, logits_to_keep=1), CACHE)
    prefill = peak()
    target(input_ids=ids[:, -1:], **{CACHE: cache})
    return [prefill, peak()]


def measure(way: str, length: int, shape: str, device: str, dtype: str) -> dict:
    """Measure one case: bytes at the peaks of prefill and rounds, and what was predicted."""
    torch.manual_seed(0)
    meter = Allocated() if device == "cuda" else Resident()
    give_back_freed()
    config, positions = WAYS[way], length + 4096
    name, changes = ("small", TINY) if shape == "tiny" else (shape, {})
    made = name, positions, device, getattr(torch, dtype)
    target = random_model(*made, **changes)
    draft = None
    if way not in ("plain", "standard"):
        draft = random_model(*made, **{**changes, "num_hidden_layers": 1})
    prompt = torch.randint(1, 1000, (1, length), device=device)

    def peak() -> int:
        found = meter.peak()
        meter.reset()
        return found

    if way == "standard":
        generate = functools.partial(standard, target, peak=peak)
    else:
        spec = SpecExtend(target, draft, config, keep_contexts=0)  # or the warm-up is kept
        generate = functools.partial(ours, spec, peak=peak)
    generate(prompt[:, :256])  # code, threads, and what libraries keep
    gc.collect()
    before = meter.current() - weights(target) - (0 if draft is None else weights(draft))
    meter.reset()
    peaks = {phase: x - before for phase, x in zip(PHASES, generate(prompt), strict=True)}
    parts = predict(target, draft, config, length)
    return {**peaks, "predicted": {p: sum(parts[p].values()) for p in PHASES}, "parts": parts}


def measure_apart(*given) -> dict:
    """Call :func:`measure` in a process of its own, whose memory nothing else has used."""
    # A fork is quick and shares what was imported; no thread runs yet, for this process measures
    # nothing itself. CUDA wants a process of its own from the start.
    how = "spawn" if "cuda" in given else "fork"
    with multiprocessing.get_context(how).Pool(1) as pool:
        return pool.apply(measure, given)


# ---- the fit -------------------------------------------------------------------------------------


@dataclass
class Fit:
    """Describes peaks over lengths L: ``constant + per_token * L``, and what else there may be.

    Attributes:
        off: the largest distance of a peak from that line, in bytes.
        per_square: c of the parabola a + b L + c L^2, in bytes.
    """

    constant: float
    per_token: float
    off: float
    per_square: float

    @property
    def absent(self) -> bool:
        """Tell whether no tensor of L x L is there."""
        return self.per_square < ABSENT


def fit(lengths: list[int], peaks: list[float]) -> Fit:
    """Fit line and parabola by least squares.

    Raises:
        ValueError: fewer than four lengths, through which a parabola could go by chance.
    """
    if len(set(lengths)) < 4:
        raise ValueError(f"at least four lengths are wanted for a fit, got {len(set(lengths))}")
    longest = max(lengths)
    x = torch.tensor(lengths, dtype=torch.float64) / longest
    y = torch.tensor(peaks, dtype=torch.float64)

    def solve(degree: int) -> torch.Tensor:
        powers = torch.stack([x**i for i in range(degree + 1)], 1)
        return torch.linalg.lstsq(powers, y[:, None]).solution[:, 0]

    constant, slope = solve(1).tolist()
    off = (y - constant - slope * x).abs().max().item()
    return Fit(constant, slope / longest, off, solve(2)[2].item() / longest**2)


def report_fit(results: Report, way: str, lengths: list[int], peaks: list[float]) -> None:
    found, longest = fit(lengths, peaks), max(lengths)
    mib = UNITS["MiB"]
    results.note(
        f"{way:10} {found.constant / mib:.1f} MiB + {found.per_token:.0f} bytes per token, at most "
        f"{found.off / mib:.1f} MiB off; quadratic term {found.per_square:.4f} bytes: at {longest} "
        f"tokens {found.per_square * longest**2 / mib:.1f} MiB, where a mask of L x L booleans has "
        f"{longest**2 / mib:.0f}: {'absent' if found.absent else 'PRESENT'}",
        fits={**results.record.get("fits", {}), way: {**vars(found), "absent": found.absent}},
    )


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--shape", choices=("tiny", *SHAPES), help="default: tiny, on a GPU 1B")
    made.add_argument("--lengths", type=numbers, help="of the context, four at least")
    made.add_argument("--standard", type=numbers, help="the same for the standard way")
    return made


def main() -> None:
    arguments = parse(options())
    cuda, quick = arguments.device == "cuda", arguments.quick
    shape = arguments.shape or ("llama-3.2-1b" if cuda else "tiny")
    dtype = torch.bfloat16 if cuda else torch.float32
    lengths = arguments.lengths or [n << 10 for n in (QUICK if quick else LENGTHS)]
    standard = arguments.standard or [n << 10 for n in (STANDARD_QUICK if quick else STANDARD)]
    results = Report(arguments, dtype=name_of(dtype), shape=shape, new_tokens=NEW_TOKENS)
    peaks: dict[str, dict[int, Spread]] = {way: {} for way in WAYS}
    for way in WAYS:
        for length in standard if way == "standard" else lengths:
            case = f"memory {way} context={length}"
            if not results.wants(case):
                continue
            given = way, length, shape, arguments.device, str(dtype).removeprefix("torch.")
            got = measure_apart(*given)
            peak = peaks[way][length] = Spread([max(got["prefill"], got["rounds"])])
            plain = peaks["plain"].get(length) if way != "plain" else None
            results.add(
                case, peak, "MiB", Bound(max(got["predicted"].values()), "shapes"),
                {"plain": plain} if plain else None,
                ", ".join(f"{phase} {digits(got[phase] / UNITS['MiB'])}" for phase in PHASES),
                way=way, context=length, **got,
            )  # fmt: skip
    print()
    for way, found in peaks.items():
        if len(found) >= 4:
            report_fit(results, way, list(found), [peak.median for peak in found.values()])


if __name__ == "__main__":
    main()
