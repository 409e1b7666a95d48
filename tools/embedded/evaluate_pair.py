"""Measures the embedded pair on held-out modules of the standard library.

    python -m tools.embedded.evaluate_pair --lengths 4096,8192,16384

The target's figures are loss, top-1 accuracy, and accuracy where the last eight tokens stood
already more than 512 tokens before. The draft's are the mean acceptance lengths of greedy decoding
behind each document, by what the draft attends to. "Full prefill" is retrieval from keys and values
that a prefill without a window has made.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from specextend import SpecExtend
from specextend.assets import SETTINGS, draft_path, held_out_documents, target_path
from specextend.attention import PatchedModel
from specextend.cache import KVCache, Pass

PART = 1024  # tokens of a document that the target reads at a time
CACHES = {
    "full": {"draft_cache": "full"},
    "window": {"draft_cache": "window"},
    "retrieval": {"draft_cache": "retrieval"},
    "retrieval, full prefill": {"draft_cache": "retrieval", "draft_prefill_window": None},
}


@torch.inference_mode()
def read(target: LlamaForCausalLM, ids: torch.Tensor) -> dict[str, float]:
    """Measure how well the target knows a document [L]."""
    patched = PatchedModel(target)
    cache = KVCache(target.config.num_hidden_layers, len(ids), 1, ids.device)
    losses, right = [], []
    for start in range(0, len(ids), PART):
        part = ids[None, start : start + PART]
        count = part.shape[1]
        state = Pass(cache, [(cache, cache.lens)], count)
        at = torch.arange(start, start + count)[None]
        logits = patched.forward(part, at, state, last_only=False)[0]
        cache.advance(count)
        following = ids[start + 1 : start + 1 + count]
        logits = logits[: len(following)].float()
        losses.append(F.cross_entropy(logits, following, reduction="none"))
        right.append(logits.argmax(-1) == following)
    hits = torch.cat(right).float()
    return {
        "target: loss": torch.cat(losses).mean().item(),
        "target: top-1": hits.mean().item(),
        "target: top-1 on repeats": hits[repeats(ids)].mean().item(),
    }


def repeats(ids: torch.Tensor, n: int = 8, distance: int = 512) -> torch.Tensor:
    """Find rows whose last n tokens stood already `distance` tokens before; [L - 1] booleans."""
    seen: dict[tuple[int, ...], int] = {}
    text, out = ids.tolist(), torch.zeros(len(ids) - 1, dtype=torch.bool)
    for i in range(n - 1, len(text) - 1):
        gram = tuple(text[i - n + 1 : i + 1])
        first = seen.setdefault(gram, i)
        out[i] = i - first > distance
    return out


def accepted(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, ids: torch.Tensor, new: int
) -> dict[str, float]:
    """Measure acceptance of `new` tokens behind a document [L], for each cache of the draft."""
    found, texts = {}, set()
    for name, options in CACHES.items():
        spec = SpecExtend(target, draft, gate="off", **SETTINGS, **options)
        out = spec.generate(ids[None], max_new_tokens=new, do_sample=False)
        texts.add(tuple(out[0].tolist()))
        found[f"draft: {name}"] = spec.stats.mean_acceptance_length
    assert len(texts) == 1, "the draft's cache has changed what the target writes"
    return found


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=target_path())
    parser.add_argument("--draft", type=Path, default=draft_path())
    parser.add_argument("--lengths", default="4096,8192,16384")
    parser.add_argument("--documents", type=int, default=99)
    parser.add_argument("--new", type=int, default=128, help="tokens behind a document")
    args = parser.parse_args()
    target, draft = (
        LlamaForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (args.target, args.draft)
    )
    tokenizer = AutoTokenizer.from_pretrained(args.target, model_max_length=10**9)
    documents = [(name, tokenizer(text).input_ids) for name, text in held_out_documents()]
    for length in map(int, args.lengths.split(",")):
        rows: dict[str, list[float]] = {}
        long_enough = [(name, ids) for name, ids in documents if len(ids) >= length]
        for name, ids in long_enough[: args.documents]:
            document = torch.tensor(ids[:length])
            result = read(target, document) | accepted(target, draft, document, args.new)
            print(
                f"  {length} {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in result.items()),
                flush=True,
            )
            for k, v in result.items():
                rows.setdefault(k, []).append(v)
        print(f"\n{length} tokens, {len(long_enough[: args.documents])} documents: mean (range)")
        for key, values in rows.items():
            mean = sum(values) / len(values)
            print(f"{key:32s} {mean:.3f}  ({min(values):.3f} to {max(values):.3f})")
        print(flush=True)


if __name__ == "__main__":
    main()
