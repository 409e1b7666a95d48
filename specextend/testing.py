"""Helps those who test or time the ops, ours and their own."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor


def assert_within_twice(got: Tensor, exact: Tensor, plain: Tensor, eps: float = 1e-6) -> None:
    """Assert the self-scaling error bound: at most twice the error of a plain computation.

    Args:
        got: result under test.
        exact: the same in float64.
        plain: the same computed by plain PyTorch in the dtype under test.
        eps: allowed besides, relative to ``1 + abs(exact)``.

    Infinite values must be the same in ``got`` and ``exact``; NaN is an error. Synchronises.
    """
    assert got.shape == exact.shape, (got.shape, exact.shape)
    got, plain = got.to(exact), plain.to(exact)
    assert not got.isnan().any(), "NaN in the result"
    finite = exact.isfinite()
    assert torch.equal(got.isfinite(), finite) and torch.equal(got[~finite], exact[~finite])
    if not finite.any():
        return
    error = (got - exact)[finite].abs()
    allowed = 2 * (plain - exact)[finite].abs().max().nan_to_num(0.0)
    excess = (error - allowed - eps * (1 + exact[finite].abs())).max()
    assert excess <= 0, f"error {error.max():.3e}, allowed {allowed:.3e} (+ eps {eps:g})"


def in_layout(t: Tensor, layout: str) -> Tensor:
    """Copy ``t`` [B, S, H, D] with other strides and a unit last one.

    ``"bshd"``: contiguous. ``"bhsd"``: head by head, as Hugging Face's caches. ``"sliced"``: some
    of the heads and elements of a larger tensor, which holds NaN elsewhere.
    """
    batch, rows, heads, dim = t.shape
    if layout == "bshd":
        return t.clone(memory_format=torch.contiguous_format)
    if layout == "bhsd":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        base = t.new_full((batch, rows + 1, heads + 2, dim + 3), torch.nan)
        view = base[:, :rows, 1 : heads + 1, 2 : dim + 2]
        view.copy_(t)
        return view
    raise ValueError(f"layout must be bshd, bhsd or sliced, got {layout!r}")


def pack_mask(visible: Tensor) -> Tensor:
    """Pack [..., N] bool as an op's mask: [..., ceil(N / 64)] int64, bit j % 64 of word j // 64."""
    words = -(-visible.shape[-1] // 64)
    padded = torch.nn.functional.pad(visible, (0, 64 * words - visible.shape[-1]))
    bits = padded.unflatten(-1, (words, 64)).long()
    return (bits << torch.arange(64, device=visible.device)).sum(-1)


def ancestor_mask(parents: Tensor) -> Tensor:
    """Let node i see itself and its ancestors: [N, N] bool; ``parents`` [N], -1 for a root."""
    count = len(parents)
    visible = torch.eye(count, dtype=torch.bool)
    for node in range(count):
        at = int(parents[node])
        while at >= 0:
            visible[node, at] = True
            at = int(parents[at])
    return visible


class Spread:
    """Holds measurements of one thing: ``median``, ``p10``, ``p90``, ``mean``, and all of them,
    sorted, in ``samples``.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, samples: list[float]):
        if not samples:
            raise ValueError("at least one measurement is wanted, got none")
        self.samples = sorted(samples)
        self.median = statistics.median(self.samples)
        self.mean = statistics.fmean(self.samples)
        self.p10 = self.samples[len(self.samples) // 10]
        self.p90 = self.samples[len(self.samples) * 9 // 10]


def time_calls(
    *functions: Callable[[], object],
    seconds: float = 0.5,
    min_calls: int = 5,
    max_calls: int = 1000,
    before: Callable[[], object] = lambda: None,
) -> list[Spread]:
    """Time calls of functions in turn, so that a busy machine slows all of them alike.

    Args:
        functions: what to time; each is called once before, to warm up.
        seconds: time for all of them together, once each has had ``min_calls`` calls.
        max_calls: of each.
        before: called before each call and not timed, such as what empties the caches.
    """
    for function in functions:
        function()
    samples: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while len(samples[0]) < min_calls or (
        time.perf_counter() < end and len(samples[0]) < max_calls
    ):
        for function, own in zip(functions, samples, strict=True):
            before()
            start = time.perf_counter()
            function()
            own.append(time.perf_counter() - start)
    return [Spread(own) for own in samples]


def time_graphs(
    *contestants: list[Callable[[], object]], seconds: float = 0.5, min_calls: int = 20
) -> list[Spread]:
    """Time calls on a GPU without the host's share: each contestant is captured in a CUDA graph
    of many calls, and the graphs are replayed in turn. Synchronises.

    Args:
        contestants: variants of one call each, on buffers of their own, which take turns: as many
            as make their buffers larger than the L2 cache, so that it is cold.
        seconds: time for all of them together, once each has had five replays.
        min_calls: calls in a graph at least, but for calls that take more than a millisecond. What
            cannot be captured is launched as often instead.
    """
    replays, counts = [], []
    stream = torch.cuda.Stream()
    for variants in contestants:
        for variant in variants:
            variant()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        variants[0]()
        stop.record()
        stop.synchronize()
        fitting = int(min_calls / max(start.elapsed_time(stop), 1.0))
        count = max(fitting, len(variants))

        def calls(variants=variants, count=count):
            for i in range(count):
                variants[i % len(variants)]()

        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                calls()
            replays.append(graph.replay)
        except RuntimeError:
            torch.cuda.synchronize()
            replays.append(calls)
        counts.append(count)
    for replay in replays:
        replay()
    torch.cuda.synchronize()
    samples: list[list[float]] = [[] for _ in contestants]
    end = time.perf_counter() + seconds
    while len(samples[0]) < 5 or time.perf_counter() < end:
        for replay, count, own in zip(replays, counts, samples, strict=True):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            stop.record()
            stop.synchronize()
            own.append(start.elapsed_time(stop) / 1e3 / count)
    return [Spread(own) for own in samples]
