"""Measures what a round costs, and how many tokens it must emit to pay.

    python bench/bench_decode.py [--device cuda] [--quick] [--shape llama-3.1-8b] [--json out.json]

A round drafts a tree, verifies it, accepts a path and at times retrieves; plain decoding is its
peer. Break-even is the gate's rule (`specextend/gate.py`): the tokens that a round must emit on
average to be no slower than plain rounds. Where a draft brings less, speculation stops paying.

"shape": target and a draft of one layer with random weights, trees of many sizes behind contexts of
many lengths. A round does all of its work, whatever is accepted. Prompts are taken in by a part,
whose rows of the caches are repeated: what is in a cache does not change what a round costs.

"pair": the embedded target continues a document of the standard library, with every draft of
`--pair-drafts`, every kind of its cache and several sizes of the tree. What its rounds emit is
measured, too, so that the lines show where it pays.

Seconds are the host's, from one block of tokens to the next. Contestants take turns of a few tokens
each; the first round of a turn, which finds another's data in the caches, does not count. The bound
is that of all forwards of a round: weights and keys of the target once, those of the draft once per
level; of the pair's trees, which grow as they pay, one level, and of heads and look-ups nothing.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache

import torch
from bench_record import (
    DTYPES,
    Bound,
    Rates,
    Report,
    digits,
    embedded_pair,
    name_of,
    numbers,
    parse,
    parser,
)
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from specextend import SpecConfig, SpecExtend, assets
from specextend.cache import KVCache
from specextend.compat import CACHE
from specextend.eval.synthetic import SHAPES, one_layer, random_model
from specextend.gate import break_even
from specextend.generation import Generation
from specextend.stats import PHASES
from specextend.testing import Spread
from specextend.verify import Outcome

GOAL = 1.25  # of the time of a round's bytes, on an H200
TURN = 8  # tokens
PART = 256  # tokens of a prompt that are taken in


# ---- what a round cannot but do ------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """Says what a layer of a model keeps of a text.

    Attributes:
        row: numbers of a token's keys and values.
        attention: multiplications of a row of queries with a token's keys and values.
        seen: tokens that a row sees at most.
        states: bytes, of all states.
    """

    row: int = 0
    attention: int = 0
    seen: float = math.inf
    states: int = 0


@cache
def layers(model: PreTrainedModel) -> tuple[Layer, ...]:
    """Read off what each layer of a model keeps, from what it puts into a cache."""
    config = model.config.get_text_config()
    ids = torch.tensor([[1, 2]], device=model.device)
    with torch.inference_mode():
        kept = model(input_ids=ids, use_cache=True, **{CACHE: DynamicCache(config=config)})[CACHE]
    found = []
    for layer in kept.layers:
        held = dict(vars(layer))
        keys, values = held.pop("keys", None), held.pop("values", None)
        row = attention = 0
        if keys is not None:
            heads = keys.shape[1]
            row = heads * (keys.shape[3] + values.shape[3])
            attention = row * config.num_attention_heads // heads
        seen = getattr(layer, "sliding_window", None) or math.inf
        states = sum(t.nbytes for t in tree_leaves(held) if isinstance(t, torch.Tensor))
        found.append(Layer(row, attention, seen, states))
    return tuple(found)


def work(model: PreTrainedModel, rows: int, tokens: int) -> tuple[float, float]:
    """Count, for one forward over ``rows`` behind ``tokens``, the bytes that are read (the weights
    but for the embedding table, of experts those that the rows are expected to choose, and the
    cache) and the operations."""
    config = model.config.get_text_config()
    table = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is table
    read = used = 0.0
    for weight in model.parameters():
        if weight is table and not tied:
            continue
        share = 1.0
        if weight.ndim == 3 and weight.shape[1] > 1:  # experts [E, out, in]
            share = config.num_experts_per_tok / weight.shape[0]
        read += weight.numel() * (1 - (1 - share) ** rows)
        used += weight.numel() * share
    read, operations = read * table.itemsize, 2 * rows * used
    for layer in layers(model):
        seen = min(tokens, layer.seen)
        read += seen * layer.row * table.itemsize + layer.states
        operations += 2 * rows * (seen + rows) * layer.attention
    return read, operations


def bound(
    rates: Rates, target: PreTrainedModel, tokens: int, config: SpecConfig, draft=None, depth=0
) -> Bound:
    """Bound a round behind ``tokens``: ``depth`` forwards of ``draft``, if that is a model, and one
    of the target; a plain round if ``depth`` is 0."""
    dtype = name_of(target.dtype)
    total = rates.bound(*work(target, 1 + config.max_nodes if depth else 1, tokens), dtype)
    if isinstance(draft, PreTrainedModel):
        seen = tokens if config.draft_cache == "full" else min(tokens, config.budget)
        total += depth * rates.bound(*work(draft, 1, seen), dtype)
    return total


# ---- rounds in turns -----------------------------------------------------------------------------


class Stretched(Generation):
    """Takes in a part of its prompt, and repeats its rows of the caches for the rest."""

    def prefill(self) -> None:
        whole = self.request
        self.request = replace(whole, prompt=whole.prompt[:, : PART + 1])
        super().prefill()
        self.request = whole
        stretch(self.cache, whole.prompt.shape[1] - 1)

    def _finish_prefill(self, outcome: Outcome) -> None:
        super()._finish_prefill(outcome)
        if self.draft is not None:
            stretch(self.draft.caches.full, self.request.prompt.shape[1] - 1)


def stretch(cache: KVCache, length: int) -> None:
    """Repeat the committed rows of ``cache`` until there are ``length``."""
    have = cache.length
    for layer in cache.kv_layers:
        for rows in (layer.keys, layer.values):
            for start in range(have, length, have):
                end = min(start + have, length)
                rows[:, :, start:end] = rows[:, :, : end - start]
    cache.advance(length - have)


class Rounds:
    """Runs the rounds of one contestant.

    Args:
        spec: its own.
        prompt: [1, L] int64.
        tokens: how many to write in all turns, the uncounted ones included.

    Attributes:
        seconds: of each round that counts.
        phases: seconds of all rounds that count, by phase.
        ended: it has written all that it will.
    """

    def __init__(self, spec: SpecExtend, prompt: torch.Tensor, tokens: int):
        self.spec = spec
        self.seconds: list[float] = []
        self.phases: Counter = Counter()
        self._stream = spec.stream(prompt, max_new_tokens=tokens, do_sample=False)
        self.ended = next(self._stream, None) is None  # the prefill, and the first token

    def turn(self, tokens: int, counted: bool = True) -> None:
        """Rounds until ``tokens`` have been written; the first one does not count."""
        written, first = 0, True
        while written < tokens and not self.ended:
            before = Counter(self.spec.stats.seconds)
            start = time.perf_counter()
            step = next(self._stream, None)
            took = time.perf_counter() - start
            self.ended = step is None
            if step is not None:
                written += len(step.tokens)
                if counted and not first:
                    self.seconds.append(took)
                    self.phases += Counter(self.spec.stats.seconds) - before
            first = False

    def close(self) -> None:
        self._stream.close()

    @property
    def emitted(self) -> float:
        """Mean tokens of a round."""
        return self.spec.stats.mean_acceptance_length

    def phase_seconds(self) -> dict[str, float]:
        """Mean seconds of a round that counts, by phase."""
        return {p: self.phases[p] / len(self.seconds) for p in PHASES[2:] if self.phases[p]}


def in_turns(
    specs: dict[str, SpecExtend], prompt: torch.Tensor, turns: int, warmup: int
) -> dict[str, Rounds]:
    """Run all contestants' rounds, in ``turns``, behind ``warmup`` tokens that do not count."""
    longest = 1 + max(spec.config.max_depth for spec in specs.values())
    tokens = 1 + warmup + turns * TURN + (turns + 2) * longest  # a turn may write that much more
    ran = {name: Rounds(spec, prompt, tokens) for name, spec in specs.items()}
    for rounds in ran.values():
        rounds.turn(warmup, counted=False)
    for _ in range(turns):
        for rounds in ran.values():
            rounds.turn(TURN)
    for rounds in ran.values():
        rounds.close()
    return ran


