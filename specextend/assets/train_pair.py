"""Trains the embedded pair (target and draft) on one CPU core, from text that is on the machine.

    python -m specextend.assets.train_pair --minutes-target 60 --minutes-draft 20

Stages: `data` (text, tokenizer, token files), `target`, `draft`, and `distil`, which goes on with
the draft (distil_draft.py). README.md beside this file says what came out. glibc's huge pages make
the attention a fifth faster:
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_TOP_PAD_=268435456 python ...
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import MAX_CONTEXT, VOCAB, Windows, prepare, write_corpus

HERE = Path(__file__).parent

# --------------------------------------------------------------------------- model and optimizer


class CausalAttention(torch.autograd.Function):
    """Causal attention in bf16 by blocks of rows; several times torch's own on one core.

    q (scaled), k, v: [B, H, L, D]. Probabilities are kept for short windows, else recomputed.
    """

    BLOCK = 256

    @staticmethod
    def probabilities(q, k, i, e):
        s = torch.bmm(q[:, i:e], k[:, :e].transpose(1, 2))
        corner = torch.ones(e - i, e - i, dtype=torch.bool).triu_(1)
        s[:, :, i:].masked_fill_(corner, -math.inf)
        return torch.softmax(s, -1)

    @staticmethod
    def forward(ctx, q, k, v):
        out, kept = torch.empty_like(q), []
        for b in range(q.shape[0]):
            for i in range(0, q.shape[2], CausalAttention.BLOCK):
                e = min(i + CausalAttention.BLOCK, q.shape[2])
                p = CausalAttention.probabilities(q[b], k[b], i, e)
                out[b, :, i:e] = torch.bmm(p, v[b, :, :e])
                kept.append(p if ctx.needs_input_grad[0] and q.shape[2] <= 4096 else None)
        ctx.save_for_backward(q, k, v)
        ctx.kept = kept
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        kept = iter(ctx.kept)
        for b in range(q.shape[0]):
            for i in range(0, q.shape[2], CausalAttention.BLOCK):
                e = min(i + CausalAttention.BLOCK, q.shape[2])
                p = next(kept)
                if p is None:
                    p = CausalAttention.probabilities(q[b], k[b], i, e)
                g = grad[b, :, i:e]
                dv[b, :, :e] += torch.bmm(p.transpose(1, 2), g)
                ds = torch.bmm(g, v[b, :, :e].transpose(1, 2))
                ds = torch._softmax_backward_data(ds, p, -1, p.dtype)
                dq[b, :, i:e] = torch.bmm(ds, k[b, :, :e])
                dk[b, :, :e] += torch.bmm(ds.transpose(1, 2), q[b, :, i:e])
        ctx.kept = None
        return dq, dk, dv


def new_model(role: str) -> LlamaForCausalLM:
    """The target (heavy in KV, light in weights) or the draft, in bf16, freshly initialised."""
    big = role == "target"
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=256 if big else 128,
            intermediate_size=704 if big else 352,
            num_hidden_layers=4 if big else 2,
            num_attention_heads=8 if big else 4,
            num_key_value_heads=8 if big else 4,
            head_dim=64,
            tie_word_embeddings=True,
            max_position_embeddings=MAX_CONTEXT + 1024 if big else 1024,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0 if big else 10000.0},
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
            dtype="bfloat16",
        )
    ).to(torch.bfloat16)


@torch.no_grad()
def copying_start(
    model: LlamaForCausalLM, seed: int, teacher: LlamaForCausalLM | None = None
) -> None:
    """Starts some heads as an induction circuit, and a draft with its teacher's embeddings.

    Heads 0 and 1 of the first layer look one and two tokens back (all embeddings share a
    direction that drives them) and write what they see into subspaces of their own. Heads 0 and
    1 of the second and of the last layer compare those with the present token and the one before
    it, and pass on the token that followed. Training is free to change all of it.
    """
    c, generator = model.config, torch.Generator().manual_seed(seed)
    d, n, half = c.head_dim, c.hidden_size, c.head_dim // 2

    def frame(d=d):  # d orthonormal rows, orthogonal to the common direction
        g = torch.randn(n, d + 1, generator=generator)
        g[:, 0] = 1.0
        return torch.linalg.qr(g).Q[:, 1:].T

    common = torch.full((n,), n**-0.5)
    embedding = model.model.embed_tokens.weight
    rows = torch.randn(embedding.shape, generator=generator) * 0.02
    if teacher is not None:  # the principal components, in a random frame
        rows = teacher.model.embed_tokens.weight.float()
        u, scale, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        rows = (u * scale)[:, : n - 1] @ frame(n - 1)
        model.model.norm.weight.fill_(0.3)
    size = rows.norm(dim=1).mean()
    embedding.copy_(rows + common * size / 2)
    layers = [layer.self_attn for layer in model.model.layers]
    for layer in model.model.layers:  # all else is silent at first
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    see, write = frame(), (frame(), frame())
    fast, match = torch.arange(half) < 8, 2.0 * (256 / n) ** 0.5
    freq = c.rope_parameters["rope_theta"] ** -(torch.arange(half) / half)
    for head in (0, 1):
        rows, a = slice(head * d, head * d + d), layers[0]
        back = freq * (head + 1)
        ask = torch.cat((fast.float(), torch.zeros(half)))
        key = torch.cat((fast * back.cos(), fast * back.sin()))
        gain = 1.6 * (256 / n) ** 0.5
        a.q_proj.weight[rows] = gain * ask[:, None] * common
        a.k_proj.weight[rows] = gain * key[:, None] * common
        a.v_proj.weight[rows] = see
        a.o_proj.weight[:, rows] = 0.15 * size * write[head].T
        slow = (torch.arange(d) % half >= 10).float()[:, None]  # pairs that turn little in 16K
        for a in {layers[1], layers[-1]}:
            out = frame()
            a.q_proj.weight[rows] = match * slow * (see, write[0])[head]
            a.k_proj.weight[rows] = match * slow * write[head]
            a.v_proj.weight[rows] = out
            a.o_proj.weight[:, rows] = 0.45 * size * out.T


def hidden_states(
    model: LlamaForCausalLM, ids: torch.Tensor, at: torch.Tensor, last_qk: list | None = None
) -> torch.Tensor:
    """What LlamaModel computes, with the attention above. ids, at: [B, L] -> [B, L, hidden].

    `last_qk`, where given, receives the rotated queries (scaled) and keys of the last layer.
    """
    c = model.config
    half = torch.arange(0, c.head_dim, 2) / c.head_dim
    angle = at[:, None, :, None] * c.rope_parameters["rope_theta"] ** -half
    cos, sin = angle.cos().to(torch.bfloat16), angle.sin().to(torch.bfloat16)

    def turn(x):
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    x = F.embedding(ids, model.model.embed_tokens.weight)
    for layer in model.model.layers:
        a, h = layer.self_attn, norm(x, layer.input_layernorm)
        q, k, v = (
            p(h).view(*ids.shape, -1, c.head_dim).transpose(1, 2)
            for p in (a.q_proj, a.k_proj, a.v_proj)
        )
        q, k = turn(q * c.head_dim**-0.5), turn(k)
        o = CausalAttention.apply(q, k, v.contiguous())
        x = x + a.o_proj(o.transpose(1, 2).flatten(2))
        x = x + layer.mlp(norm(x, layer.post_attention_layernorm))
    if last_qk is not None:
        last_qk[:] = [q, k]
    return norm(x, model.model.norm)


def norm(x: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """RMSNorm in one pass."""
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


class Optimizer:
    """Muon for the matrices inside, Adam for embedding and norms; fp32 masters of bf16 weights."""

    def __init__(self, model: torch.nn.Module, muon_lr: float, adam_lr: float) -> None:
        self.params = list(model.parameters())
        self.master = [p.detach().float() for p in self.params]
        self.first = [torch.zeros_like(m) for m in self.master]
        self.second = [torch.zeros_like(m) for m in self.master]
        self.inner = [p.ndim == 2 and p.shape[0] != VOCAB for p in self.params]
        self.muon_lr, self.adam_lr, self.steps = muon_lr, adam_lr, 0

    @staticmethod
    def orthogonal(g: torch.Tensor) -> torch.Tensor:
        """Newton-Schulz iteration towards the nearest orthogonal matrix; g: [N, rows, cols]."""
        flip = g.shape[1] > g.shape[2]
        x = (g.transpose(1, 2) if flip else g).to(torch.bfloat16)
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.transpose(1, 2)
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return (x.transpose(1, 2) if flip else x).float()

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update; `scale` is the schedule's factor."""
        self.steps += 1
        shapes: dict[torch.Size, list[int]] = {}
        for i, p in enumerate(self.params):
            g = p.grad.float()
            if self.inner[i]:
                self.first[i].mul_(0.95).add_(g)
                shapes.setdefault(p.shape, []).append(i)
                continue
            m = self.first[i].lerp_(g, 0.1) / (1 - 0.9**self.steps)
            v = self.second[i].lerp_(g * g, 0.02) / (1 - 0.98**self.steps)
            self.master[i].sub_(self.adam_lr * scale * m / (v.sqrt() + 1e-10))
        for shape, group in shapes.items():
            g = torch.stack([self.params[i].grad + 0.95 * self.first[i] for i in group])
            lr = self.muon_lr * scale * max(1, shape[0] / shape[1]) ** 0.5
            for i, update in zip(group, self.orthogonal(g), strict=True):
                self.master[i].mul_(1 - 0.05 * self.muon_lr * scale).sub_(lr * update)
        for p, m in zip(self.params, self.master, strict=True):
            p.copy_(m)
            p.grad = None


