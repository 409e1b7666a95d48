"""Measures how long drafts are accepted on held-out documents, and how that falls with length.

    python bench/bench_acceptance.py --drafts ngram longspec=FOLDER --lengths 2048,8192,16384

The target writes its greedy continuation once per document; every draft then proposes along it,
which gives the loop's acceptance lengths without its verify passes. Documents are the embedded
pair's held-out modules of the standard library, cut at each length. A draft is ``ngram``, or
``NAME=FOLDER`` of a causal LM or a trained head; ``NAME=FOLDER:window`` gives it a recent window
instead of the full cache.

A line has the tokens of a round, the median over documents, and the other drafts beside it: a ratio
above one is that of a draft that is accepted for longer.
"""

from __future__ import annotations

import argparse

import torch
from bench_record import Report, embedded_pair, numbers, parse, parser

from specextend import SpecConfig, assets
from specextend.draft import load_draft
from specextend.target import Target
from specextend.testing import Spread
from specextend.train.validation import Continuation, count_rounds


def documents(tokenizer, length: int, count: int) -> list[tuple[str, torch.Tensor]]:
    """Return names and prompts [1, length] of the first modules that are long enough."""
    found = []
    for name, text in assets.held_out_documents():
        ids = tokenizer(text).input_ids
        if len(ids) >= length and len(found) < count:
            found.append((name, torch.tensor([ids[:length]])))
    return found


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--drafts", nargs="+", default=["ngram"])
    made.add_argument("--lengths", type=numbers, help="default 2048,8192,16384, quick 1024")
    made.add_argument("--documents", type=int, help="default 4, quick 2")
    made.add_argument("--new", type=int, help="tokens behind each prompt; default 96, quick 24")
    made.add_argument("--budget", type=int, default=512, help="tokens of a window")
    return made


def main() -> None:
    arguments = parse(options())
    quick = arguments.quick
    lengths = arguments.lengths or ([1024] if quick else [2048, 8192, 16384])
    count = arguments.documents or (2 if quick else 4)
    new = arguments.new or (24 if quick else 96)
    tokenizer, model, _ = embedded_pair(arguments.device)
    target = Target(model)

    drafts = {}
    for given in arguments.drafts:
        name, _, path = given.partition("=")
        path, _, cache = path.partition(":")
        config = SpecConfig(
            tree_shape="fixed", draft_cache=cache or "full", budget=arguments.budget, gate="off"
        )
        drafts[name] = load_draft(path or name, target, config), config
    layers = tuple(sorted({i for draft, _ in drafts.values() for i in draft.feature_layers}))
    results = Report(arguments, new_tokens=new, window=arguments.budget)
    for length in lengths:
        counts: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in drafts}
        for document, ids in documents(tokenizer, length, count):
            ids = ids.to(arguments.device)
            continuation = Continuation(target, ids, new, layers)
            for name, (draft, config) in drafts.items():
                counts[name][document] = count_rounds(draft, continuation, config)
        found = {
            name: Spread([emitted / rounds for emitted, rounds in by_document.values()])
            for name, by_document in counts.items()
            if by_document
        }
        for name, spread in found.items():
            case = f"acceptance {name} context={length}"
            if not results.wants(case):
                continue
            emitted, rounds = map(sum, zip(*counts[name].values(), strict=True))
            results.add(
                case, spread, "tokens", None,
                {other: peer for other, peer in found.items() if other != name},
                f"{emitted / rounds:.3f} over all rounds of {len(counts[name])} documents",
                draft=name, context=length, mean=emitted / rounds, documents=counts[name],
            )  # fmt: skip


if __name__ == "__main__":
    main()
