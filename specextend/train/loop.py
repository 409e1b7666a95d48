"""Runs the training loop: steps, schedule, checkpoints, validation, logs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

from .data import Batch, TokenStream
from .loss import Measured

BETAS, CLIP = (0.9, 0.95), 1.0
FLOOR = 0.02  # the learning rate falls to this part of its peak
CHECKPOINT = "checkpoint.pt"
DECAY = 0.3  # the "linear" schedule falls in this share of the steps


@dataclass(frozen=True)
class TrainConfig:
    """Holds the options of a run.

    Attributes:
        steps: updates in all.
        batch: windows per update, over all processes.
        micro_batch: windows at a time in one process.
        length: tokens per window.
        lr: peak learning rate.
        warmup: steps in which it rises.
        schedule: how it falls. ``"cosine"``, the papers' way; ``"linear"``: constant, then a line
            over the last 30 % of the steps, so that a run can be made longer while it is constant.
        weight_decay: of matrices.
        seed: of everything that is drawn.
        validate_every, save_every, log_every: steps.
    """

    steps: int
    batch: int
    micro_batch: int
    length: int
    lr: float
    warmup: int
    schedule: Literal["cosine", "linear"] = "cosine"
    weight_decay: float = 0.1
    seed: int = 0
    validate_every: int = 500
    save_every: int = 100
    log_every: int = 10

    def __post_init__(self):
        for name in ("steps", "batch", "micro_batch", "validate_every", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.length < 8:
            raise ValueError(f"length must be at least 8, got {self.length}")
        if self.batch % self.micro_batch:
            raise ValueError(
                f"batch must be a multiple of micro_batch={self.micro_batch}, got {self.batch}"
            )
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup must be in [0, {self.steps}], got {self.warmup}")
        if self.schedule not in ("cosine", "linear"):
            raise ValueError(f"schedule must be cosine or linear, got {self.schedule!r}")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        if self.schedule == "cosine":
            done = (step - self.warmup) / max(1, self.steps - self.warmup)
            fall = 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
        else:
            fall = min(1.0, (self.steps - step) / (DECAY * self.steps))
        return self.lr * min(1.0, (step + 1) / (self.warmup + 1)) * max(FLOOR, fall)


class Recipe(Protocol):
    """Says what each kind of draft does in training."""

    module: nn.Module

    def backward(self, batch: Batch, generators: list[torch.Generator]) -> Measured:
        """Add the gradients of the rows' summed losses, weighted as :class:`Measured` says.

        Each window draws from its own generator alone, so that nothing depends on which windows are
        taken together.
        """

    def save(self, folder: Path) -> None:
        """Write the draft in its published format."""


class Processes:
    """Stands for one process, or for several that `accelerate launch` started.

    Each takes its share of a batch's windows, and gradients are summed over them: with one process
    or many the same windows, positions and lags make a step.
    """

    def __init__(self, accelerator=None):
        self._accelerator = accelerator
        self.count = accelerator.num_processes if accelerator else 1
        self.index = accelerator.process_index if accelerator else 0

    def sum(self, tensors: list[torch.Tensor]) -> None:
        """Sum over the processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                tensor.copy_(self._accelerator.reduce(tensor, reduction="sum"))

    def least(self, value: int) -> int:
        """Return the least value of all processes."""
        if self.count == 1:
            return value
        values = torch.zeros(self.count, dtype=torch.float64, device=self._accelerator.device)
        values[self.index] = value
        self.sum([values])
        return int(values.min())

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()


@dataclass
class Report:
    """Holds what a log line says."""

    step: int
    loss: float
    accuracy: float
    tokens_per_second: float
    lr: float
    acceptance: float | None = None


