"""Times a generation, prefill apart: Hugging Face's ``generate``, and our loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from .decode import SpecExtend
from .generation import Progress, Step
from .stats import SpecStats


@dataclass
class Timed:
    """Holds how a prompt was continued in one way.

    Attributes:
        tokens: what was written.
        first: how many of them came first; their time is the prefill's.
        to_first: seconds to these.
        to_last: seconds to the last one.
        rounds: times that tokens came after the first.
        draft_prefill: seconds that our draft took to read the prompt, before and after the first
            token.
        stats: of our own loop.
    """

    tokens: list[int] = field(default_factory=list)
    first: int = 0
    to_first: float = 0.0
    to_last: float = 0.0
    rounds: int = 0
    draft_prefill: tuple[float, float] = (0.0, 0.0)
    stats: SpecStats | None = None

    def add(self, step: Step, took: float) -> None:
        """Add a step of our loop that took so many seconds."""
        read = self.stats.seconds.get("draft_prefill", 0.0)
        if self.tokens:
            self.rounds += 1
            self.draft_prefill = self.draft_prefill[0], read - self.draft_prefill[0]
        else:
            self.first, self.to_first, self.draft_prefill = len(step.tokens), took, (read, 0.0)
        self.to_last += took
        self.tokens += step.tokens

    @property
    def prefill(self) -> float:
        """Give the seconds to the first token, without the draft's."""
        return self.to_first - self.draft_prefill[0]

    @property
    def decode(self) -> float:
        """Give the seconds from then to the last token, without the draft's reading."""
        return self.to_last - self.to_first - self.draft_prefill[1]

    @property
    def rate(self) -> float:
        """Divide tokens by seconds, decoding only."""
        return (len(self.tokens) - self.first) / self.decode if self.decode else 0.0


class _Clock(BaseStreamer):
    """Notes when tokens came, and how many."""

    def __init__(self, progress: Progress, total: int):
        self.times: list[float] = []
        self.counts: list[int] = []
        self._progress, self._total = progress, total
        self._prompt = 0

    def put(self, value: Tensor) -> None:
        if not self._prompt:
            self._prompt = value.numel()
            self._progress("prefill", 0, self._prompt)
            return
        self.times.append(time.perf_counter())
        self.counts.append(value.numel())
        if len(self.times) == 1:
            self._progress("prefill", self._prompt, self._prompt)
        self._progress("decoding", min(sum(self.counts), self._total), self._total)

    def end(self) -> None:
        pass


def time_hugging_face(
    model: PreTrainedModel, ids: Tensor, new: int, progress: Progress, **options
) -> Timed:
    """Time ``generate`` of the model itself.

    Args:
        ids: [1, L] int64, the prompt.
        new: tokens to write.
        progress: called as ``progress(phase, done, total)``.
        **options: for ``generate``.
    """
    clock = _Clock(progress, new)
    start = time.perf_counter()
    # With its cache, whatever the checkpoint says: training leaves use_cache=False behind.
    out = model.generate(ids, max_new_tokens=new, streamer=clock, use_cache=True, **options)
    first, last = clock.times[0], clock.times[-1]
    tokens = out[0, ids.shape[1] :].tolist()
    rounds = len(clock.times) - 1
    return Timed(tokens, min(clock.counts[0], len(tokens)), first - start, last - start, rounds)


def time_loop(
    spec: SpecExtend, ids: Tensor, new: int, show: Callable[[Step, int], None], **options
) -> Timed:
    """Time our loop.

    Args:
        ids: [1, L] int64, the prompt.
        new: tokens to write.
        show: given each step and the number of tokens so far; its time does not count.
        **options: for ``spec.stream``.
    """
    timed = Timed()
    for step, took in timed_steps(spec.stream(ids, max_new_tokens=new, **options)):
        timed.stats = spec.stats
        timed.add(step, took)
        show(step, len(timed.tokens))
    return timed


def timed_steps(steps: Iterator[Step]) -> Iterator[tuple[Step, float]]:
    """Yield steps and the seconds that each took, without those that its reader takes."""
    while True:
        start = time.perf_counter()
        step = next(steps, None)
        if step is None:
            return
        yield step, time.perf_counter() - start


def parting(ours: list[int], theirs: list[int]) -> int | None:
    """Find the first token at which two continuations differ, None if they do nowhere;
    where one is only longer, the end of the other."""
    if ours == theirs:
        return None
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def difference(tokenizer, ours: list[int], theirs: list[int], name: str) -> str | None:
    """Say where two continuations part, in words; None if nowhere."""
    at = parting(ours, theirs)
    if at is None:
        return None
    if at >= min(len(ours), len(theirs)):
        return f"the output has {len(ours)} tokens, that of {name} {len(theirs)}"
    return (
        f"new token {at} is {tokenizer.decode([ours[at]])!r} ({ours[at]}), but "
        f"{tokenizer.decode([theirs[at]])!r} ({theirs[at]}) with {name}"
    )


@torch.inference_mode()
def logit_gap(
    model: PreTrainedModel, ids: Tensor, ours: list[int], theirs: list[int]
) -> float | None:
    """Return how far apart the model itself sees the two tokens at which two continuations part:
    the difference of their logits; None where none or only one has a token there."""
    at = parting(ours, theirs)
    if at is None or at >= min(len(ours), len(theirs)):
        return None
    context = torch.cat([ids, ids.new_tensor([theirs[:at]])], 1)
    logits = model(input_ids=context, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    return (logits[ours[at]] - logits[theirs[at]]).abs().item()
