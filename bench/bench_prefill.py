"""Measures how long a prompt is read before the first token, beside `transformers` itself.

    python bench/bench_prefill.py [--quick] [--shape NAME] [--lengths 1024,...] [--json out.json]

A model of a given shape, with random weights and few layers, reads prompts of random tokens: by its
own forward into a `DynamicCache` with the last logits, as `generate` has it, and by ours into a
`KVCache`, in chunks and at once. Time grows with the layers in proportion, but for the head, which
a prompt of ours does without.
"""

from __future__ import annotations

import argparse

import torch
from bench_record import DTYPES, Report, numbers, parse, parser
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from specextend.cache import KVCache, Pass
from specextend.compat import CACHE
from specextend.eval.synthetic import random_model
from specextend.target import Target
from specextend.testing import time_calls

CHUNK = 1024  # the default of SpecConfig.prefill_chunk


def read_by_model(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Read a prompt [1, L] as `generate` does."""
    model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: DynamicCache()})


def read_by_target(target: Target, ids: torch.Tensor, chunk: int) -> None:
    """Read a prompt [1, L] as our loop does, in parts of ``chunk`` tokens."""
    cache = KVCache(target.num_layers, ids.shape[1] + 1, 1, ids.device)
    cache.rotary_length = ids.shape[1]
    for part in ids.split(chunk, 1):
        count = part.shape[1]
        positions = torch.arange(cache.length, cache.length + count, device=ids.device)[None]
        target.read(part, positions, Pass(cache, [(cache, cache.lens)], count))
        cache.advance(count)


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--shape", default="llama-3.2-1b", help="see specextend.eval.synthetic")
    made.add_argument("--layers", type=int, default=2, help="of the model; default 2")
    made.add_argument("--lengths", type=numbers, help="default 1024,4096,16384,32768; quick 256")
    made.add_argument("--dtypes", default="bf16,fp16,fp32", help="by commas; default: all")
    made.add_argument("--calls", type=int, default=3, help="of each contestant, at least")
    return made


def main() -> None:
    arguments = parse(options())
    quick = arguments.quick
    lengths = arguments.lengths or ([256] if quick else [1024, 4096, 16384, 32768])
    results = Report(arguments, shape=arguments.shape, layers=arguments.layers)
    for dtype in arguments.dtypes.split(","):
        model = random_model(
            arguments.shape, max(lengths), arguments.device, DTYPES[dtype],
            num_hidden_layers=arguments.layers,
        ).eval()  # fmt: skip
        target = Target(model)
        for length in lengths:
            name = f"{dtype} {length} tokens"
            if not results.wants(name):
                continue
            ids = torch.randint(0, target.vocab_size, (1, length), device=arguments.device)
            with torch.inference_mode():
                ours, at_once, theirs = time_calls(
                    lambda ids=ids, target=target: read_by_target(target, ids, CHUNK),
                    lambda ids=ids, target=target: read_by_target(target, ids, ids.shape[1]),
                    lambda ids=ids, model=model: read_by_model(model, ids),
                    seconds=0.1, min_calls=1 if quick else arguments.calls,
                )  # fmt: skip
            results.add(name, ours, "ms", peers={"transformers": theirs, "ours at once": at_once})


if __name__ == "__main__":
    main()
