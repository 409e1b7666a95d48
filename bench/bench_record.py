"""Prints and records what benchmarks measure, in the one form that they share.

A header says what they run on. Then each case has a line:

    name of the case | median (p10..p90) unit | share of its bound | peer ratio, ... | remarks

All numbers of a line come from one run in which its contestants take turns, so that a ratio holds
on a busy machine too; compare times only between quiet ones. A ratio is how many times as long the
peer takes. The bound is the time that the case's bytes or its arithmetic take, whichever is longer,
at the rates that torch reaches on this machine, measured at the start of the run (for an operator
on a CPU: in turns with it). Caches are cold: on a CPU they are emptied before each call, and on a
GPU buffers rotate through more than its L2.

The record (``--json``) has the header, the rates and the lines in seconds, bytes or tokens. It is
written again after each line, since a run may be cut short.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from specextend import _C, assets  # noqa: E402
from specextend.machine import header  # noqa: E402
from specextend.testing import Spread, time_calls, time_graphs  # noqa: E402

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: A line's numbers are divided by these to be printed.
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "MiB": 2.0**20, "tokens": 1.0}
READ_BYTES = 256 << 20  # so much is read to measure a CPU's bandwidth, more with large caches


def name_of(dtype: torch.dtype) -> str:
    """Return the key of a dtype in ``DTYPES``."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def numbers(text: str) -> list[int]:
    """Parse an option's value, whole numbers with commas between."""
    return [int(x) for x in text.split(",") if x]


def parser(doc: str) -> argparse.ArgumentParser:
    """Make a parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    here = "cuda" if _C.has_cuda and torch.cuda.is_available() else "cpu"
    made.add_argument("--device", choices=("cpu", "cuda"), default=here)
    made.add_argument("--quick", action="store_true", help="fewer and smaller cases, for a look")
    made.add_argument("--filter", default="", help="only cases whose name contains this text")
    made.add_argument("--threads", type=int, help="default: torch's")
    made.add_argument("--json", type=Path, help="write the record to this file, too")
    return made


def add_pair(made: argparse.ArgumentParser) -> None:
    """Add the options that name a pair, its dtype, and what it reads."""
    made.add_argument("--target", help="folder or hub id; default: the embedded target")
    made.add_argument("--draft", help="default: the embedded draft of the embedded target")
    made.add_argument(
        "--documents", type=Path, help="default: the embedded pair's held-out modules"
    )
    made.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))


def parse(made: argparse.ArgumentParser, given: list[str] | None = None) -> argparse.Namespace:
    """Parse the arguments, and set the number of threads and the seed as they want it."""
    arguments = made.parse_args(given)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return arguments


# ---- rates and bounds ----------------------------------------------------------------------------


@dataclass
class Yardstick:
    """Holds a call of torch's that moves or computes a known amount."""

    call: Callable[[], object]
    amount: float  # bytes, or operations

    def times(self, n: int) -> Yardstick:
        """Join n calls to one, so that cold caches weigh less."""

        def call():
            for _ in range(n):
                self.call()

        return Yardstick(call, n * self.amount)


@dataclass
class Rates:
    """Holds what the machine reaches by torch's own means.

    Attributes:
        bandwidth: bytes per second, read on a CPU, copied (read and written) on a GPU.
        arithmetic: operations per second of a matrix product, by the keys of ``DTYPES``.
        yardsticks: what measured them on a CPU, by "bandwidth" and those keys, to be measured
            again in turns with a case: others may use the machine, and rates drift.
    """

    bandwidth: float
    arithmetic: dict[str, float] = field(default_factory=dict)
    yardsticks: dict[str, Yardstick] = field(default_factory=dict)

    def record(self) -> dict:
        return {"bandwidth": self.bandwidth, "arithmetic": self.arithmetic}

    @staticmethod
    def measure(device: str, seconds: float) -> Rates:
        """Measure each for ``seconds``; take the best decile on a CPU, which others may use too."""
        return _measure_gpu(seconds) if device == "cuda" else _measure_cpu(seconds)

    def bound(self, num_bytes: float, operations: float = 0.0, dtype: str = "fp32") -> Bound:
        """Return the bound of a case with so much to do; bounds of parts can be added."""
        reading = num_bytes / self.bandwidth
        computing = operations / self.arithmetic[dtype] if operations else 0.0
        return Bound(max(reading, computing), "arithmetic" if computing > reading else "bandwidth")


