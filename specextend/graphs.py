"""Runs the round on a GPU: parts of it as CUDA graphs, and what the host learns of them.

What is captured works on the device alone: lengths, masks and acceptance are tensors, and the host
launches without knowing them. One small block per round comes back (:class:`Mailbox`). On a CPU,
and where a model cannot be captured, the same functions are simply called.
"""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable
from contextlib import contextmanager, suppress

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import _C

# Replays a recorded function; and what the function returned, which a replay fills anew.
Recording = tuple[Callable[[], None], object]

capturing = threading.Lock()  # CUDA allows one capture at a time in a process

# Streams that recorders had and have no more.
_idle_streams: dict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


def _take_stream(device: torch.device) -> torch.cuda.Stream:
    """Take a stream that neither torch nor another recorder uses.

    Those of torch come round again after 32, and a graph that is dropped may take with it what
    cuBLAS keeps for all that was recorded on its stream (pytorch#193402).
    """
    try:
        return _idle_streams[device].pop()
    except IndexError:
        return torch.cuda.ExternalStream(_C.create_stream(device.index), device)


class CudaRecorder:
    """Records functions as CUDA graphs that share their memory, so that one runs at a time."""

    def __init__(self, device: torch.device):
        self.device = device
        with torch.cuda.device(device):
            self._stream = _take_stream(device)
            self._pool = torch.cuda.graph_pool_handle()
        # Replays hold the recorder, so that no graph of its stream is left by then.
        weakref.finalize(self, _idle_streams[device].append, self._stream)

    def record(self, function: Callable[[], object]) -> Recording:
        """Capture ``function``, which does not run; RuntimeError if it waits for the device."""
        graph = torch.cuda.CUDAGraph()
        with capturing, torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            # What torch makes here for its random numbers has to be changed by later captures, in
            # inference mode or not (pytorch#166792).
            with torch.inference_mode(False):
                # Other threads may go on as they like: only what this one does must be capturable.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                outputs = function()
            except BaseException:
                with suppress(RuntimeError):  # the capture is broken; the cause is what counts
                    graph.capture_end()
                raise
            graph.capture_end()

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return replay, outputs

    def finish(self) -> None:
        """Wait for replays under way, so that their graphs may be dropped."""
        torch.cuda.current_stream(self.device).synchronize()


class Graphs:
    """Calls functions on the device, and replays them as graphs where there is a recorder.

    The first call of a key runs the function, which also warms it up; the second one records it;
    from then on it is replayed. The function must do the same for the same key, but for the values
    of its tensor arguments and of the tensors that it reads and changes elsewhere, which must stay
    where they are. It must not read a tensor's value on the host, nor count anything there.

    Args:
        recorder: None: functions are called.
        name: whose work it is, for the warning if it turns out that it cannot be recorded.

    Attributes:
        preparations: calls that were no replays, but took the time of warming up or recording.
    """

    def __init__(self, recorder: CudaRecorder | None = None, name: str = ""):
        self._recorder = recorder
        self._name = name
        self._recordings: dict[Hashable, tuple | None] = {}
        self.preparations = 0

    @property
    def enabled(self) -> bool:
        """Tell whether functions are recorded: the host then cannot follow what they count."""
        return self._recorder is not None

    def call(self, key: Hashable, function: Callable[..., object], *tensors: Tensor | None):
        """Return ``function(*tensors)``, which holds until the next call."""
        if self._recorder is None:
            return function(*tensors)
        self.preparations += self._recordings.get(key) is None
        if key not in self._recordings:
            self._recordings[key] = None
            return function(*tensors)
        recording = self._recordings[key]
        if recording is None:
            inputs = [None if t is None else t.clone() for t in tensors]
            try:
                recording = (inputs, *self._recorder.record(lambda: function(*inputs)))
            except RuntimeError as error:
                warn_uncaptured(self._name, f"capturing failed: {error}")
                self._recorder = None
                self._recordings.clear()
                return function(*tensors)
            self._recordings[key] = recording
        inputs, replay, outputs = recording
        for ours, theirs in zip(inputs, tensors, strict=True):
            if ours is not None:
                ours.copy_(theirs)
        replay()
        return outputs

    def close(self) -> None:
        """Drop what was recorded."""
        if self._recordings and self._recorder is not None:
            self._recorder.finish()
        self._recordings.clear()


class Capture:
    """Gives graphs to the parts of a round, and warns once of each part that has to run without.

    Args:
        recorder: makes what records on a device; None: a :class:`CudaRecorder` on a GPU, and
            nothing is recorded elsewhere.
        enabled: False: nothing is recorded anywhere.
    """

    def __init__(
        self, recorder: Callable[[torch.device], CudaRecorder] | None = None, enabled: bool = True
    ):
        self._recorder = recorder
        self._enabled = enabled
        self._told: set[str] = set()

    def graphs(self, device: torch.device, name: str, obstacle: str | None) -> Graphs:
        """Return graphs for the work that ``name`` does.

        Args:
            device: that it works on.
            obstacle: why it cannot be captured; None if it can.
        """
        recorder = self._recorder
        if recorder is None and device.type == "cuda":
            recorder = CudaRecorder
        if recorder is None or not self._enabled:
            return Graphs()
        if obstacle is None:
            return Graphs(recorder(device), name)
        if name not in self._told:
            self._told.add(name)
            warn_uncaptured(name, obstacle)
        return Graphs()