def report(
    results: Report,
    case: str,
    own: Rounds,
    plain: Rounds,
    least: Bound,
    plain_least: Bound,
    **facts,
) -> dict:
    """Add a line of rounds: break-even, phases, and plain rounds beside them."""
    spread, peer = Spread(own.seconds), Spread(plain.seconds)
    # Of means, as in the gate: what only every fourth round does, retrieval, has its share.
    needed, phases = break_even(spread.mean, peer.mean), own.phase_seconds()
    shares = ", ".join(f"{name} {digits(s * 1e3)}" for name, s in phases.items())
    remarks = f"break-even {needed:.2f} tokens | {shares} ms"
    if facts.get("emitted") is not None:
        gain = facts["emitted"] / needed
        verdict = "pays" if gain >= 1 else "does not pay"
        remarks += f" | emits {facts['emitted']:.2f}: {gain:.2f} x plain, {verdict}"
    if facts.get("goal"):
        remarks += f" | {facts['goal']}"
    return results.add(
        case, spread, "ms", least, {"plain": peer}, remarks, break_even=needed, phases=phases,
        plain_share=plain_least.least / peer.median, **facts,
    )  # fmt: skip


# ---- the two parts -------------------------------------------------------------------------------


def bench_shape(arguments: argparse.Namespace, results: Report) -> None:
    device, rates = arguments.device, results.rates
    made = arguments.shape, max(arguments.contexts) + 4096, device, arguments.dtype
    fewer = {} if arguments.layers is None else {"num_hidden_layers": arguments.layers}
    target, draft = random_model(*made, **fewer), random_model(*made, **one_layer(arguments.shape))
    base = SpecConfig(gate="off", tree_shape="top_k", tree_width=8, tree_top_k=8, seed=0)
    grid: dict[int, list[str]] = {}
    for context in arguments.contexts:
        prompt = torch.randint(1, 1000, (1, context), device=device)
        for nodes, depth in arguments.trees:
            case = f"shape {arguments.shape} context={context} tree={nodes}x{depth}"
            if not results.wants(case):
                continue
            config = base.replace(tree_nodes=nodes, tree_depth=depth)
            if nodes == depth:  # a chain
                config = config.replace(tree_width=1, tree_top_k=1)
            # Nothing is kept: the text is not what a stretched cache has.
            how = dict(generation=Stretched, keep_contexts=0)
            specs = {
                "plain": SpecExtend(target, None, config, **how),
                "tree": SpecExtend(target, draft, config, **how),
            }
            ran = in_turns(specs, prompt, arguments.turns, arguments.warmup)
            least = bound(rates, target, context, config, draft, depth)
            gpu, goal = results.record["header"]["machine"]["gpu"] or "", None
            if "H200" in gpu and case == "shape llama-3.1-8b context=16384 tree=31x5":
                met = Spread(ran["tree"].seconds).median <= GOAL * least.least
                goal = f"<= {GOAL} x its bound: {'met' if met else 'MISSED'}"
            entry = report(
                results, case, ran["tree"], ran["plain"], least,
                bound(rates, target, context, config), context=context, nodes=nodes, depth=depth,
                goal=goal, mean_acceptance_length=ran["tree"].emitted,
            )  # fmt: skip
            grid.setdefault(context, []).append(f"{entry['break_even']:8.2f}")
            del ran, specs  # caches
    if len(grid) > 1:
        columns = "".join(f"{nodes}x{depth}".rjust(9) for nodes, depth in arguments.trees)
        results.note(f"\nbreak-even, tokens a round: context by tree\n{'':8}{columns}")
        for context, cells in grid.items():
            results.note(f"{context:8} {' '.join(cells)}")