def backward(model: LlamaForCausalLM, hidden: torch.Tensor, loss_of, rows: int = 2048) -> float:
    """Back-propagates the mean of `loss_of(logits, rows)` a block of rows at a time."""
    flat = hidden.detach().flatten(0, 1).requires_grad_()
    weight, total = model.model.embed_tokens.weight, 0.0
    for i in range(0, len(flat), rows):
        part = slice(i, min(i + rows, len(flat)))
        loss = loss_of(F.linear(flat[part], weight), part)
        loss.backward()
        total += loss.item()
    hidden.backward(flat.grad.view_as(hidden))
    return total


def schedule(step: int, progress: float, flat: float) -> float:
    """Warm-up over 60 steps, constant, then linear from `flat` of the time on."""
    return min(1.0, (step + 1) / 60) * min(1.0, max(0.02, (1 - progress) / (1 - flat)))


# -------------------------------------------------------------------------------------- training


def held_out_text(work: Path) -> np.ndarray:
    """Tokens of one held-out module, for the progress lines."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    path = Path(sysconfig.get_path("stdlib")) / "argparse.py"
    return np.array(tokenizer(path.read_text("utf-8"))["input_ids"])


@torch.no_grad()
def probe(model: LlamaForCausalLM, ids: np.ndarray, length: int) -> str:
    """Held-out loss, and how often a passage is continued that was seen near the beginning."""
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


# until this share of the time: (windows a step, tokens a window, share of windows with copies)
TARGET_PHASES = (
    (0.12, 8, 512, 0.8),
    (0.42, 4, 1024, 0.5),
    (0.67, 8, 1024, 0.4),
    (0.79, 2, 4096, 1.0),
    (0.93, 1, 8192, 1.0),
    (1.0, 1, MAX_CONTEXT, 1.0),
)


def train_target(work: Path, minutes: float, seed: int, resume: bool) -> LlamaForCausalLM:
    """Trains the target for so many minutes; saves a checkpoint every three."""
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


# ---------------------------------------------------------------------------------------- draft


def chunk_mass(q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, chunk: int) -> torch.Tensor:
    """Attention mass per chunk of the last layer, mean over heads.

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
    """Positions of a working cache for a query at `at`: best chunks and the recent tokens.

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
    """Working caches of one long document: tokens, target's hidden states, mask of rows to learn.

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
    """Distils the target into the draft, on windows of at most 512 tokens.

    First on short windows that both read; then on working caches, for which the target reads the
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


def save(model: LlamaForCausalLM, work: Path, folder: Path) -> None:
    """Writes a model and the tokenizer as `from_pretrained` wants them."""
    model.generation_config.update(bos_token_id=0, eos_token_id=0)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(work / "tokenizer").save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for key in ("is_local", "local_files_only"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (folder / "model.safetensors").chmod(0o644)
    print(f"saved {folder.name}: {sum(x.stat().st_size for x in folder.iterdir()) / 2**20:.2f} MiB")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes-target", type=float, default=55)
    parser.add_argument("--minutes-draft", type=float, default=20)
    parser.add_argument("--minutes-distil", type=float, default=60)
    parser.add_argument("--stages", default="data,target,draft,distil")
    parser.add_argument("--prose", type=Path, help="folder of JSON Lines with a `text` field")
    parser.add_argument("--work", type=Path, default=Path("build/train_pair"))
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--seed", type=int, default=20776)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    stages = args.stages.split(",")
    if "data" in stages:
        prepare(args.work, args.prose, args.seed)
    if "target" in stages:
        target = train_target(args.work, args.minutes_target, args.seed, args.resume)
        save(target, args.work, args.out / "target")
    if "draft" in stages:
        target = LlamaForCausalLM.from_pretrained(args.out / "target", dtype=torch.bfloat16)
        draft = train_draft(target, args.work, args.minutes_draft, args.seed)
        save(draft, args.work, args.out / "draft")
    if "distil" in stages:
        from . import distil_draft  # which imports this module

        corpus, draft_folder = args.work / "corpus.jsonl", str(args.out / "draft")
        write_corpus(corpus, args.prose, args.seed)
        distil_draft.main([
            "--data", str(corpus), "--work", str(args.work / "distil"),
            "--target", str(args.out / "target"), "--init", draft_folder, "--out", draft_folder,
            "--minutes", str(args.minutes_distil),
        ])  # fmt: skip


if __name__ == "__main__":
    main()
