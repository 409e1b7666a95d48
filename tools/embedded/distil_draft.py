"""Trains the embedded draft on what the target writes, with the caches that the decoder gives it.

    python -m tools.embedded.corpus corpus.jsonl
    python -m tools.embedded.distil_draft --data corpus.jsonl

This is the last stage of the whole training (`python -m tools.embedded`).

A draft is tried on its target's own greedy text, which is not what people write: it repeats itself
and its prompt. So the target reads a document and continues it from many places at once; the draft
learns to follow it there from a working cache of chunks that the target's attention has chosen,
whose keys come, as in decoding, from a prefill with a sliding window. It goes on from the weights
that the stage before has made. specextend/assets/README.md says what came out.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from specextend import SpecConfig, ops
from specextend.assets import SETTINGS, draft_path, held_out_documents, target_path
from specextend.rotary import turn
from specextend.train.data import TokenStream

from .training import Optimizer, finish, frequencies, norm, project, schedule

CONFIG = SpecConfig(**SETTINGS)  # the draft's decoder has this
CHUNK = CONFIG.chunk_size  # also tokens of a continuation between two selections
BUDGET = CONFIG.budget
SPAN = CONFIG.draft_prefill_window
PART = 1024  # tokens that the target reads at a time


def rotated(x: Tensor, at: Tensor, theta: float) -> Tensor:
    """Rotate [..., n, D] to positions [..., n]."""
    angle = at[..., None] * frequencies(x.shape[-1], theta)
    return turn(x, angle.cos(), angle.sin())


@dataclass
class Lesson:
    """Holds a document, what the target writes behind N places, and what it attends to there.

    Attributes:
        ids: [L] the document.
        starts: [N] where continuations begin, ascending multiples of CHUNK.
        texts: [N, n] the continuations.
        wanted: [N, n, hidden] the target's last hidden states, of the token after each.
        chunks: [N, n / CHUNK, K] ascending chunk ids of the document followed by the continuation,
            for the CHUNK tokens after each whole chunk of it.
    """

    ids: Tensor
    starts: Tensor
    texts: Tensor
    wanted: Tensor
    chunks: Tensor


class Target:
    """Runs the target by our own operators: one document, many continuations."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model, self.theta = model, model.config.rope_parameters["rope_theta"]

    def run(self, ids: Tensor, at: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """Turn [B, n] tokens at positions [B, n] into last hidden states [B, n, hidden].

        `attend(i, q, k, v)` is the attention of layer i, all [B, n, H, D].
        """
        x = F.embedding(ids, self.model.model.embed_tokens.weight)
        for i, layer in enumerate(self.model.model.layers):
            q, k, v = project(layer, x)
            q, k = (rotated(y, at[:, None], self.theta) for y in (q, k))
            out = attend(i, *(y.transpose(1, 2).contiguous() for y in (q, k, v)))
            x = finish(layer, x, out.transpose(1, 2))
        return norm(x, self.model.model.norm)

    def choose(self, hidden: Tensor) -> Tensor:
        """Return the most likely tokens [...] of last hidden states [..., hidden]."""
        return F.linear(hidden, self.model.model.embed_tokens.weight).argmax(-1)

    @torch.inference_mode()
    def lesson(self, ids: Tensor, starts: Tensor, count: int) -> Lesson:
        """Read ids [L], then continue it from each of `starts` [N] by `count` tokens.

        L is a multiple of SPAN; starts are ascending multiples of CHUNK, from BUDGET on.
        """
        c, length, n = self.model.config, len(ids), len(starts)
        shape = (c.num_hidden_layers, 2, 1, length, c.num_key_value_heads, c.head_dim)
        caches, read = torch.zeros(shape), 0

        def reading(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache, rows = caches[i], slice(read, read + k.shape[1])
            cache[0][:, rows], cache[1][:, rows] = k, v
            lens = torch.tensor([read], dtype=torch.int32)
            return ops.tree_attention(q, cache[0], cache[1], lens)[0]

        hidden = []
        for read in range(0, length, PART):
            part = ids[None, read : read + PART]
            hidden.append(self.run(part, torch.arange(read, read + part.shape[1])[None], reading))
        tokens = self.choose(torch.cat(hidden, 1)[0, starts - 1])

        own = torch.zeros(c.num_hidden_layers, 2, n, count, *shape[4:])
        mass, step = torch.zeros(0), 0

        def writing(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """Attend, all together, to the stretches of the document that are shared."""
            nonlocal mass
            own[i, 0][:, step], own[i, 1][:, step] = k[:, 0], v[:, 0]
            ask = step % CHUNK == 0 and i == c.num_hidden_layers - 1
            lens = torch.full((n,), step + 1, dtype=torch.int32)
            out, lse, parts = ops.tree_attention(
                q, *own[i], lens, num_tree_keys=0, chunk_size=CHUNK * ask
            )
            out, lse = out[:, 0], lse[:, 0]
            columns = [parts.new_full((n, c.num_attention_heads, length // CHUNK), -torch.inf)]
            begin = 0
            for row, end in enumerate(starts.tolist()):
                rows = torch.tensor([end - begin], dtype=torch.int32)
                far = ops.tree_attention(
                    q[row:].transpose(0, 1), *caches[i][:, :, begin:end], rows,
                    num_tree_keys=0, chunk_size=CHUNK * ask,
                )  # fmt: skip
                if ask:
                    columns[0][row:, :, begin // CHUNK : end // CHUNK] = far[2][0]
                merged = ops.merge_states(out[row:], lse[row:], far[0][0], far[1][0])
                out[row:], lse[row:] = merged
                begin = end
            if ask:  # chunks of the document, behind them those of the continuation
                mass = (torch.cat((*columns, parts[:, 0]), -1) - lse[..., None]).exp().mean(1)
            return out[:, None]

        texts, wanted, chunks = [], [], []
        for step in range(count):
            texts.append(tokens)
            hidden = self.run(tokens[:, None], (starts + step)[:, None], writing)
            wanted.append(hidden[:, 0])
            tokens = self.choose(hidden[:, 0])
            if step % CHUNK == 0:
                chunks.append(self.selected(mass, starts // CHUNK, length // CHUNK, step // CHUNK))
        return Lesson(
            ids, starts, torch.stack(texts, 1), torch.stack(wanted, 1), torch.stack(chunks, 1)
        )

    @staticmethod
    def selected(mass: Tensor, before: Tensor, columns: int, written: int) -> Tensor:
        """Return the [N, K] chunks that the decoder would keep.

        mass: [N, columns + own] of the document's and the continuation's chunks; `before` [N] of
        the former and `written` of the latter are whole.
        """
        chunk = torch.arange(mass.shape[1])
        at = torch.where(chunk < before[:, None], chunk, chunk - before[:, None] + columns)
        scores = mass.gather(1, at.clamp(max=mass.shape[1] - 1))
        lens = (before + written).int() * CHUNK
        return ops.select_chunks(
            scores, lens, chunk_size=CHUNK, budget=BUDGET // CHUNK, num_sinks=CONFIG.sink_chunks,
            num_recent=CONFIG.recent_chunks,
        )[0].long()  # fmt: skip


class Student:
    """Runs the draft over a lesson, with gradients.

    Three passes that share keys: over the document, with a sliding window; over each continuation,
    the same; and over each continuation again, as the decoder drafts, with a working cache.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model, self.theta = model, model.config.rope_parameters["rope_theta"]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, window: int, real: Tensor | None = None
    ) -> Tensor:
        """Attend with q [..., H, n, D], the last n of k, v [..., H, m, D], within a window.

        Positions are compact: 0 to m - 1.

        `real` [..., 1, 1, m] says which keys there are.
        """
        n, m = q.shape[-2], k.shape[-2]
        at = torch.arange(m)
        seen = (at <= at[m - n :, None]) & (at > at[m - n :, None] - window)
        if real is not None:
            seen = seen & real
        q, k = rotated(q, at[m - n :], self.theta), rotated(k, at, self.theta)
        return F.scaled_dot_product_attention(q, k, v, seen)

    def __call__(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """Return last hidden states [N, n, hidden], with a working cache and with a window."""
        length, (n, count) = len(lesson.ids), lesson.texts.shape
        near = lesson.starts[:, None] - SPAN + torch.arange(SPAN)
        # Rows of the working caches are the document's tokens, behind them those written.
        rows = (lesson.chunks[..., None] * CHUNK + torch.arange(CHUNK)).flatten(2)
        behind = rows - lesson.starts[:, None, None]
        written = length + torch.arange(n)[:, None, None] * count + behind
        rows = torch.where(behind < 0, rows, written)

        # Blocks of SPAN rows of the document see their own and the block before.
        real = torch.ones(length // SPAN, 1, 1, 2 * SPAN, dtype=torch.bool)
        real[0, ..., :SPAN] = False
        weight = self.model.model.embed_tokens.weight
        document, slid = F.embedding(lesson.ids, weight), F.embedding(lesson.texts, weight)
        drafted = slid.unflatten(1, (-1, CHUNK))  # [N, n / CHUNK, CHUNK, hidden]
        for layer in self.model.model.layers:
            q, k, v = project(layer, document)
            own_q, own_k, own_v = project(layer, slid)
            blocks = [F.pad(y, (0, 0, SPAN, 0)).unfold(1, 2 * SPAN, SPAN) for y in (k, v)]
            out = self.attend(
                q.unflatten(1, (-1, SPAN)).transpose(0, 1),
                *(y.permute(1, 0, 3, 2) for y in blocks), SPAN, real,
            )  # fmt: skip
            document = finish(layer, document, out.transpose(0, 1).flatten(1, 2))
            both = [
                torch.cat((y[:, near].transpose(0, 1), mine), 2)
                for y, mine in ((k, own_k), (v, own_v))
            ]
            slid = finish(layer, slid, self.attend(own_q, *both, SPAN))
            new_q, new_k, new_v = project(layer, drafted)
            both = [
                torch.cat((torch.cat((y, mine.transpose(0, 1).flatten(1, 2)), 1)[:, rows]
                           .permute(1, 2, 0, 3, 4), new), 3)
                for y, mine, new in ((k, own_k, new_k), (v, own_v, new_v))
            ]  # fmt: skip
            drafted = finish(layer, drafted, self.attend(new_q, *both, BUDGET + CHUNK))
        return norm(drafted.flatten(1, 2), self.model.model.norm), norm(slid, self.model.model.norm)


def write_lessons(args: argparse.Namespace) -> None:
    """Write lessons from random stretches of the training text, and three of held-out modules."""
    model = LlamaForCausalLM.from_pretrained(args.target, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.target, model_max_length=10**9)
    target, rng = Target(model), random.Random(args.seed)
    stream = TokenStream(args.data, tokenizer, args.work)
    held_out = [tokenizer(text).input_ids for _, text in held_out_documents()]
    held_out = [ids for ids in held_out if len(ids) >= args.length][:3]
    for number in range(-len(held_out), args.lessons):
        length = args.length * (2 if number >= 0 and rng.random() < args.long else 1)
        at, file = rng.randrange(len(stream) - length), args.work / lesson_name(number)
        # Every start has a stretch of its own.
        stretch = (length - PART) // CHUNK // args.places
        starts = [
            PART + CHUNK * (stretch * i + rng.randrange(stretch) + 1) for i in range(args.places)
        ]
        if file.exists():  # a run was interrupted
            continue
        if number < 0:
            ids = torch.tensor(held_out[number][:length])
        else:
            ids = torch.from_numpy(stream.ids[at : at + length].astype("int64"))
        begun = time.time()
        lesson = target.lesson(ids, torch.tensor(starts), args.new)
        torch.save(vars(lesson), file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
        print(f"{file.name}: {length} tokens, {time.time() - begun:.1f} s", flush=True)


def lesson_name(number: int) -> str:
    """Name a lesson's file; held-out ones have negative numbers."""
    return f"lesson{number:04d}.pt" if number >= 0 else f"held_out{-number}.pt"


def load_lesson(file: Path) -> Lesson:
    """Read what write_lessons has left there."""
    return Lesson(**torch.load(file))


def train(args: argparse.Namespace) -> None:
    """Distil lessons, one a step, in random order."""
    torch.manual_seed(args.seed)
    head = LlamaForCausalLM.from_pretrained(args.target, dtype=torch.float32)
    head = head.model.embed_tokens.weight.detach()
    draft = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    student, optimizer = Student(draft), Optimizer(draft, args.rate, args.rate / 5)
    weight, rng = draft.model.embed_tokens.weight, random.Random(args.seed)
    start, files, smooth = time.time(), [], [0.0, 0.0, 0.0]
    while (progress := (time.time() - start) / (args.minutes * 60)) < 1:
        if not files:
            files = sorted(args.work.glob("lesson*.pt"))
            rng.shuffle(files)
        lesson = load_lesson(files.pop())
        teacher = F.linear(lesson.wanted, head).flatten(0, 1)
        soft, hard = teacher.softmax(-1), teacher.argmax(-1)
        loss, found = torch.zeros(()), []
        for hidden, share in zip(student(lesson), (0.75, 0.25), strict=True):
            logits = F.linear(hidden, weight).flatten(0, 1)
            losses = F.cross_entropy(logits, hard), F.cross_entropy(logits, soft)
            loss = loss + share * (losses[0] + losses[1]) / 2
            found.append((logits.argmax(-1) == hard).float().mean().item())
        loss.backward()
        optimizer.step(schedule(optimizer.steps, progress, flat=0.0, warm_up=20))
        smooth = [x + 0.05 * (y - x) for x, y in zip(smooth, (loss.item(), *found), strict=True)]
        if optimizer.steps % 25 == 0:
            bias = 1 - 0.95**optimizer.steps
            loss, drafted, slid = (x / bias for x in smooth)
            print(
                f"step {optimizer.steps}, {(time.time() - start) / 60:.1f} min: loss {loss:.3f}, "
                f"agreement {drafted:.3f}, with a window {slid:.3f}",
                flush=True,
            )
        if optimizer.steps % 100 == 0 or optimizer.steps == 1:
            print("held out:", examine(student, args.work, head), flush=True)
    if args.out != args.init:
        shutil.copytree(args.init, args.out, dirs_exist_ok=True)  # for the tokenizer
    draft.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)


@torch.no_grad()
def examine(student: Student, work: Path, head: Tensor) -> str:
    """Say how far the draft agrees with the target behind held-out modules."""
    out = []
    for file in sorted(work.glob("held_out*.pt")):
        lesson = load_lesson(file)
        hard = F.linear(lesson.wanted, head).argmax(-1)
        weight = student.model.model.embed_tokens.weight
        choices = [F.linear(h, weight).argmax(-1) for h in student(lesson)]
        out.append(
            "{:.3f} (window {:.3f})".format(*((c == hard).float().mean().item() for c in choices))
        )
    return ", ".join(out)


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="as for `specextend train`")
    parser.add_argument("--work", type=Path, default=Path("build/distil_draft"))
    parser.add_argument("--target", type=Path, default=target_path())
    parser.add_argument("--init", type=Path, default=draft_path(), help="the draft to go on from")
    parser.add_argument("--out", type=Path, default=draft_path())
    parser.add_argument("--stages", default="lessons,train")
    parser.add_argument("--lessons", type=int, default=120, help="those in --work are kept")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a document")
    parser.add_argument("--long", type=float, default=0.15, help="share of twice as long ones")
    parser.add_argument("--places", type=int, default=16, help="continuations of a document")
    parser.add_argument("--new", type=int, default=128, help="tokens of a continuation")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=20776)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    if "lessons" in args.stages:
        write_lessons(args)
    if "train" in args.stages:
        train(args)


if __name__ == "__main__":
    main()
