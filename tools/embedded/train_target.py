"""Trains the embedded target on windows of growing length."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from specextend.assets import held_out_documents

from .corpus import MAX_CONTEXT, Windows
from .model import copying_start, hidden_states, new_model
from .training import Optimizer, backward, schedule


def held_out_text(work: Path) -> np.ndarray:
    """Return the tokens of one held-out module, for the progress lines."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    return np.array(tokenizer(dict(held_out_documents())["argparse.py"])["input_ids"])


@torch.no_grad()
def probe(model: LlamaForCausalLM, ids: np.ndarray, length: int) -> str:
    """Say the held-out loss, and how often a passage is continued that stood near the beginning."""
    ids = ids[:length].copy()
    n = min(256, length // 4)
    ids[-n:] = ids[n // 2 : n // 2 + n]
    x = torch.from_numpy(ids)[None]
    h = hidden_states(model, x, torch.arange(length)[None])[0, :-1]
    logits = torch.cat([F.linear(b, model.model.embed_tokens.weight) for b in h.split(1024)])
    loss = F.cross_entropy(logits[:-n].float(), x[0, 1:-n])
    right = (logits.argmax(-1) == x[0, 1:]).float()
    return (
        f"{length}: loss {loss:.3f} top-1 {right[:-n].mean():.3f} copy {right[8 - n :].mean():.3f}"
    )


# Each phase: until this share of the time, windows a step, tokens a window, windows with copies.
TARGET_PHASES = (
    (0.12, 8, 512, 0.8),
    (0.42, 4, 1024, 0.5),
    (0.67, 8, 1024, 0.4),
    (0.79, 2, 4096, 1.0),
    (0.93, 1, 8192, 1.0),
    (1.0, 1, MAX_CONTEXT, 1.0),
)


def train_target(work: Path, minutes: float, seed: int, resume: bool) -> LlamaForCausalLM:
    """Train the target for so many minutes; save a checkpoint every three."""
    torch.manual_seed(seed)
    model, windows, text = new_model("target"), Windows(work, seed), held_out_text(work)
    copying_start(model, seed)
    optimizer = Optimizer(model, muon_lr=0.02, adam_lr=4e-3)
    used, saved, tokens, smooth = 0.0, 0.0, 0, None
    if resume:
        state = torch.load(work / "target.pt", weights_only=False)
        model.load_state_dict(state["model"])
        vars(optimizer).update(state["optimizer"])
        used, tokens = state["used"], state["tokens"]
        windows.rng = np.random.default_rng(seed + optimizer.steps)
    last, budget = time.time(), minutes * 60
    while used < budget:
        progress = used / budget
        count, length, copying = next(x[1:] for x in TARGET_PHASES if progress < x[0])
        ids, at, labels = windows.batch(count, length, copying)
        labels, n = labels.flatten(), int((labels >= 0).sum())

        def loss_of(logits, rows, labels=labels, n=n):
            return F.cross_entropy(logits, labels[rows], reduction="sum") / n

        loss = backward(model, hidden_states(model, ids, at), loss_of)
        smooth = loss if smooth is None else smooth + 0.03 * (loss - smooth)
        optimizer.step(schedule(optimizer.steps, progress, 0.6))
        tokens += ids.numel()
        if optimizer.steps % 20 == 0 or length == MAX_CONTEXT:
            rate = ids.numel() / (time.time() - last)
            print(
                f"target: step {optimizer.steps} {used / 60:.1f} min {tokens / 1e6:.2f} M tokens "
                f"{rate:.0f}/s window {length} loss {smooth:.3f}",
                flush=True,
            )
        if optimizer.steps % 100 == 0 or used - saved > 180:
            print("target:", "; ".join(probe(model, text, n) for n in (1024, 8192)), flush=True)
        now = time.time()
        used, last = used + now - last, now
        if used - saved > 180 or used >= budget:
            keep = {k: v for k, v in vars(optimizer).items() if k != "params"}
            torch.save(
                {"model": model.state_dict(), "optimizer": keep, "used": used, "tokens": tokens},
                work / "target.pt",
            )
            saved = used
    return model
