"""Distils the embedded draft from the target on people's text: windows, then working caches."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from .corpus import MAX_CONTEXT, Windows
from .model import copying_start, hidden_states, new_model
from .training import Optimizer, backward, schedule


def chunk_mass(q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return the attention mass per chunk of the last layer, mean over heads.

    Args:
        q: rotated, scaled queries [H, L, D].
        k: rotated keys [H, L, D].
        rows: positions that ask [T].
        chunk: tokens a chunk; L is a multiple of it.

    Returns:
        [T, L / chunk], each row sums to 1.
    """
    scores = torch.bmm(q[:, rows], k.transpose(1, 2)).float()
    scores.masked_fill_(torch.arange(k.shape[1]) > rows[:, None], -math.inf)
    return scores.softmax(-1).mean(0).unflatten(-1, (-1, chunk)).sum(-1)


def retrieved(mass: torch.Tensor, at: int, budget: int, recent: int, chunk: int) -> torch.Tensor:
    """Return the positions of a working cache for a query at `at`: best chunks and recent tokens.

    The recent part begins at a chunk boundary, `recent` to `recent + chunk` tokens before `at`;
    whole chunks before it fill the budget, ascending.
    """
    first = max(0, (at + 1 - recent) // chunk)
    room = max(0, budget - (at + 1 - first * chunk)) // chunk
    best = mass[:first].topk(min(room, first)).indices.sort().values
    chunks = (best[:, None] * chunk + torch.arange(chunk)).flatten()
    return torch.cat((chunks, torch.arange(first * chunk, at + 1)))


def retrieval_windows(
    target: LlamaForCausalLM, windows: Windows, rng: np.random.Generator, length: int = 512
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make working caches of a long document: tokens, the target's hidden states, rows to learn.

    The target reads the whole document; the draft will see each window as if it were all.
    """
    size = MAX_CONTEXT if rng.random() < 0.25 else MAX_CONTEXT // 2
    doc, at, _ = (
        windows.window(size, 1.0)
        if size == MAX_CONTEXT
        else (windows.document(size), np.arange(size), None)
    )
    if size < MAX_CONTEXT:
        windows.copies(doc, 8, 400)
    ids, last = torch.from_numpy(doc), []
    hidden = hidden_states(target, ids[None], torch.from_numpy(at)[None], last)[0]
    rows = torch.from_numpy(rng.choice(np.arange(length, size - 64), size // 64, replace=False))
    mass = chunk_mass(last[0][0], last[1][0], rows, 32)
    picks = []
    for i, row in enumerate(rows.tolist()):
        ahead = int(rng.integers(16, 64))  # tokens written before the next selection
        if rng.random() < 0.25:
            picks.append(torch.arange(row + ahead - length + 1, row + ahead + 1))
            continue
        seen = retrieved(mass[i], row, length - ahead, int(rng.choice((32, 64, 96))), 32)
        tail = torch.arange(row + 1, row + 1 + length - len(seen))
        picks.append(torch.cat((seen, tail)))
    pick = torch.stack(picks)
    known = torch.ones_like(pick, dtype=torch.bool)
    jump = pick[:, 1:] != pick[:, :-1] + 1
    known[:, 0] = False
    known[:, 1:] &= ~jump  # a passage's first token has no context yet
    known[:, 2:] &= ~jump[:, :-1]
    return ids[pick], hidden[pick], known


def train_draft(
    target: LlamaForCausalLM, work: Path, minutes: float, seed: int
) -> LlamaForCausalLM:
    """Distil the target into the draft, on windows of at most 512 tokens.

    They begin as short windows that both read. Then they are working caches: the target reads the
    whole document, its last layer's attention chooses the chunks, and the draft sees these alone.
    """
    torch.manual_seed(seed + 1)
    draft, windows = new_model("draft"), Windows(work, seed + 1)
    copying_start(draft, seed, target)
    optimizer, head = Optimizer(draft, 0.02, 4e-3), target.model.embed_tokens.weight
    target.requires_grad_(False)
    smooth, agree, start, tokens = 8.3, 0.0, time.time(), 0
    pool: list[tuple[torch.Tensor, ...]] = []
    while (progress := (time.time() - start) / (minutes * 60)) < 1:
        if progress < 0.45:
            length = (256, 512)[optimizer.steps % 2]
            ids, at, labels = windows.batch(
                (4096 if progress < 0.25 else 8192) // length, length, 0.6
            )
            hidden = hidden_states(target, ids, at)
            known = labels >= 0
        else:
            if not pool:  # windows of two documents, mixed
                both = [retrieval_windows(target, windows, windows.rng) for _ in range(2)]
                pool = list(zip(*(torch.cat(x) for x in zip(*both, strict=True)), strict=True))
                windows.rng.shuffle(pool)
            ids, hidden, known = (torch.stack(x) for x in zip(*pool[:16], strict=True))
            pool = pool[16:]
        hidden, known, hits = hidden.flatten(0, 1), known.flatten(), []

        measure = optimizer.steps % 5 == 0

        def loss_of(logits, rows, hidden=hidden, known=known, hits=hits, measure=measure):
            teacher = F.linear(hidden[rows], head)
            weight = known[rows] / known.sum()
            if measure:
                hits.append(((teacher.argmax(-1) == logits.argmax(-1)) * weight).sum().item())
            soft = (teacher.softmax(-1) * logits.log_softmax(-1)).sum(-1).float()
            return -(soft * weight).sum()

        at = torch.arange(ids.shape[1]).expand_as(ids)
        loss = backward(draft, hidden_states(draft, ids, at), loss_of, 512)
        optimizer.step(schedule(optimizer.steps, progress, 0.5))
        smooth += 0.05 * (loss - smooth)
        agree += 0.2 * (sum(hits) - agree) * measure
        tokens += ids.numel()
        if optimizer.steps % 25 == 0:
            print(
                f"draft: step {optimizer.steps} {(time.time() - start) / 60:.1f} min "
                f"{tokens / 1e6:.2f} M tokens loss {smooth:.3f} agreement "
                f"{agree:.3f}",
                flush=True,
            )
    return draft