class Trainer:
    """Trains a recipe; training can stop and go on at any step.

    Args:
        recipe: what is trained.
        config: the run.
        stream: training text.
        folder: checkpoints go here.
        processes: those that train together.
        validate: the mean acceptance length of the draft as it is, or None.
        report: called at every log line, in the first process.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: TrainConfig,
        stream: TokenStream,
        folder: Path,
        processes: Processes | None = None,
        validate: Callable[[], float] | None = None,
        report: Callable[[Report], None] = lambda report: None,
    ):
        self.recipe, self.config, self.stream, self.folder = recipe, config, stream, folder
        self.processes = processes or Processes()
        self.validate, self.report = validate, report
        share = config.batch // config.micro_batch
        if share % self.processes.count:
            raise ValueError(
                f"batch / micro_batch must be a multiple of the {self.processes.count} processes, "
                f"got {share}"
            )
        self.parameters = [p for p in recipe.module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.dim() > 1]},
            {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=BETAS, weight_decay=config.weight_decay
        )
        self.step = 0

    @property
    def checkpoint(self) -> Path:
        """Say where the run's state is kept."""
        return self.folder / CHECKPOINT

    def save(self) -> None:
        """Write the run's state; a run that is killed meanwhile keeps the one before."""
        if self.processes.index == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.checkpoint.with_suffix(".part")
            state = {
                "module": self.recipe.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "config": asdict(self.config),
                "data": self.stream.name,
            }
            torch.save(state, part)
            part.replace(self.checkpoint)
        self.processes.wait()

    def resume(self) -> None:
        """Go on from the folder's checkpoint.

        Raises:
            ValueError: it is of another run: what differs is named.
            FileNotFoundError: there is none.
        """
        if not self.checkpoint.exists():
            raise FileNotFoundError(f"there is no checkpoint in {self.folder}")
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        now = asdict(self.config)
        quiet = {"micro_batch", "validate_every", "save_every", "log_every"}
        for name, value in state["config"].items():
            if name not in quiet and now[name] != value:
                raise ValueError(
                    f"the checkpoint in {self.folder} was made with {name}={value}, "
                    f"but {name}={now[name]} is asked for"
                )
        if state["data"] != self.stream.name:
            raise ValueError(f"the checkpoint in {self.folder} was made with another training text")
        self.recipe.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def run(self) -> None:
        """Train to the last step; checkpoints on the way, the draft's files at the end."""
        config, device = self.config, self.parameters[0].device
        total, tokens, start = Measured(), 0, time.perf_counter()
        while self.step < config.steps:
            step = self.step
            total += self._update(device)
            tokens += config.batch * config.length
            self.step += 1
            last = self.step == config.steps
            acceptance = None
            if self.validate and (last or self.step % config.validate_every == 0):
                acceptance = self.validate()
            if last or self.step % config.log_every == 0 or acceptance is not None:
                rows, seconds = max(total.rows, 1), time.perf_counter() - start
                self.report(
                    Report(
                        self.step, total.loss / rows, total.right / rows, tokens / seconds,
                        config.rate(step), acceptance,
                    )
                )  # fmt: skip
                total, tokens, start = Measured(), 0, time.perf_counter()
            if last or self.step % config.save_every == 0:
                self.save()
        if self.processes.index == 0:
            self.recipe.save(self.folder)

    def _update(self, device: torch.device) -> Measured:
        """Make one step of the optimizer, and return sums over all processes."""
        config, processes, step = self.config, self.processes, self.step
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(step)
        self.optimizer.zero_grad()
        parts = config.batch // config.micro_batch
        total = torch.zeros(4, dtype=torch.float64)
        for part in range(processes.index, parts, processes.count):
            index = step * parts + part
            batch = self.stream.batch(index, config.micro_batch, config.length, config.seed)
            first = index * config.micro_batch
            measured = self.recipe.backward(
                batch.to(device), [self._noise(first + i) for i in range(config.micro_batch)]
            )
            total += torch.tensor(astuple(measured))
        gradients = [p.grad for p in self.parameters]
        processes.sum(gradients)
        total = total.to(device, torch.float32)
        processes.sum([total])
        loss, right, rows, weight = total.tolist()
        for gradient in gradients:
            gradient /= weight or 1.0
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        return Measured(loss, right, int(rows), weight)

    def _noise(self, window: int) -> torch.Generator:
        """Return what a window draws from, in any run with this seed."""
        return torch.Generator().manual_seed(self.config.seed * (1 << 32) + window)


def saved_config(folder: Path) -> dict | None:
    """Return the options of the run whose checkpoint is in a folder, None where there is none."""
    file = folder / CHECKPOINT
    if not file.exists():
        return None
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)["config"]


def append_log(file: Path, report: Report) -> None:
    """Append a line of JSON."""
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps({k: v for k, v in asdict(report).items() if v is not None}) + "\n")
