"""How long drafts are accepted on held-out documents, and how that falls with length.

    python bench/bench_acceptance.py --drafts ngram longspec=FOLDER --lengths 2048,8192,16384

The target writes its greedy continuation once per document; every draft then proposes along it,
which gives the loop's acceptance lengths without its verify passes. Documents are the embedded
pair's held-out modules of the standard library, cut at each length. A draft is ``ngram``, or
``NAME=FOLDER`` of a causal LM or a trained head; ``NAME=FOLDER:window`` gives it a recent window
instead of the full cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from specextend import SpecConfig, assets  # noqa: E402
from specextend.attention import PatchedModel  # noqa: E402
from specextend.draft import load_draft  # noqa: E402
from specextend.train.validation import Continuation, count_rounds  # noqa: E402


def documents(tokenizer, length: int, count: int) -> list[tuple[str, torch.Tensor]]:
    """Names and prompts [1, length] of the first modules that are long enough."""
    found = []
    for name, text in assets.held_out_documents():
        ids = tokenizer(text).input_ids
        if len(ids) >= length and len(found) < count:
            found.append((name, torch.tensor([ids[:length]])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--drafts", nargs="+", default=["ngram"])
    parser.add_argument("--lengths", default="2048,8192,16384")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--new", type=int, default=96, help="tokens to write behind each prompt")
    parser.add_argument("--budget", type=int, default=512, help="tokens of a window")
    parser.add_argument("--json", type=Path, help="write all counts here")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(assets.target_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(assets.target_path(), model_max_length=10**9)
    target = PatchedModel(model)

    drafts = {}
    for name in args.drafts:
        name, _, path = name.partition("=")
        path, _, cache = path.partition(":")
        config = SpecConfig(
            tree_shape="fixed", draft_cache=cache or "full", budget=args.budget, gate="off"
        )
        drafts[name] = load_draft(path or name, target, config), config
    layers = tuple(sorted({i for draft, _ in drafts.values() for i in draft.feature_layers}))
    results = []
    for length in map(int, args.lengths.split(",")):
        sums = {name: [0, 0] for name in drafts}
        found = documents(tokenizer, length, args.documents)
        for document, ids in found:
            continuation = Continuation(target, ids, args.new, layers)
            for name, (draft, config) in drafts.items():
                emitted, rounds = count_rounds(draft, continuation, config)
                sums[name] = [sums[name][0] + emitted, sums[name][1] + rounds]
                results.append([length, document, name, emitted, rounds])
                print(f"{length:6} {document:28} {name:16} {emitted / rounds:.3f}", flush=True)
        for name, (emitted, rounds) in sums.items():
            print(f"{length:6} {len(found)} documents {'':16} {name:16} {emitted / rounds:.3f}")
    if args.json:
        args.json.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