@dataclass
class Bound:
    """Holds what a case cannot go below, in seconds or bytes, and what sets it."""

    least: float
    kind: str

    def __add__(self, other: Bound) -> Bound:
        larger = self if self.least >= other.least else other
        return Bound(self.least + other.least, larger.kind)

    def __rmul__(self, times: int) -> Bound:
        return Bound(times * self.least, self.kind)


def _measure_cpu(seconds: float) -> Rates:
    """Time a sum over more than the caches hold, and the fastest of some square products."""
    x = torch.ones(max(READ_BYTES, 4 * cache_bytes()) // 4)
    rates = Rates(0.0, yardsticks={"bandwidth": Yardstick(x.sum, x.numel() * 4)})
    rates.bandwidth = x.numel() * 4 / time_calls(x.sum, seconds=seconds)[0].p10
    for name in ("fp32", "bf16"):
        rates.arithmetic[name] = 0.0
        for size in (512, 768, 1024, 2048):  # without instructions for bf16, torch takes its time
            a, b = (torch.randn(size, size).to(DTYPES[name]) for _ in range(2))
            product = Yardstick(lambda a=a, b=b: a @ b, 2 * size**3)
            spread = time_calls(product.call, seconds=seconds, min_calls=3)[0]
            if product.amount / spread.p10 > rates.arithmetic[name]:
                rates.arithmetic[name] = product.amount / spread.p10
                rates.yardsticks[name] = product.times(math.ceil(0.02 / spread.median))
            if spread.median > 0.1:
                break
    # Kernels compute half precision in fp32 where that is faster.
    if rates.arithmetic["bf16"] < rates.arithmetic["fp32"]:
        rates.arithmetic["bf16"] = rates.arithmetic["fp32"]
        rates.yardsticks["bf16"] = rates.yardsticks["fp32"]
    rates.arithmetic["fp16"] = rates.arithmetic["fp32"]
    rates.yardsticks["fp16"] = rates.yardsticks["fp32"]
    return rates


def _measure_gpu(seconds: float) -> Rates:
    """Time copies of 2 GiB, bytes read and written, and a matrix product of 8192."""
    x = torch.ones(1 << 29, device="cuda")
    y = torch.empty_like(x)
    spread = time_graphs([lambda: y.copy_(x)], seconds=seconds)[0]
    rates = Rates(2 * x.numel() * 4 / spread.median)
    for name in ("bf16", "fp16", "fp32"):
        a, b = (torch.randn(8192, 8192, device="cuda").to(DTYPES[name]) for _ in range(2))
        spread = time_graphs([lambda a=a, b=b: a @ b], seconds=seconds)[0]
        rates.arithmetic[name] = 2 * 8192**3 / spread.median
    return rates


# ---- cold caches on a CPU ------------------------------------------------------------------------


def cache_bytes() -> int:
    """Return the bytes of all last-level caches; 64 MiB where the processor does not say."""
    caches: dict[str, int] = {}  # keys are the cores that share one
    for folder in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache"):
        levels = [(int((i / "level").read_text()), i) for i in folder.glob("index[0-9]*")]
        if not levels:
            continue
        last = max(levels)[1]
        size = (last / "size").read_text().strip()
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1:], 1)
        caches[(last / "shared_cpu_list").read_text()] = int(size.rstrip("KMG")) * scale
    return sum(caches.values()) or 64 << 20


