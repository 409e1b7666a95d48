"""Trains the embedded pair (target and draft) on one CPU core, from text that is on the machine.

    python -m specextend.assets.train_pair --minutes-target 60 --minutes-draft 20

Stages: `data` (text, tokenizer, token files), `target`, `draft`. README.md beside this file says
what came out. glibc's huge pages make the attention a fifth faster:
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_TOP_PAD_=268435456 python ...
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import re
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
VOCAB = 4096
MAX_CONTEXT = 16384
END = "<|endoftext|>"
HELD_OUT = re.compile(
    r"ipaddress|decimal|header_value|mock|argparse|tarfile|inspect|typing|datetime|smtp"
    r"|pickletools|statistics|_vendor|site-packages|__pycache__|encodings/|pydoc_data"
)
# name: (folder, megabytes at most, share of the training tokens)
SOURCES = {
    "stdlib": ("stdlib", 20, 0.40),
    "stdlib tests": ("stdlib/test", 12, 0.12),
    "transformers": ("transformers/models", 14, 0.14),
    "torch": ("torch", 10, 0.09),
    "sympy": ("sympy", 7, 0.07),
    "networkx": ("networkx", 4, 0.07),
    "numpy": ("numpy", 4, 0.05),
    "prose": ("", 4, 0.06),
}


# ---------------------------------------------------------------------------------------- data


def python_files(spec: str) -> list[Path]:
    """Python files below a package or the standard library, in path order, held-out ones left."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    package, _, rest = spec.partition("/")
    if package == "stdlib":
        root = stdlib
    else:
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            return []
        root = Path(found.submodule_search_locations[0])
    files = []
    for path in sorted((root / rest).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        is_test = name.startswith("test/") or "/test" in name
        if not HELD_OUT.search(name) and (spec != "stdlib" or not is_test):
            files.append(path)
    return files


def held_out_lines() -> set[str]:
    """Long lines of the held-out modules: files that share many of them are left out too."""
    stdlib, lines = Path(sysconfig.get_path("stdlib")), set()
    for path in stdlib.rglob("*.py"):
        name = path.relative_to(stdlib).as_posix()
        if HELD_OUT.search(name) and "site-packages" not in name:
            lines |= {x.strip() for x in path.read_text("utf-8", "ignore").splitlines()}
    return {x for x in lines if len(x) >= 40 and "import" not in x}


def read_sources(prose: Path | None, rng: random.Random) -> dict[str, list[str]]:
    """The training texts, one list of documents per source."""
    held, texts = held_out_lines(), {}
    for name, (spec, megabytes, _) in SOURCES.items():
        documents, dropped = [], 0
        if name == "prose":
            for path in sorted(prose.glob("*16K.jsonl")) if prose else []:
                for line in path.read_text("utf-8").splitlines():
                    documents.append(json.loads(line)["text"].split("\n\n", 2)[-1])
            documents = documents[:-2]  # the last two books are for evaluation
        else:
            for path in python_files(spec):
                text = path.read_text("utf-8", "ignore")
                if not 400 < len(text) < 400_000 or not text.isascii():
                    continue
                lines = [x for x in map(str.strip, text.splitlines()) if len(x) >= 40]
                shared = sum(x in held for x in lines)
                if shared > 8 and shared > 0.04 * len(lines):
                    dropped += 1
                else:
                    documents.append(text)
        total = sum(map(len, documents))
        keep = min(1.0, megabytes * 1e6 / max(1, total))
        if keep < 1:  # whole folders of neighbours stay together: drop runs of eight files
            documents = [x for i in range(0, len(documents), 8) if rng.random() < keep
                         for x in documents[i:i + 8]]
        texts[name] = documents
        size = sum(map(len, documents)) / 1e6
        print(f"data: {name}: {len(documents)} documents, {size:.1f} MB, "
              f"{dropped} dropped as too like the held-out ones", flush=True)
    return texts


def train_tokenizer(texts: dict[str, list[str]], rng: random.Random) -> PreTrainedTokenizerFast:
    """Byte-level BPE; a line break and the indentation after it can be one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    pattern = r" ?_?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|(?:[ \t]*\n)+[ \t]*|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    sample = [x for name, share in ((n, s[2]) for n, s in SOURCES.items())
              for x in take(texts[name], 12e6 * share, rng)]
    tokenizer.train_from_iterator(sample, trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END,
                                   clean_up_tokenization_spaces=False,
                                   model_max_length=MAX_CONTEXT + 1024)


def take(documents: list[str], chars: float, rng: random.Random) -> list[str]:
    """Random documents, about `chars` characters in all."""
    out: list[str] = []
    for i in rng.sample(range(len(documents)), len(documents)):
        if chars <= 0:
            break
        out.append(documents[i][:100_000])
        chars -= len(out[-1])
    return out


def prepare(work: Path, prose: Path | None, seed: int) -> None:
    """Writes tokenizer and one stream of tokens per source into the work folder."""
    start, rng = time.time(), random.Random(seed)
    texts = read_sources(prose, rng)
    tokenizer = train_tokenizer(texts, rng)
    tokenizer.save_pretrained(work / "tokenizer")
    print(f"data: tokenizer after {time.time() - start:.0f} s", flush=True)
    for name, documents in texts.items():
        stream: list[int] = []
        for i in range(0, len(documents), 200):
            for ids in tokenizer(documents[i:i + 200])["input_ids"]:
                stream.append(0)
                stream += ids
        np.save(work / f"{name.replace(' ', '_')}.npy", np.array(stream, np.uint16))
        ratio = sum(map(len, documents)) / max(1, len(stream))
        print(f"data: {name}: {len(stream) / 1e6:.2f} M tokens, {ratio:.2f} characters each",
              flush=True)


class Windows:
    """Draws training windows: short excerpts at the positions they have in a long document.

    A window of a long document is a few of its passages in order, each with its true positions,
    so that distances of up to 16K are trained at the price of short attention. Passages are
    chosen because they share n-grams with the last one, or at random; spans are copied forward,
    sometimes with names exchanged.
    """

    def __init__(self, work: Path, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        names = [n for n in SOURCES if (work / f"{n.replace(' ', '_')}.npy").exists()]
        self.streams = [np.load(work / f"{n.replace(' ', '_')}.npy") for n in names]
        share = np.array([SOURCES[n][2] * (len(s) > 40_000)
                          for n, s in zip(names, self.streams, strict=True)])
        self.share = share / share.sum()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
        self.words = np.array([i for i in range(VOCAB) if re.fullmatch(
            r"[ _]?[A-Za-z]{3,}", tokenizer.decode([i]))], np.int64)
        self.is_word = np.zeros(VOCAB, bool)
        self.is_word[self.words] = True

    def document(self, length: int) -> np.ndarray:
        """A stretch of neighbouring files."""
        stream = self.streams[self.rng.choice(len(self.streams), p=self.share)]
        start = self.rng.integers(0, max(1, len(stream) - length))
        return stream[start:start + length].astype(np.int64)

    def copies(self, ids: np.ndarray, count: int, longest: int) -> None:
        """Copies `count` spans of 32..longest tokens to a later place, in place."""
        for _ in range(count):
            n = int(self.rng.integers(32, longest + 1))
            src = int(self.rng.integers(0, len(ids) - 2 * n))
            dst = int(self.rng.integers(src + n, len(ids) - n + 1))
            span = ids[src:src + n].copy()
            if self.rng.random() < 0.4:
                known = np.unique(span[self.is_word[span]])
                if len(known) > 2:
                    old = self.rng.choice(known, max(1, len(known) // 4), replace=False)
                    table = np.arange(VOCAB)
                    table[old] = self.rng.choice(self.words, len(old))
                    span = table[span]
            ids[dst:dst + n] = span

    def related(self, doc: np.ndarray, length: int) -> np.ndarray:
        """Indices into `doc` of earlier passages like its end, ascending, then the end itself."""
        recent = int(self.rng.integers(length // 4, length // 2))
        end = int(self.rng.integers(length * 2, len(doc) + 1))
        first = end - recent
        mix = np.zeros(len(doc), np.int64)
        for shift in range(6):  # a hash of the six tokens that start here
            mix[:len(doc) - 6] = mix[:len(doc) - 6] * 4099 + doc[shift:len(doc) - 6 + shift]
        hits = np.flatnonzero(np.isin(mix[:first - 6], mix[first:end - 6]))
        chosen = np.zeros(len(doc), bool)
        chosen[first:end] = True
        room = length - recent
        while room > 0:
            n = min(room, int(self.rng.integers(24, 160)))
            if len(hits) and self.rng.random() < 0.7:
                start = int(self.rng.choice(hits)) - int(self.rng.integers(0, n // 2 + 1))
            else:
                start = int(self.rng.integers(0, first - n))
            start = min(max(start, 0), first - n)
            chosen[start:start + n] = True
            room = length - int(chosen[:end].sum())
        return np.flatnonzero(chosen)[-length:]

    def window(self, length: int, copying: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, positions and labels of one window."""
        if length == MAX_CONTEXT:
            ids, at = self.document(length), np.arange(length)
            self.copies(ids, 16, 400)
        elif self.rng.random() < 0.5:
            doc = self.document(MAX_CONTEXT)
            at = self.related(doc, length)
            ids = doc[at]
            if self.rng.random() < copying / 2:
                self.copies(ids, 1, length // 4)
        else:  # one passage, with gaps in its positions
            ids, at = self.document(length), np.arange(length)
            for cut in self.rng.integers(1, length, self.rng.integers(0, 4)):
                at[cut:] += self.rng.integers(0, (MAX_CONTEXT - at[-1]) // 2 + 1)
            at += self.rng.integers(0, MAX_CONTEXT - at[-1])
            if self.rng.random() < copying:
                self.copies(ids, int(self.rng.integers(1, 4)), length // 4)
        labels = np.full(length, -100)
        labels[:-1] = ids[1:]
        labels[:-1][at[1:] != at[:-1] + 1] = -100  # nobody can know where the next passage begins
        return ids, at, labels

    def batch(self, count: int, length: int, copying: float) -> tuple[torch.Tensor, ...]:
        """`count` windows as tensors [count, length]."""
        rows = [self.window(length, copying) for _ in range(count)]
        return tuple(torch.from_numpy(np.stack(x)) for x in zip(*rows, strict=True))


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
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=256 if big else 128, intermediate_size=704 if big else 352,
        num_hidden_layers=4 if big else 2, num_attention_heads=8 if big else 4,
        num_key_value_heads=8 if big else 4, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=MAX_CONTEXT + 1024 if big else 1024, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0 if big else 10000.0},
        bos_token_id=0, eos_token_id=0, pad_token_id=None, dtype="bfloat16",
    )).to(torch.bfloat16)


@torch.no_grad()
def copying_start(model: LlamaForCausalLM, seed: int) -> None:
    """Starts some heads as an induction circuit, which small budgets find late or never.

    Heads 0 and 1 of the first layer look one and two tokens back (all embeddings share a
    direction that drives them) and write what they see into subspaces of their own. Heads 0 and
    1 of the second and of the last layer compare those with the present token and the one before
    it, and pass on the token that followed. Training is free to change all of it.
    """
    c, generator = model.config, torch.Generator().manual_seed(seed)
    d, n, half = c.head_dim, c.hidden_size, c.head_dim // 2

    def frame():  # d orthonormal rows, orthogonal to the common direction
        g = torch.randn(n, d + 1, generator=generator)
        g[:, 0] = 1.0
        return torch.linalg.qr(g).Q[:, 1:].T

    common = torch.full((n,), n**-0.5)
    embedding = model.model.embed_tokens.weight
    noise = torch.randn(embedding.shape, generator=generator)
    embedding.copy_(0.02 * noise + 0.01)
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
        a.o_proj.weight[:, rows] = 0.05 * write[head].T
        slow = (torch.arange(d) % half >= 10).float()[:, None]  # pairs that turn little in 16K
        for a in {layers[1], layers[-1]}:
            out = frame()
            a.q_proj.weight[rows] = match * slow * (see, write[0])[head]
            a.k_proj.weight[rows] = match * slow * write[head]
            a.v_proj.weight[rows] = out
            a.o_proj.weight[:, rows] = 0.15 * out.T


def hidden_states(model: LlamaForCausalLM, ids: torch.Tensor, at: torch.Tensor,
                  last_qk: list | None = None) -> torch.Tensor:
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
        q, k, v = (p(h).view(*ids.shape, -1, c.head_dim).transpose(1, 2)
                   for p in (a.q_proj, a.k_proj, a.v_proj))
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
    ids[-n:] = ids[n // 2:n // 2 + n]
    x = torch.from_numpy(ids)[None]
    h = hidden_states(model, x, torch.arange(length)[None])[0, :-1]
    logits = torch.cat([F.linear(b, model.model.embed_tokens.weight) for b in h.split(1024)])
    loss = F.cross_entropy(logits[:-n].float(), x[0, 1:-n])
    right = (logits.argmax(-1) == x[0, 1:]).float()
    return (f"{length}: loss {loss:.3f} top-1 {right[:-n].mean():.3f}"
            f" copy {right[8 - n:].mean():.3f}")


# until this share of the time: (windows a step, tokens a window, share of windows with copies)
TARGET_PHASES = ((0.12, 8, 512, 0.8), (0.40, 4, 1024, 0.5), (0.72, 8, 1024, 0.4), 
                 (0.82, 3, 4096, 0.5), (1.0, 1, MAX_CONTEXT, 1.0))


def train_target(work: Path, minutes: float, seed: int, resume: bool) -> LlamaForCausalLM:
    """Trains the target for so many minutes; saves a checkpoint every three."""
    torch.manual_seed(seed)
    model, windows, text = new_model("target"), Windows(work, seed), held_out_text(work)
    copying_start(model, seed)
    optimizer = Optimizer(model, muon_lr=0.02, adam_lr=4e-3)
    used, saved, tokens, smooth = 0.0, 0.0, 0, 8.3
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

        smooth += 0.03 * (backward(model, hidden_states(model, ids, at), loss_of) - smooth)
        optimizer.step(schedule(optimizer.steps, progress, 0.6))
        tokens += ids.numel()
        if optimizer.steps % 20 == 0 or length == MAX_CONTEXT:
            rate = ids.numel() / (time.time() - last)
            print(f"target: step {optimizer.steps} {used / 60:.1f} min {tokens / 1e6:.2f} M tokens "
                  f"{rate:.0f}/s window {length} loss {smooth:.3f}", flush=True)
        if optimizer.steps % 100 == 0 or used - saved > 180:
            print("target:", "; ".join(probe(model, text, n) for n in (1024, 8192)), flush=True)
        now = time.time()
        used, last = used + now - last, now
        if used - saved > 180 or used >= budget:
            keep = {k: v for k, v in vars(optimizer).items() if k != "params"}
            torch.save({"model": model.state_dict(), "optimizer": keep, "used": used,
                        "tokens": tokens}, work / "target.pt")
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


def retrieval_windows(target: LlamaForCausalLM, windows: Windows, rng: np.random.Generator,
                      length: int = 512) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Working caches of one long document: tokens, target's hidden states, mask of rows to learn.

    The target reads the whole document; the draft will see each window as if it were all.
    """
    size = MAX_CONTEXT if rng.random() < 0.25 else MAX_CONTEXT // 2
    doc, at, _ = windows.window(size, 1.0) if size == MAX_CONTEXT else (
        windows.document(size), np.arange(size), None)
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


def train_draft(target: LlamaForCausalLM, work: Path, minutes: float,
                seed: int) -> LlamaForCausalLM:
    """Distils the target into the draft, on windows of at most 512 tokens.

    First on short windows that both read; then on working caches, for which the target reads the
    whole document, its last layer's attention chooses the chunks, and the draft sees these alone.
    """
    torch.manual_seed(seed + 1)
    draft, windows = new_model("draft"), Windows(work, seed + 1)
    copying_start(draft, seed)
    optimizer, head = Optimizer(draft, 0.02, 4e-3), target.model.embed_tokens.weight
    target.requires_grad_(False)
    smooth, agree, start, tokens = 8.3, 0.0, time.time(), 0
    pool: list[tuple[torch.Tensor, ...]] = []
    while (progress := (time.time() - start) / (minutes * 60)) < 1:
        if progress < 0.45:
            length = (256, 512)[optimizer.steps % 2]
            ids, at, labels = windows.batch(8192 // length, length, 0.6)
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

        def loss_of(logits, rows, hidden=hidden, known=known, hits=hits):
            teacher = F.linear(hidden[rows], head).float()
            logits = logits.float()
            weight = known[rows] / known.sum()
            hits.append(((teacher.argmax(-1) == logits.argmax(-1)) * weight).sum().item())
            kl = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="none",
                          log_target=True).sum(-1)
            return (kl * weight).sum()

        at = torch.arange(ids.shape[1]).expand_as(ids)
        loss = backward(draft, hidden_states(draft, ids, at), loss_of)
        optimizer.step(schedule(optimizer.steps, progress, 0.5))
        smooth, agree = smooth + 0.05 * (loss - smooth), agree + 0.05 * (sum(hits) - agree)
        tokens += ids.numel()
        if optimizer.steps % 25 == 0:
            print(f"draft: step {optimizer.steps} {(time.time() - start) / 60:.1f} min "
                  f"{tokens / 1e6:.2f} M tokens KL {smooth:.3f} agreement {agree:.3f}", flush=True)
    return draft


def save(model: LlamaForCausalLM, work: Path, folder: Path) -> None:
    """Writes a model and the tokenizer as `from_pretrained` wants them."""
    model.generation_config.update(bos_token_id=0, eos_token_id=0)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(work / "tokenizer").save_pretrained(folder)
    print(f"saved {folder.name}: {sum(x.stat().st_size for x in folder.iterdir()) / 2**20:.2f} MiB")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes-target", type=float, default=60)
    parser.add_argument("--minutes-draft", type=float, default=20)
    parser.add_argument("--stages", default="data,target,draft")
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


if __name__ == "__main__":
    main()
