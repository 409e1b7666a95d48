"""Measures what a kept context saves: the second question, a fork, a context on disk.

    python bench/bench_contexts.py --target FOLDER --draft FOLDER --documents FILE.jsonl
    python bench/bench_contexts.py [--quick] [--lengths 2048,16384] [--json out.json]

A document is asked about, and then asked again, by a question of about 50 tokens. Lines, for each
length: the first token of the first question, with the document before it; a round of plain
decoding; the first token of the second question, also as a share of the first one's and in plain
rounds; a fork, with the memory that it takes (this process's share of all that it maps, on Linux;
on a GPU what the driver has given); the second question on the fork; writing the context to a file;
loading it, with every row read once, beside reading the file, from the disk and from the system's
cache.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from pathlib import Path

import torch
from bench_answer import ask
from bench_record import Report, add_pair, numbers, parse, parser
from torch import Tensor

from specextend import SpecConfig, SpecExtend, assets
from specextend.compat import CACHE
from specextend.context import Context
from specextend.eval.prompts import read_documents
from specextend.machine import free_memory
from specextend.pair import Pair, load_pair
from specextend.testing import Spread, time_calls
from specextend.timing import time_loop

ROUNDS = 16  # of plain decoding, to know what one takes
PART = 8 << 20  # bytes that a file is read in


def first_token(spec: SpecExtend, prompt: Tensor, context: Context | None = None) -> float:
    """Return the seconds to the first token behind a prompt [1, L]."""
    given = {} if context is None else {CACHE: context}
    return time_loop(spec, prompt, 1, lambda *_: None, do_sample=False, **given).to_first


def plain_round(pair: Pair, config: SpecConfig, prompt: Tensor, context: Context) -> float:
    """Return the seconds of a token of plain decoding behind a prompt [1, L]."""
    spec = SpecExtend(pair.target, None, config, keep_contexts=0)
    given = {CACHE: context, "do_sample": False}
    timed = time_loop(spec, prompt, ROUNDS, lambda *_: None, **given)
    return (timed.to_last - timed.to_first) / max(timed.rounds, 1)


def memory(device: torch.device) -> int | None:
    """Return the bytes in use, once the device has done all; None where nobody says."""
    gc.collect()
    if device.type == "cuda":  # what the driver has given, for what forks share is not torch's
        torch.cuda.synchronize(device)
        return torch.cuda.mem_get_info(device)[1] - free_memory(device)
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def read_file(path: Path) -> None:
    """Read a file in parts, and keep none."""
    part = bytearray(PART)
    with path.open("rb", buffering=0) as file:
        while file.readinto(part):
            pass


def read_rows(spec: SpecExtend, path: Path) -> None:
    """Load a context, and look at every page of its rows."""
    for layer in spec.load_context(path).cache.kv_layers:
        for rows in (layer.keys, layer.values):
            rows.view(torch.uint8).flatten(2)[:, :, ::1024].sum()


def drop(path: Path) -> None:
    """Have the system forget what it holds of a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def add_questions(
    results: Report, case: str, spec: SpecExtend, pair: Pair, config: SpecConfig,
    prompts: list[Tensor],
) -> Context:  # fmt: skip
    """Add the lines of both questions and of a fork; return a context of the first one."""
    anew = first_token(spec, prompts[0])
    results.add(f"{case}, first question, first token", Spread([anew]), "s")
    again, cached = first_token(spec, prompts[1]), spec.stats.num_cached_tokens
    spec.forget()
    context = spec.read(prompts[0])
    step = plain_round(pair, config, prompts[0], context.fork())
    results.add(f"{case}, a plain round", Spread([step]), "ms")

    def add_second(name: str, took: float, cached: int) -> None:
        results.add(
            f"{case}, {name}, first token", Spread([took]), "s",
            cached=cached, of_first=took / anew, plain_rounds=took / step,
            remarks=f"{100 * took / anew:.1f} % of the first question's, {took / step:.1f} plain "
            f"rounds; {cached} of {prompts[1].shape[1]} tokens were there",
        )  # fmt: skip

    add_second("second question", again, cached)
    before, size = memory(prompts[0].device), context.num_bytes
    start = time.perf_counter()
    fork = context.fork()
    if prompts[0].is_cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - start
    after = memory(prompts[0].device)
    grown = None if before is None else after - before
    remarks = f"{size / 2**20:.0f} MiB"
    if grown is not None:
        remarks += f", of which {grown / 2**20:.1f} are new"
    results.add(f"{case}, fork", Spread([took]), "ms", remarks=remarks, num_bytes=size, grown=grown)
    again = first_token(spec, prompts[1], fork)
    add_second("second question on the fork", again, spec.stats.num_cached_tokens)
    return context


def add_files(results: Report, case: str, spec: SpecExtend, context: Context, path: Path) -> None:
    """Add the lines of a context on disk."""
    start = time.perf_counter()
    context.save(path)
    took, size = time.perf_counter() - start, path.stat().st_size
    results.add(f"{case}, save", Spread([took]), "s", remarks=f"{size / 2**20:.0f} MiB", bytes=size)
    states = {"in the system's cache": lambda: read_file(path)}
    if hasattr(os, "posix_fadvise"):
        states = {"on disk": lambda: drop(path), **states}
    for state, before in states.items():
        load, whole = time_calls(
            lambda: read_rows(spec, path), lambda: read_file(path), seconds=0, before=before
        )
        results.add(
            f"{case}, load, file {state}", load, "s", peers={"reading the file": whole},
            remarks=f"{size / whole.median / 1e9:.2f} GB/s read", bytes=size,
        )  # fmt: skip


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    add_pair(made)
    made.add_argument("--lengths", type=numbers, help="of prompts; default 2048,16384; quick 512")
    made.add_argument("--folder", type=Path, help="for the file; default: the system's")
    return made


def main() -> None:
    arguments = parse(options())
    lengths = arguments.lengths or ([512] if arguments.quick else [2048, 16384])
    device = torch.device(arguments.device)
    pair = load_pair(arguments.target, arguments.draft, arguments.dtype, device)
    config = SpecConfig(**(assets.SETTINGS if arguments.target is None else {}))
    spec = pair.spec(config)
    results = Report(
        arguments, target=Path(arguments.target or "embedded").name,
        draft=Path(arguments.draft or "embedded").name, dtype=arguments.dtype,
    )  # fmt: skip
    texts = [text for _, text in read_documents(arguments.documents)]
    for length in lengths:
        asked = (ask(pair.tokenizer, text, length, 2) for text in texts)
        prompts = next((found for found in asked if found is not None), None)
        if prompts is None:
            raise SystemExit(f"no document has {length} tokens")
        prompts = [ids.to(device) for ids in prompts]
        case = f"{prompts[0].shape[1]} tokens"
        spec.forget()
        context = add_questions(results, case, spec, pair, config, prompts)
        spec.forget()
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            add_files(results, case, spec, context, Path(folder) / "context")


if __name__ == "__main__":
    main()
