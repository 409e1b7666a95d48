"""Measures the embedded pair on held-out modules of the standard library.

    python -m specextend.assets.evaluate_pair --lengths 4096,8192,16384

Target: loss, top-1 accuracy, and accuracy where the last eight tokens stood already more than 512
tokens before. Draft: how often its first choice is the target's, reading the document's own text,
when its cache holds everything, a recent window, or the chunks that the last layer of the target
attends to and a few recent tokens. The draft's keys and values come from a prefill of the whole
document, full or with a sliding window; gathered keys are turned to their new positions.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

if __package__ in (None, ""):  # run by path
    sys.path.insert(0, str(Path(__file__).parents[2]))

from specextend.assets import draft_path, held_out_documents, target_path
from specextend.assets.train_pair import chunk_mass, hidden_states, norm, retrieved

AHEAD = 12  # tokens read with the same selection
BLOCK = 128


@dataclass
class Reading:
    """What the target makes of a document."""

    choice: torch.Tensor  # its first choice for the next token, per row
    queries: torch.Tensor  # last layer, rotated and scaled [H, L, D]
    keys: torch.Tensor  # last layer, rotated [H, L, D]
    loss: float
    right: torch.Tensor  # whether the first choice is the text's next token


def read(target: LlamaForCausalLM, ids: torch.Tensor) -> Reading:
    """One pass of the target over a document [L], logits a block at a time."""
    last: list[torch.Tensor] = []
    at = torch.arange(len(ids))
    hidden = hidden_states(target, ids[None], at[None], last)[0]
    choice, loss = [], 0.0
    for i in range(0, len(ids), 1024):
        logits = F.linear(hidden[i : i + 1024], target.model.embed_tokens.weight).float()
        choice.append(logits.argmax(-1))
        following = ids[i + 1 : i + 1 + len(logits)]
        loss += F.cross_entropy(logits[: len(following)], following, reduction="sum").item()
    chosen = torch.cat(choice)
    return Reading(chosen, last[0][0], last[1][0], loss / (len(ids) - 1), chosen[:-1] == ids[1:])


def repeats(ids: torch.Tensor, n: int = 8, distance: int = 512) -> torch.Tensor:
    """Rows whose last n tokens stood already `distance` tokens before; [L - 1] booleans."""
    seen: dict[tuple[int, ...], int] = {}
    text, out = ids.tolist(), torch.zeros(len(ids) - 1, dtype=torch.bool)
    for i in range(n - 1, len(text) - 1):
        gram = tuple(text[i - n + 1 : i + 1])
        first = seen.setdefault(gram, i)
        out[i] = i - first > distance
    return out


class DraftCache:
    """Keys before rotation and values of every layer of a draft that has read a document."""

    def __init__(self, draft: LlamaForCausalLM, ids: torch.Tensor, span: int) -> None:
        self.draft, self.layers = draft, []
        c = draft.config
        half = torch.arange(0, c.head_dim, 2) / c.head_dim
        self.frequency = c.rope_parameters["rope_theta"] ** -half
        x = F.embedding(ids, draft.model.embed_tokens.weight)
        for layer in draft.model.layers:
            q, k, v = self.project(layer, x)
            self.layers.append((k, v))
            at = torch.arange(len(ids))
            q, k, out = self.turn(q, at), self.turn(k, at), torch.empty_like(q)
            for i in range(0, len(ids), BLOCK):
                first, end = max(0, i - span), min(i + BLOCK, len(ids))
                rows, columns = torch.arange(i, end)[:, None], torch.arange(first, end)
                mask = (columns <= rows) & (columns > rows - span)
                out[:, i:end] = F.scaled_dot_product_attention(
                    q[:, i:end], k[:, first:end], v[:, first:end], attn_mask=mask
                )
            x = self.finish(layer, x, out)

    def turn(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Rotates [H, n, D] to positions [n]."""
        angle = at[:, None] * self.frequency
        cos, sin = angle.cos(), angle.sin()
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    def project(self, layer, x: torch.Tensor):
        a, h = layer.self_attn, norm(x, layer.input_layernorm)
        return (
            p(h).unflatten(-1, (-1, self.draft.config.head_dim)).transpose(0, 1)
            for p in (a.q_proj, a.k_proj, a.v_proj)
        )

    def finish(self, layer, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        x = x + layer.self_attn.o_proj(out.transpose(0, 1).flatten(1))
        return x + layer.mlp(norm(x, layer.post_attention_layernorm))

    def choose(self, keep: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """First choices after each of `new` [G], with a cache of the rows `keep`, compacted."""
        n, g = len(keep), len(new)
        at = torch.arange(n + g)
        mask = at <= at[n:, None]
        x = F.embedding(new, self.draft.model.embed_tokens.weight)
        for layer, (old_k, old_v) in zip(self.draft.model.layers, self.layers, strict=True):
            q, k, v = self.project(layer, x)
            k = self.turn(torch.cat((old_k[:, keep], k), 1), at)
            v = torch.cat((old_v[:, keep], v), 1)
            x = self.finish(
                layer, x, F.scaled_dot_product_attention(self.turn(q, at[n:]), k, v, attn_mask=mask)
            )
        return F.linear(
            norm(x, self.draft.model.norm), self.draft.model.embed_tokens.weight
        ).argmax(-1)


def agreement(
    target: Reading,
    draft: LlamaForCausalLM,
    ids: torch.Tensor,
    queries: int,
    budget: int,
    chunk: int,
    span: int,
) -> dict[str, float]:
    """Share of rows where draft and target choose alike, per kind of cache."""
    length = len(ids)
    rows = torch.linspace(length // 2, length - AHEAD - 1, queries).long()
    mass = chunk_mass(target.queries, target.keys, rows, chunk)
    caches = {"full": DraftCache(draft, ids, length), "sliding": DraftCache(draft, ids, span)}
    hits: dict[str, int] = {}
    for i, row in enumerate(rows.tolist()):
        new, want = ids[row : row + AHEAD], target.choice[row : row + AHEAD]
        keeps = {
            "everything": torch.arange(row),
            f"window {budget}": torch.arange(row - budget, row),
        }
        for recent in (budget // 8, budget // 4, budget // 2):
            keeps[f"retrieval {budget}, recent {recent}"] = retrieved(
                mass[i], row - 1, budget, recent, chunk
            )
        for kind, keep in keeps.items():
            for how, cache in caches.items():
                name = f"{kind} ({how} prefill)"
                same = (cache.choose(keep, new) == want).sum().item()
                hits[name] = hits.get(name, 0) + same
    return {k: v / (queries * AHEAD) for k, v in hits.items()}


@torch.no_grad()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=target_path())
    parser.add_argument("--draft", type=Path, default=draft_path())
    parser.add_argument("--lengths", default="4096,8192,16384")
    parser.add_argument("--documents", type=int, default=99)
    parser.add_argument("--queries", type=int, default=48)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--span", type=int, default=512, help="window of the sliding prefill")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target, draft = (
        LlamaForCausalLM.from_pretrained(p, dtype=torch.bfloat16) for p in (args.target, args.draft)
    )
    tokenizer = AutoTokenizer.from_pretrained(args.target, model_max_length=10**9)
    for length in map(int, args.lengths.split(",")):
        rows: dict[str, list[float]] = {}
        names = []
        for name, text in held_out_documents():
            ids = torch.tensor(tokenizer(text)["input_ids"])
            if len(ids) < length or len(names) >= args.documents:
                continue
            ids = ids[:length]
            names.append(name)
            reading = read(target, ids)
            again = repeats(ids)
            result = {
                "target loss": reading.loss,
                "target top-1": reading.right.float().mean().item(),
                f"target top-1 on repeats ({again.float().mean():.0%} here)": reading.right[again]
                .float()
                .mean()
                .item(),
            }
            result |= agreement(
                reading, draft, ids, args.queries, args.budget, args.chunk, args.span
            )
            print(
                f"  {length} {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in result.items()),
                flush=True,
            )
            for k, v in result.items():
                rows.setdefault(k.split(" (")[0] if "repeats" in k else k, []).append(v)
        print(f"\n{length} tokens, {len(names)} documents: mean (lowest to highest)")
        for key, values in rows.items():
            values = [v for v in values if v == v]
            print(
                f"{key:52s} {sum(values) / max(1, len(values)):.3f}  "
                f"({min(values):.3f} to {max(values):.3f})"
            )
        print(flush=True)


if __name__ == "__main__":
    main()
