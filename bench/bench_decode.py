"""What a round costs at a model's shape, and what the embedded pair gains.

    python bench/bench_decode.py [--device cuda] [--quick] [--shape llama-3.1-8b] [--json out.json]

Rounds: target and a draft of one layer with random weights, whose proposals are rarely accepted; a
round does all of its work nevertheless. Its time is set against that of the bytes it cannot but
read (weights and keys of the target once, those of the draft once per level) at the bandwidth
measured at the start, and plain decoding by the same means (from a CUDA graph on a GPU) is beside
it. Seconds are the host's, from one block of tokens to the next.

The embedded pair continues a document of the standard library: tokens per second and emitted tokens
per target forward, for plain decoding and for each kind of the draft's cache.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from bench_ops import Machine
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from specextend import _C, SpecConfig, SpecExtend, assets  # noqa: E402
from specextend.eval.synthetic import SHAPES, random_model  # noqa: E402
from specextend.testing import Timing  # noqa: E402

GOAL = 1.25  # of the time of a round's bytes, on an H200


def bytes_read(model: PreTrainedModel, tokens: int) -> int:
    """By one forward of a few rows: the weights but for the embedding table, and the cache."""
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is table
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    config = model.config
    row = 2 * config.num_key_value_heads * config.head_dim * table.itemsize
    skipped = 0 if tied else table.numel() * table.itemsize
    return weights - skipped + tokens * row * config.num_hidden_layers


def time_rounds(spec: SpecExtend, prompt: torch.Tensor, rounds: int, warmup: int) -> Timing:
    """Seconds per round, after those in which graphs are captured."""
    samples = []
    stream = spec.stream(prompt, max_new_tokens=(rounds + warmup) * 8, do_sample=False)
    next(stream)
    for i in range(rounds + warmup):
        start = time.perf_counter()
        next(stream)
        if i >= warmup:
            samples.append(time.perf_counter() - start)
    stream.close()
    return Timing(samples)


def bench_rounds(arguments, machine: Machine) -> list[dict]:
    device, results = arguments.device, []
    positions = max(arguments.prefixes) + 4096
    made = arguments.shape, positions, device, arguments.dtype
    target, draft = random_model(*made), random_model(*made, num_hidden_layers=1)
    warmup = 16 if device == "cuda" else 2
    print(f"{arguments.shape}, {arguments.dtype}, draft of one layer, depth {arguments.depth}")
    print("prefix | tree | ms per round (p10..p90) | ms of its bytes | ratio | plain ms, its bytes")
    for prefix in arguments.prefixes:
        prompt = torch.randint(1, 1000, (1, prefix), device=device)
        plain_bound = bytes_read(target, prefix) / machine.bandwidth_gbs / 1e6
        config = SpecConfig(gate="off", tree_shape="top_k", tree_depth=arguments.depth, seed=0)
        plain = time_rounds(SpecExtend(target, None, config), prompt, arguments.rounds, warmup)
        for nodes in arguments.trees:
            config = config.replace(tree_nodes=nodes, tree_width=8, tree_top_k=8)
            spec = SpecExtend(target, draft, config)
            timing = time_rounds(spec, prompt, arguments.rounds, warmup)
            seen = min(prefix, config.budget)
            total = bytes_read(target, prefix) + arguments.depth * bytes_read(draft, seen)
            bound = total / machine.bandwidth_gbs / 1e6
            ms = timing.median * 1e3
            goal = None
            if "H200" in machine.gpu and (arguments.shape, prefix, nodes) == (
                "llama-3.1-8b", 16384, 32,
            ):  # fmt: skip
                goal = f"<= {GOAL} x: {'met' if ms <= GOAL * bound else 'MISSED'}"
            print(
                f"{prefix:6} | {nodes:4} | {ms:8.2f} ({timing.p10 * 1e3:.2f}.."
                f"{timing.p90 * 1e3:.2f}) | {bound:8.2f} | {ms / bound:5.2f} | "
                f"{plain.median * 1e3:.2f}, {plain_bound:.2f}" + (f" | {goal}" if goal else ""),
                flush=True,
            )
            results.append(
                {
                    "shape": arguments.shape, "prefix": prefix, "tree": nodes,
                    "depth": arguments.depth, "round_ms": ms, "p10_ms": timing.p10 * 1e3,
                    "p90_ms": timing.p90 * 1e3, "bound_ms": bound, "ratio": ms / bound,
                    "plain_ms": plain.median * 1e3, "plain_bound_ms": plain_bound, "goal": goal,
                    "mean_acceptance_length": spec.stats.mean_acceptance_length,
                }
            )  # fmt: skip
    return results


def bench_embedded(arguments, machine: Machine) -> list[dict]:
    tokenizer = AutoTokenizer.from_pretrained(assets.target_path())
    target, draft = (
        AutoModelForCausalLM.from_pretrained(path, dtype=arguments.dtype).to(arguments.device)
        for path in (assets.target_path(), assets.draft_path())
    )
    results = []
    print(f"embedded pair, {arguments.dtype}, {arguments.tokens} tokens, greedy")
    print("prompt | kind      | tokens/s | x plain | emitted per forward")
    for length in arguments.lengths:
        ids = torch.tensor([assets.demo_prompt(tokenizer, length)[1]], device=arguments.device)
        plain = None
        for kind in ("plain", "full", "window", "retrieval"):
            options = dict(assets.SETTINGS, draft_cache="full" if kind == "plain" else kind)
            spec = SpecExtend(target, None if kind == "plain" else draft, options)
            spec.generate(ids, max_new_tokens=arguments.tokens, do_sample=False)
            stats = spec.stats
            plain = plain or stats.tokens_per_second
            print(
                f"{length:6} | {kind:9} | {stats.tokens_per_second:8.1f} | "
                f"{stats.tokens_per_second / plain:7.2f} | {stats.mean_acceptance_length:.2f}",
                flush=True,
            )
            results.append({"prompt": length, "kind": kind, **stats.as_dict()})
    return results


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = "cuda" if _C.has_cuda and torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here)
    parser.add_argument("--quick", action="store_true", help="fewer prefixes, tokens and rounds")
    parser.add_argument("--shape", choices=SHAPES, help="default: llama-3.1-8b, on a CPU small")
    parser.add_argument("--prefixes", type=numbers, help="of the rounds, such as 2048,16384")
    parser.add_argument("--trees", type=numbers, help="proposed nodes, such as 8,32")
    parser.add_argument("--depth", type=int, default=5, help="levels of the tree")
    parser.add_argument("--rounds", type=int, help="timed rounds of each")
    parser.add_argument("--lengths", type=numbers, help="prompts of the embedded pair")
    parser.add_argument("--tokens", type=int, help="new tokens of the embedded pair")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    arguments = parser.parse_args()
    cuda, quick = arguments.device == "cuda", arguments.quick

    def default(name: str, value) -> None:
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)

    default("shape", "llama-3.1-8b" if cuda else "small")
    default("prefixes", [16384] if quick and cuda else [2048, 16384] if cuda else [2048])
    default("trees", [32] if quick else [8, 32, 64])
    default("rounds", 40 if cuda else 8)
    default("lengths", [2048] if quick and not cuda else [2048, 8192, 16000])
    default("tokens", 64 if quick else 256)
    arguments.dtype = torch.bfloat16 if cuda else torch.float32
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    machine = Machine.describe(arguments.device)
    with torch.device(arguments.device):
        machine.measure(0.5)
    where = machine.gpu or f"{machine.processor}, {machine.threads} threads, {machine.isa}"
    print(f"{where}; {machine.bandwidth_gbs:.1f} GB/s; torch {machine.torch}, {machine.commit}")
    results = {"machine": asdict(machine)}
    for name, bench in (("rounds", bench_rounds), ("embedded", bench_embedded)):
        results[name] = bench(arguments, machine)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