def bench_pair(arguments: argparse.Namespace, results: Report) -> None:
    tokenizer, target, model = embedded_pair(arguments.device, arguments.dtype)
    base = SpecConfig().replace(**assets.SETTINGS, gate="off")
    drafts = {name: name for name in arguments.pair_drafts}
    drafts |= {name: assets.draft_path(name) for name in drafts if name in assets.DRAFTS}
    if "model" in drafts:
        drafts["model"] = model
    ways = []
    for name, draft in drafts.items():
        kinds = SpecExtend(target, draft, base).draft.cache_kinds
        kinds = [kind for kind in ("full", "window", "retrieval") if kind in kinds] or kinds
        ways += [(name, kind, base.tree_nodes) for kind in kinds]
        sizes = [nodes for nodes in arguments.pair_trees if nodes != base.tree_nodes]
        ways += [(name, kinds[-1], nodes) for nodes in sizes]
    for context in arguments.pair_contexts:
        named = {
            f"pair {name} {kind} context={context} tree={nodes}": (
                name,
                base.replace(
                    draft_cache=kind, tree_nodes=nodes, tree_depth=min(nodes, base.tree_depth)
                ),
            )
            for name, kind, nodes in ways
        }
        named = {case: way for case, way in named.items() if results.wants(case)}
        if not named:
            continue
        specs = {"plain": SpecExtend(target, None, base, keep_contexts=0)}
        for case, (name, config) in named.items():
            specs[case] = SpecExtend(target, drafts[name], config, keep_contexts=0)
        _, ids = assets.demo_prompt(tokenizer, context)
        prompt = torch.tensor([ids], device=arguments.device)
        ran = in_turns(specs, prompt, arguments.pair_turns, arguments.warmup)
        for case, (name, config) in named.items():
            own = ran[case]
            report(
                results, case, own, ran["plain"],
                bound(results.rates, target, context, config, drafts[name], 1),
                bound(results.rates, target, context, config), context=context, draft=name,
                draft_cache=config.draft_cache, nodes=config.tree_nodes, emitted=own.emitted,
                stats=own.spec.stats.as_dict(),
            )  # fmt: skip