def bucket(nodes: int, max_nodes: int, group: int) -> int:
    """Return the size to pad a tree of ``nodes`` proposed nodes to, so that few sizes are captured,
    and these cost no more than they have to.

    The kernels compute 16, 32, 64, 128, 256, ... rows of a KV head, and the root is one of the
    tree's: with a group of 4, trees of 3, 7, 15, 31 and 63 nodes fill them. No tree is padded
    beyond ``max_nodes``.

    Args:
        group: query heads of a KV head.
    """
    rows = 16
    while rows // group < 1 + nodes:
        rows *= 2
    return min(rows // group - 1, max(nodes, max_nodes))


def warn_uncaptured(name: str, reason: str) -> None:
    """Say that something runs without graphs."""
    warnings.warn(
        f"specextend: {name} runs without CUDA graphs: {reason}", RuntimeWarning, stacklevel=3
    )


def obstacle(model: PreTrainedModel) -> str | None:
    """Say why a model's forward cannot be captured as a CUDA graph; None if nothing is known."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        kind = parameters.get("rope_type", parameters.get("type"))
        if kind in ("dynamic", "longrope"):
            return f"its {kind} rotary embedding looks at positions on the host"
    if getattr(config, "_experts_implementation", None) == "eager" and _has_experts(model):
        return (
            "its eager mixture of experts asks the host which experts have tokens; load it with "
            'experts_implementation="grouped_mm"'
        )
    if any(hasattr(m, "_hf_hook") for m in model.modules()):
        return "accelerate's hooks move weights or activations on the host's command"
    if len({p.device for p in model.parameters()}) > 1:
        return "its weights are on several devices"
    if getattr(model, "is_loaded_in_8bit", False):
        return "its 8-bit layers look for outliers on the host"
    return None


def _has_experts(model: PreTrainedModel) -> bool:
    return any("Experts" in type(m).__name__ for m in model.modules())


class Mailbox:
    """Brings a few numbers per round from the device to the host, while the host goes on."""

    def __init__(self, size: int, device: torch.device):
        self._device = device
        self._numbers: Tensor | None = None
        self._pinned: Tensor | None = None
        if device.type == "cuda":
            self._pinned = torch.empty(size, dtype=torch.float64, pin_memory=True)
            self._arrived = torch.cuda.Event()

    def send(self, numbers: Tensor) -> None:
        """Copy [size] fp64 numbers; does not wait."""
        if self._pinned is None:
            self._numbers = numbers
        else:
            self._pinned.copy_(numbers, non_blocking=True)
            self._arrived.record(torch.cuda.current_stream(self._device))

    def receive(self) -> list[float]:
        """Return what was sent last, once it has arrived: the one wait of a round."""
        if self._pinned is None:
            return self._numbers.tolist()
        self._arrived.synchronize()
        return self._pinned.tolist()


class Stopwatch:
    """Measures the seconds that the device takes for a ``with`` block; on a CPU the host's."""

    def __init__(self, device: torch.device):
        self._device = device
        self._events = None
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __enter__(self) -> Stopwatch:
        self._start = self._mark(0)
        return self

    def __exit__(self, *exception) -> None:
        self._stop = self._mark(1)

    def _mark(self, index: int) -> float:
        if self._events is not None:
            self._events[index].record(torch.cuda.current_stream(self._device))
        return time.perf_counter()

    @property
    def seconds(self) -> float:
        """Give the time; to be read when the device has got past the block."""
        if self._events is not None:
            return self._events[0].elapsed_time(self._events[1]) / 1e3
        return self._stop - self._start


class RoundCost:
    """Counts the seconds that the device works for a round, with its draft's and retrieval's work
    before it.

    Args:
        device: of the work.
        graphs: that it is captured in.
    """

    def __init__(self, device: torch.device, graphs: tuple[Graphs, ...]):
        self._device, self._graphs = device, graphs
        self._drafting: list[Stopwatch] = []
        self._round: list[Stopwatch] = []
        self._coming: list[Stopwatch] = []  # of the round to come
        self._coming_draft: list[Stopwatch] = []
        self._prepared = self._prepared_before = 0  # calls that prepared a graph, up to a round

    def draft(self) -> Stopwatch:
        """Return a watch for the tree of the round to come."""
        self._coming_draft.append(Stopwatch(self._device))
        return self._coming_draft[-1]

    def work(self) -> Stopwatch:
        """Return a watch for other work that is done for the round to come."""
        self._coming.append(Stopwatch(self._device))
        return self._coming[-1]

    @contextmanager
    def verify(self):
        """Time the verify pass, with which a round's work ends."""
        self._round, self._coming = self._coming, []
        self._drafting, self._coming_draft = self._coming_draft, []
        self._round.append(Stopwatch(self._device))
        with self._round[-1]:
            yield
        self._prepared_before = self._prepared
        self._prepared = sum(graphs.preparations for graphs in self._graphs)

    def seconds(self) -> tuple[float, float] | tuple[None, None]:
        """Return the last round's seconds, and how many of them its tree took, to be read when the
        device has got past it; None where it took longer for once, as a graph was warmed up or
        recorded."""
        if self._prepared != self._prepared_before:
            return None, None
        drafting = sum(watch.seconds for watch in self._drafting)
        return drafting + sum(watch.seconds for watch in self._round), drafting