def cache_emptier() -> Callable[[], object]:
    """Return a function that reads so much that nothing else is left in the caches."""
    return torch.ones(2 * cache_bytes() // 4, device="cpu").sum


# ---- the embedded pair ---------------------------------------------------------------------------


def embedded_pair(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
    """Load the embedded pair: tokenizer, target and draft."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(assets.target_path(), model_max_length=10**9)
    target, draft = (
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
        for path in (assets.target_path(), assets.draft_path())
    )
    return tokenizer, target, draft


# ---- lines and record ----------------------------------------------------------------------------


class Report:
    """Prints a run line by line, and keeps its record.

    Args:
        arguments: the benchmark's, from :func:`parse`.
        seconds: how long each rate is measured; None: no case of this benchmark has a bound.
        settings: what holds for all cases, printed below the header.

    Attributes:
        rates: the rates that bounds refer to; None without bounds.
        record: ``header``, ``rates``, ``settings`` and ``cases``, as in the file.
    """

    def __init__(
        self, arguments: argparse.Namespace, seconds: float | None = None, **settings: object
    ):
        self._path: Path | None = arguments.json
        self._filter = arguments.filter
        about = header(arguments.device)
        self.rates = None
        if seconds is not None:
            self.rates = Rates.measure(arguments.device, seconds)
        self.record = {
            "header": about,
            "rates": self.rates and self.rates.record(),
            "settings": settings,
            "cases": [],
        }
        print(_header_text(about))
        if self.rates:
            kind = "copy" if arguments.device == "cuda" else "read"
            products = (f"{n} {r / 1e9:.0f}" for n, r in self.rates.arithmetic.items())
            print(
                f"{kind} {self.rates.bandwidth / 1e9:.1f} GB/s; products {', '.join(products)} "
                "GFLOP/s"
            )
        if settings:
            print(", ".join(f"{name.replace('_', ' ')} {x}" for name, x in settings.items()))
        print(flush=True)

    def wants(self, case: str) -> bool:
        """Tell whether ``--filter`` lets a case through."""
        return self._filter in case

    def add(
        self,
        case: str,
        spread: Spread,
        unit: str,
        bound: Bound | None = None,
        peers: dict[str, Spread] | None = None,
        remarks: str = "",
        **facts,
    ) -> dict:
        """Print a case and record it.

        Args:
            spread: its measurements, in seconds, bytes or tokens.
            unit: the unit to print them in, of ``UNITS``.
            bound: what they are compared with.
            peers: the same work done by others, or in other ways, in the same run.
            remarks: what is printed at the end of the line.
            **facts: more for the record alone.

        Returns:
            The record's entry; more may be written into it before the next one.
        """
        entry = {"case": case, **_summary(spread)}
        cells = [f"{case:54}", _amount(spread, unit)]
        if bound is not None:
            entry |= {"bound": asdict(bound), "share": bound.least / spread.median}
            cells.append(f"{100 * entry['share']:4.0f} % ({bound.kind})")
        if peers:
            ratios = {name: peer.median / spread.median for name, peer in peers.items()}
            entry["peers"] = {
                name: {**_summary(peer), "ratio": ratios[name]} for name, peer in peers.items()
            }
            cells.append(", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
        if remarks:
            cells.append(remarks)
        entry |= facts
        self.record["cases"].append(entry)
        print(" | ".join(cells), flush=True)
        self.save()
        return entry

    def note(self, text: str, **facts) -> None:
        """Note what follows from several cases: print a line, and add fields to the record."""
        print(text, flush=True)
        self.record |= facts
        self.save()

    def save(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self.record, indent=1) + "\n")


def _header_text(about: dict) -> str:
    machine = about["machine"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {about['threads']} threads, "
        f"{machine['isa']}",
        f"specextend {about['version']} ({about['commit'] or 'no checkout'}), torch "
        f"{about['torch']}, transformers {about['transformers']}, Python {about['python']}",
        f"{about['command']}, {about['date']}",
    ]
    if machine["gpu"]:
        lines.insert(1, f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}")
    return "\n".join(lines)


def _summary(spread: Spread) -> dict:
    return {
        "median": spread.median,
        "mean": spread.mean,
        "p10": spread.p10,
        "p90": spread.p90,
        "samples": len(spread.samples),
    }


def _amount(spread: Spread, unit: str) -> str:
    """Return the median, the spread if there is one, and the unit."""
    median, p10, p90 = (digits(x / UNITS[unit]) for x in (spread.median, spread.p10, spread.p90))
    around = f" ({p10}..{p90})" if len(spread.samples) > 1 else ""
    return f"{median:>8}{around} {unit}".ljust(30)


def digits(x: float) -> str:
    """Return a number with three significant digits."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"