def trees(text: str) -> list[tuple[int, int]]:
    """Read nodes and levels of ``8x3,32x5``."""
    pairs = [part.split("x") for part in text.split(",")]
    return [(int(nodes), int(depth)) for nodes, depth in pairs]


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--parts", nargs="+", choices=("shape", "pair"), default=["shape", "pair"])
    made.add_argument("--shape", choices=SHAPES, help="default: llama-3.1-8b, on a CPU small")
    made.add_argument("--layers", type=int, help="of the shape, if not all of them")
    made.add_argument("--dtype", choices=DTYPES, help="default: bf16, on a CPU fp32")
    made.add_argument("--contexts", type=numbers, help="of the shape, such as 2048,16384")
    made.add_argument(
        "--trees",
        type=trees,
        help="of the shape, nodes x levels: 8x3,32x5; as many of both: a chain",
    )
    made.add_argument("--turns", type=int, help=f"of each shape's case, {TURN} tokens each")
    made.add_argument("--pair-contexts", type=numbers, help="of the pair, 17000 at most")
    made.add_argument("--pair-trees", type=numbers, help="of the pair, in nodes: 2,16")
    made.add_argument(
        "--pair-drafts", nargs="+", default=["model"], choices=(*assets.DRAFTS, "ngram", "self"),
        help="default: the pair's own",
    )  # fmt: skip
    made.add_argument("--pair-turns", type=int, help="of each of the pair's cases")
    return made


def main() -> None:
    arguments = parse(options())
    cuda, quick = arguments.device == "cuda", arguments.quick

    def default(name: str, value, quick_value) -> None:
        if getattr(arguments, name) is None:
            setattr(arguments, name, quick_value if quick else value)

    default("shape", *["llama-3.1-8b" if cuda else "small"] * 2)
    longer = [131072] if cuda else []
    contexts = [2048, 4096, 8192, 16384, 32768, 65536, *longer]
    default("contexts", contexts, [16384] if cuda else [2048, 8192])
    # Nodes: the root comes on top, so that 31 and 63 fill the kernels' tiles and 32 and 64 do not.
    sizes = trees("1x1,8x1,8x3,8x5,16x5,31x5,32x5,63x5,64x5")
    default("trees", sizes, trees("31x5,32x5" if cuda else "8x5,32x5"))
    default("turns", 5 if cuda else 2, 5 if cuda else 1)
    default("pair_contexts", [2048, 8192, 16000], [2048, 8192, 16000] if cuda else [2048])
    default("pair_trees", [1, 3, 12, 24, 48], [24])
    default("pair_turns", 24, 8)
    default("dtype", *["bf16" if cuda else "fp32"] * 2)
    arguments.dtype = DTYPES[arguments.dtype]
    arguments.warmup = 16 if cuda else 2  # rounds in which graphs are captured

    results = Report(
        arguments, 0.05 if quick else 0.5, dtype=name_of(arguments.dtype), shape=arguments.shape,
        layers=arguments.layers, draft="one layer of the shape",
    )  # fmt: skip
    for part in arguments.parts:
        {"shape": bench_shape, "pair": bench_pair}[part](arguments, results)


if __name__ == "__main__":
    main()
