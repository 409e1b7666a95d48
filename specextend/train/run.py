"""Trains, from a target and a text to a draft that loads."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..config import SpecConfig
from ..draft.checkpoint import Checkpoint
from ..draft.eagle_checkpoint import load_head
from ..draft.longspec_checkpoint import load_block
from ..machine import choose_device, free_memory
from ..pair import load_target
from ..terminal import bytes_text, standard_error
from .data import TokenStream
from .eagle3 import Eagle3Recipe, frequent_tokens, new_head
from .longspec import LongSpecRecipe, new_block
from .loop import Processes, Report, TrainConfig, Trainer, append_log, saved_config
from .memory import fitting_micro_batch
from .options import PRESETS, StagePreset
from .target import FrozenTarget
from .validation import Continuation, count_rounds


def _processes() -> tuple[Processes, torch.device | None]:
    """Return those that `accelerate launch` or torchrun started; one alone without."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(), None
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError(
            "training in several processes needs accelerate: pip install accelerate"
        ) from error
    accelerator = Accelerator()
    return Processes(accelerator), accelerator.device


def _event_writer(wanted: bool | None, folder: Path):
    """Return TensorBoard's writer, None where it is not wanted, or not there and not asked for."""
    if wanted is False:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if wanted:
            raise ImportError("--tensorboard needs tensorboard: pip install tensorboard") from error
        return None
    return SummaryWriter(str(folder))


def acceptance_validator(
    target: FrozenTarget, recipe, stream: TokenStream, prompts: int, length: int, tokens: int
) -> Callable[[], float]:
    """Return a function that measures the mean acceptance length of the draft as it is: greedy,
    on prompts spread evenly over a text.

    Raises:
        ValueError: the text is too short.
    """
    room = len(stream) - length
    if room < 0:
        raise ValueError(
            f"the validation text has {len(stream)} tokens, prompts of {length} are wanted"
        )
    config = SpecConfig(tree_shape="fixed", draft_cache="full")
    layers, continuations = recipe.draft(config).feature_layers, []
    for i in range(prompts):
        start = room * i // max(1, prompts - 1)
        ids = torch.from_numpy(stream.ids[start : start + length].astype("int64"))[None]
        ids = ids.to(target.model.device)
        continuations.append(Continuation(target.patched, ids, tokens, layers))

    def measure() -> float:
        draft = recipe.draft(config)
        counts = [count_rounds(draft, continuation, config) for continuation in continuations]
        return sum(emitted for emitted, _ in counts) / max(1, sum(rounds for _, rounds in counts))

    return measure


def _recipe(
    args: argparse.Namespace, target: FrozenTarget, stream: TokenStream, preset: StagePreset
):
    """Make what trains the draft that was asked for, new or from ``--init``."""
    checkpoint = None if args.init is None else Checkpoint.open(args.init)
    if args.kind == "eagle3":
        if checkpoint is not None:
            head = load_head(checkpoint, target.model)
        else:
            tokens = None
            if args.draft_vocab is not None:
                tokens = frequent_tokens(stream, target.vocab, args.draft_vocab)
            head = new_head(target, tokens, args.start == "target")
        head = head.float().requires_grad_(True)
        return Eagle3Recipe(target, head, args.ttt_steps, args.labels or "target")
    if checkpoint is not None:
        block = load_block(checkpoint, target.model)
    else:
        sample = None
        if args.start == "target":
            sample = stream.batch(0, 4, min(512, preset.length), args.seed).ids
            sample = sample.to(target.model.device)
        block = new_block(target, sample)
    shifted = preset.anchor_offset if args.anchor_offset is None else args.anchor_offset
    block = block.float().requires_grad_(True)
    return LongSpecRecipe(target, block, shifted, args.max_lag, args.labels or "data")


def _micro_batch(
    args: argparse.Namespace, recipe, preset: StagePreset, processes: Processes
) -> int:
    """Return how many windows are taken at a time: as many as was said, or as fit.

    Raises:
        ValueError: not even one fits.
    """
    if args.micro_batch is not None:
        return args.micro_batch
    saved = saved_config(Path(args.output)) if args.resume else None
    if saved is not None:  # what goes on has the bits of a run in one go
        return saved["micro_batch"]
    device, share = recipe.target.model.device, max(1, preset.batch // processes.count)
    free = free_memory(device)
    if free is None:
        count, why = 1, "how much memory is free is not known here"
    else:
        if device.type == "cpu":  # which the processes of a machine share
            free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = processes.least(free)
        count, needed = fitting_micro_batch(recipe, share, preset.length, free)
        why = f"about {bytes_text(needed)} of the {bytes_text(free)} of memory that are free"
    if processes.index == 0:
        standard_error().line(f"{count} of {share} windows at a time: {why}", "dim")
    return count


def train(args: argparse.Namespace) -> None:
    """Train what the options of ``specextend train`` ask for."""
    if (args.kind, args.stage) not in PRESETS:
        raise ValueError(f"--kind {args.kind} has no stage {args.stage}")
    preset = PRESETS[args.kind, args.stage]
    preset = StagePreset(
        args.length or preset.length,
        args.batch or preset.batch,
        args.lr or preset.lr,
        preset.anchor_offset,
    )
    folder = Path(args.output)
    if not args.resume and (folder / "checkpoint.pt").exists():
        raise ValueError(f"{folder} has a checkpoint: --resume goes on from it, or name another")
    processes, device = _processes()
    if device is None:
        device = choose_device(args.device)
    torch.manual_seed(args.seed)
    model, tokenizer = load_target(args.target, args.dtype, device)
    stream = TokenStream(Path(args.data), tokenizer, folder)
    target = FrozenTarget(model)
    recipe = _recipe(args, target, stream, preset)
    steps = args.steps or max(1, len(stream) // (preset.length * preset.batch))
    config = TrainConfig(
        steps=steps,
        batch=preset.batch,
        micro_batch=_micro_batch(args, recipe, preset, processes),
        length=preset.length,
        lr=preset.lr,
        warmup=math.ceil(steps / 10) if args.warmup is None else args.warmup,
        schedule=args.schedule,
        seed=args.seed,
        validate_every=args.validate_every,
        save_every=args.save_every,
        log_every=args.log_every,
    )
    validate = None
    if args.validation_data is not None:
        held_out = TokenStream(Path(args.validation_data), tokenizer, folder)
        validate = acceptance_validator(
            target, recipe, held_out, args.validation_prompts, args.validation_length,
            args.validation_tokens,
        )  # fmt: skip
    with _Log(folder, config, args.tensorboard, processes.index == 0) as show:
        trainer = Trainer(recipe, config, stream, folder, processes, validate, show)
        if args.resume:
            trainer.resume()
        trainer.run()


class _Log:
    """Logs lines to the screen, to ``log.jsonl``, and to TensorBoard; the first process alone."""

    def __init__(self, folder: Path, config: TrainConfig, tensorboard: bool | None, first: bool):
        self.folder, self.config, self.first = folder, config, first
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = _event_writer(tensorboard, folder) if first else None
        self._bar = None

    def __enter__(self) -> _Log:
        notes = standard_error()
        if self.first and notes.is_live:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.completed:,} of {task.total:,} steps"), BarColumn(),
                TimeRemainingColumn(), TextColumn("{task.description}"), console=notes.console,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("", total=self.config.steps)
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._writer is not None:
            self._writer.close()

    def __call__(self, report: Report) -> None:
        if not self.first:
            return
        append_log(self.folder / "log.jsonl", report)
        text = (
            f"loss {report.loss:.3f}, first choice right {report.accuracy:.3f}, "
            f"{report.tokens_per_second:,.0f} tokens/s"
        )
        if report.acceptance is not None:
            text += f", acceptance length {report.acceptance:.3f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=report.step, description=text)
        else:
            print(f"step {report.step} of {self.config.steps}: {text}", file=sys.stderr, flush=True)
        if self._writer is not None:
            for name in ("loss", "accuracy", "tokens_per_second", "lr", "acceptance"):
                value = getattr(report, name)
                if value is not None:
                    self._writer.add_scalar(name, value, report.step)
