"""Tests the emulation itself: what it does right, and the faults in kernels that it finds."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import emulation
import pytest
import test_append_kv
import test_chunk_scores
import test_compact_kv
import test_gather_chunks
import test_merge_states
import test_rotary_append
import test_tree_attention
import torch
from backends import Scheduler, build_or_skip, emulated, for_each
from emulation import KINDS, Schedule
from kv_cases import DTYPES, LAYOUTS, Guarded

from specextend import ops, reference

SCHEDULES = [Schedule(seed, kind) for kind in KINDS for seed in range(6)]


class Probes(emulation.Library):
    """Calls the kernels of emulation/probes.cu."""

    def __init__(self, name="probes", options=()):
        own = [emulation.HERE / "probes.cu", *([emulation.HERE / "fiber.cpp"] if options else [])]
        shared = [path for path in emulation.RUNTIME if path not in own]
        super().__init__(emulation.build(name, shared, own, options))
        self._probe = self.handle.specextend_probe
        self._probe.restype = ctypes.c_char_p

    def __call__(self, name, out, given=None, *, grid=1, block=32, shared=0, count=0, fault=0):
        """Run one; ``out`` and ``given`` are int32 or of that size."""
        triple = ctypes.c_uint * 3
        grid, block = (
            triple(*(*(x if isinstance(x, tuple) else (x,)), 1, 1)[:3]) for x in (grid, block)
        )
        error = self._probe(
            name.encode(),
            grid,
            block,
            ctypes.c_size_t(shared),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_void_p(0 if given is None else given.data_ptr()),
            count,
            fault,
        )
        if error is not None:
            raise RuntimeError(error.decode())
        return out

    def error(self, schedule: Schedule, *args, **options) -> str:
        with self.schedule(schedule), pytest.raises(RuntimeError) as caught:
            self(*args, **options)
        return str(caught.value)


def probes_or_skip(*args):
    try:
        return Probes(*args)
    except emulation.ToolMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def probes():
    library = probes_or_skip()
    with library.guarded_memory():
        yield library


def on_every_schedule(test):
    """Makes of a method with ``probes`` and ``schedule`` one test, by the probes under each of
    SCHEDULES in turn.
    """

    @functools.wraps(test)
    def scheduled(self, probes, schedule, **given):
        with probes.schedule(schedule):
            test(self, probes, schedule, **given)

    return for_each(schedule=SCHEDULES)(scheduled)


def ints(*shape):
    return torch.empty(shape, dtype=torch.int32)


def arange(count):
    return torch.arange(count, dtype=torch.int32)


class TestWhatThreadsDo:
    @on_every_schedule
    def test_indices(self, probes, schedule):
        out = probes("indices", ints(30, 24), grid=(2, 3, 5), block=(4, 3, 2))
        assert torch.equal(out, (torch.arange(30)[:, None] * 1000 + torch.arange(24)).int())

    @on_every_schedule
    def test_warp_functions(self, probes, schedule):
        values = torch.randint(0, 50, (32,), generator=torch.Generator().manual_seed(1)).int()
        out = probes("warp_functions", ints(13, 32), values).tolist()
        v = values.tolist()
        lanes = range(32)

        def bits(lane_set):
            x = sum(1 << i for i in lane_set)
            return x - (1 << 32) if x >> 31 else x

        assert out[0] == [v[i * 7 % 32] for i in lanes]
        assert out[1] == [v[i // 8 * 8 + 5] for i in lanes]
        assert out[2] == [v[i ^ 9] for i in lanes]
        assert out[3] == [v[i - 3] if i >= 3 else v[i] for i in lanes]
        assert out[4] == [v[i - 3] if i % 8 >= 3 else v[i] for i in lanes]
        assert out[5] == [v[i + 3] if i < 29 else v[i] for i in lanes]
        assert out[6] == [v[i + 3] if i % 8 < 5 else v[i] for i in lanes]
        assert out[7] == [bits(i for i in lanes if v[i] % 3 == 0)] * 32
        assert out[8] == [3] * 32
        assert out[9] == [bits(j for j in lanes if v[j] % 3 == v[i] % 3) for i in lanes]
        assert out[10] == [sum(v)] * 32
        assert out[11] == [max(v) - min(v)] * 32
        assert out[12] == [v[i ^ (1 if i < 16 else 2)] for i in lanes]

    @on_every_schedule
    def test_barriers(self, probes, schedule):
        for threads in (32, 64, 96, 1024):
            out = probes(
                "reverse", ints(2, threads), arange(threads), block=threads, shared=4 * threads
            )
            assert torch.equal(out[0], arange(threads).flip(0)) and torch.equal(out[1], out[0] + 1)
        out = probes("reverse_warp", ints(32), arange(32), shared=128)
        assert torch.equal(out, arange(32).flip(0))

    @on_every_schedule
    def test_barriers_of_some_warps(self, probes, schedule):
        out = probes("producer", ints(2, 32), arange(64), block=96, shared=256)
        assert torch.equal(out, arange(64).view(2, 32).flip(1))

    @on_every_schedule
    def test_votes_of_a_block(self, probes, schedule):
        out = probes("block_votes", ints(70), arange(70) % 7, block=70)
        assert out.tolist() == [30 * 4 + 3] * 70

    @on_every_schedule
    def test_copies(self, probes, schedule):
        rows = torch.randint(100, (5, 64, 4), dtype=torch.int32)
        out = probes("copies", ints(6, 64, 4), rows, block=64, shared=2048, count=5)
        assert torch.equal(out[:5], rows.flip(1)) and (out[5] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("transposed", [False, True])
    @on_every_schedule
    def test_mma(self, probes, schedule, dtype, transposed):
        generator = torch.Generator().manual_seed(3)
        a, b = (torch.randn(16, n, generator=generator).to(dtype) for n in (16, 8))
        given = torch.cat([a.flatten(), (b if transposed else b.T).flatten()])
        name = "multiply_" + ("half" if dtype == torch.float16 else "bfloat16")
        out = torch.empty(16, 8)
        probes(name, out, given, shared=16 * 24 * 2, count=1, fault=int(transposed))
        torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=0, atol=1e-5)

    @on_every_schedule
    def test_atomics(self, probes, schedule):
        values = torch.randint(8, (150,), dtype=torch.int32)
        out = torch.zeros(16, dtype=torch.int32)
        out[9] = 1000
        probes("histogram", out, values, grid=3, block=64, count=150)
        assert torch.equal(out[:8], values.bincount(minlength=8).int())
        assert out[8:11].tolist() == [191, 0, 255] and out[11] == out[12] > 0

    @on_every_schedule
    def test_last_arriver(self, probes, schedule):
        out = torch.full((12,), -1, dtype=torch.int32)
        out[11] = 0
        for _ in range(2):  # the ticket is as it was
            probes("last_arriver", out, arange(10), grid=10, block=1)
            assert out[0] == 45 and out[11] == 0

    def test_conversions(self, probes):
        generator = torch.Generator().manual_seed(5)
        bits = torch.randint(-(2**31), 2**31, (60000,), generator=generator).int()
        edges = torch.arange(65536).int().to(torch.int32) << 13  # halves, and what lies between
        bits = torch.cat([bits, edges, edges + 4096, edges - 1, edges + 4097])
        count = len(bits)
        blocks = -(-count // 1024)
        out = probes("convert", ints(count + 65536), bits, grid=blocks, block=1024, count=count)
        x = bits.view(torch.float32)
        halves = x.half().view(torch.int16).int() & 0xFFFF
        bfloats = x.bfloat16().view(torch.int16).int() & 0xFFFF
        number = ~x.isnan()
        assert torch.equal((out[:count] & 0xFFFF)[number], halves[number])
        assert torch.equal((out[:count] >> 16 & 0xFFFF)[number], bfloats[number])
        assert ((out[:count] & 0xFFFF)[~number] == 0x7FFF).all()
        floats = torch.arange(65536).to(torch.int16).view(torch.float16).float()
        number = ~floats.isnan()
        assert torch.equal(out[count:][number], floats.view(torch.int32)[number])
        assert out[count:].view(torch.float32)[~number].isnan().all()


class TestRaces:
    """What nothing orders is an error on every schedule; with a barrier more all is right."""

    @pytest.mark.parametrize(
        ("name", "fault", "block", "message"),
        [
            ("reverse", 1, 96, "shared memory, which thread .* has (read|written), and"),
            ("reverse", 2, 96, "shared memory, which thread .* has (read|written), and"),
            ("reverse_warp", 1, 32, "shared memory, which thread .* has (read|written), and"),
            ("producer", 1, 96, "shared memory, which thread .* has (read|written), and"),
            ("copies", 1, 64, "which a cp.async that thread .* has not waited for has written"),
            ("copies", 2, 64, "which a cp.async that thread .* has not waited for has written"),
            ("copies", 3, 64, "shared memory, which (thread|a cp.async) .* has (read|written)"),
            ("copies", 4, 64, "shared memory, which (thread|a cp.async) .* has (read|written)"),
            ("minimum", 1, 32, "a tensor's memory of 192 bytes, which thread .* has"),
            ("bulk_copies", 2, 32, "uses .*, which thread .* has written, and|not initialised"),
            ("bulk_copies", 3, 32, "which a bulk copy has written, and nothing orders the two"),
            ("bulk_copies", 4, 32, "which a bulk copy has written, and nothing orders the two"),
            ("bulk_copies", 6, 32, "shared memory, which thread .* has (read|written), and"),
        ],
    )
    @on_every_schedule
    def test_of_threads(self, probes, schedule, name, fault, block, message):
        given = (torch.arange(2048) % 50).int()
        out = ints(48) if name == "minimum" else ints(2048)
        text = probes.error(
            schedule,
            name,
            out.fill_(99),
            given,
            block=block,
            shared=2048,
            count=5 * (name == "copies"),
            fault=fault,
        )
        assert re.search(message, text), text

    @on_every_schedule
    def test_of_blocks(self, probes, schedule):
        given = arange(120)
        out = probes("scratch", ints(240), given, grid=5, block=24)
        assert torch.equal(out[:120].view(5, 24), given.view(5, 24).flip(1))
        text = probes.error(schedule, "scratch", ints(240), given, grid=5, block=24, fault=1)
        assert "which another block has changed, and nothing orders the two" in text

    @pytest.mark.parametrize("fault", [1, 2, 3])
    def test_of_the_last_block(self, probes, fault):
        """It need not be the last of the grid, and has to fence on both sides of its ticket."""
        found = []
        for seed in range(6):
            out = torch.zeros(12, dtype=torch.int32)
            with probes.schedule(Schedule(seed)):
                try:
                    out = probes("last_arriver", out, arange(10), grid=10, block=1, fault=fault)
                    found.append(out[0] != 45)
                except RuntimeError as error:
                    found.append("which another block has" in str(error))
        assert sum(found) >= (3 if fault == 1 else 6)


class TestFences:
    """What tensor cores, copies and the next kernel are to see needs a fence."""

    @on_every_schedule
    def test_all_there(self, probes, schedule):
        given = arange(32)
        assert torch.equal(probes("bulk_copies", ints(32), given, shared=136), given + 1)
        assert torch.equal(probes("minimum", ints(1).fill_(99), given + 7), arange(1) + 7)
        before = probes.early_launches
        assert torch.equal(probes("early", ints(32), given), given)
        assert probes.early_launches == before + 1

    @pytest.mark.parametrize(
        ("name", "fault", "message"),
        [
            ("bulk_copies", 1, "a bulk copy for an mbarrier whose initialisation is not fenced"),
            ("bulk_copies", 5, "of shared memory, which thread .* has stored without a fence"),
            ("early", 1, "ends without having waited for the kernels before this one"),
            ("early", 2, "writes .* before it has waited for the kernels before this one"),
        ],
    )
    @on_every_schedule
    def test_one_too_few(self, probes, schedule, name, fault, message):
        text = probes.error(schedule, name, ints(32), arange(32), shared=136, fault=fault)
        assert re.search(message, text), text


@pytest.mark.parametrize("schedule", [Schedule(1, kind) for kind in KINDS], ids=lambda s: s.kind)
class TestErrors:
    def test_ended_threads(self, probes, schedule):
        text = probes.error(schedule, "block_faults", ints(64), block=64, fault=1)
        assert "block_faults, block (0, 0, 0): no thread can go on" in text
        assert "threads 40-63 have ended" in text
        assert "threads 0-39 wait at __syncthreads (tests/emulation/probes.cu:" in text

    def test_divergent_barrier(self, probes, schedule):
        text = probes.error(schedule, "block_faults", ints(64), block=64, fault=2)
        assert "divergence: one thread is at __syncthreads" in text

    def test_divergent_warp(self, probes, schedule):
        text = probes.error(schedule, "block_faults", ints(64), block=64, fault=3)
        assert "threads 5 wait at __syncwarp" in text and "for lanes 0xffffffff" in text

    def test_barrier_of_more_threads_than_there_are(self, probes, schedule):
        text = probes.error(schedule, "block_faults", ints(64), block=64, fault=4)
        assert "threads 0-63 wait at named barrier" in text and "for 128 threads" in text

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (1, "threads 7 have ended"),
            (2, "no thread can go on; threads 0-15 wait at __shfl_xor_sync"),
            (3, "the mask does not name the caller"),
            (4, "reads lane 8, which does not take part"),
            (5, "threads 0-2, 4-31 wait at __shfl_xor_sync"),
        ],
    )
    def test_warp(self, probes, schedule, fault, message):
        assert message in probes.error(schedule, "warp_faults", ints(32), arange(32), fault=fault)

    @pytest.mark.parametrize("byte", [-1, -1024, -5000, 1000, 1023, 1024, 4096, 300_000])
    def test_shared_memory(self, probes, schedule, byte):
        at = torch.tensor([byte], dtype=torch.int32)
        options = {"block": 1, "shared": 1000}
        text = probes.error(schedule, "shared_access", ints(1), at, **options, fault=1)
        assert "shared memory" in text and "1000 bytes" in text
        if not -1024 <= byte < 1024:  # apart from the next bytes a read faults, too
            text = probes.error(schedule, "shared_access", ints(1), at, **options, fault=2)
            assert "block (0, 0, 0), thread (" in text and f"byte {byte} of shared memory" in text

    def test_shared_memory_is_poisoned(self, probes, schedule):
        with probes.schedule(schedule):
            for byte in (0, 500, 996):
                at = torch.tensor([byte], dtype=torch.int32)
                out = probes("shared_access", torch.zeros(1), at, block=1, shared=1000)
                assert out.isnan().all()

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (1, "byte 64 of a tensor's memory of 64 bytes"),
            (2, "byte 64 of a tensor's memory of 48 bytes"),
            (4, "a load of 8 bytes from a misaligned address"),
            (5, "an integer division by zero"),
            (7, "access to a misaligned address (tests/emulation/probes.cu:"),
            (8, "a shift by more bits than there are (tests/emulation/probes.cu:"),
            (9, "an index beyond the end of an array (tests/emulation/probes.cu:"),
            (10, "__trap"),
        ],
    )
    def test_global_memory(self, probes, schedule, fault, message):
        text = probes.error(schedule, "global_access", ints(12), arange(16), count=16, fault=fault)
        assert message in text and "global_access, block (0, 0, 0), thread (" in text

    def test_before_global_memory(self, probes, schedule):
        given = arange(1024)  # fills its page
        text = probes.error(schedule, "global_access", ints(1), given, fault=3)
        assert "byte -4 of a tensor's memory of 4096 bytes" in text

    def test_writes_before_global_memory(self, probes, schedule):
        out = ints(12)
        text = probes.error(schedule, "global_access", out, arange(1), block=1, fault=6)
        assert text == "global_access: a write next to a tensor's memory of 48 bytes"
        with probes.schedule(schedule):  # which is repaired
            probes("global_access", out, arange(1), block=1)

    def test_stack(self, probes, schedule):
        assert "stack overflow" in probes.error(schedule, "stack", ints(1), count=10**6)

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (5, "cp.async at byte 8 of shared memory, which is not a multiple of 16"),
            (6, "cp.async from an address that is not a multiple of 16"),
            (7, "of shared memory, which has 2048 bytes"),
        ],
    )
    def test_copies(self, probes, schedule, fault, message):
        text = probes.error(
            schedule,
            "copies",
            ints(6, 64, 4),
            ints(6, 64, 4),
            block=64,
            shared=2048,
            count=5,
            fault=fault,
        )
        if fault == 5:
            message = "which is not a multiple of 16"
        assert message in text

    def test_waiting_for_another_block(self, probes, schedule):
        text = probes.error(schedule, "wait_for_blocks", ints(1).zero_(), grid=2, block=1, fault=1)
        assert "waits without end" in text and "another block?" in text

    def test_launches_no_device_takes(self, probes, schedule):
        out = ints(2048)
        for options, message in (
            ({"block": 2048}, "invalid configuration"),
            ({"block": (1, 1, 65)}, "invalid configuration"),
            ({"grid": 0}, "invalid configuration"),
            ({"grid": (1, 65536)}, "invalid configuration"),
            ({"shared": 227 * 1024 + 1}, "invalid argument"),
        ):
            assert message in probes.error(schedule, "indices", out, **options)
        with probes.schedule(schedule):  # the next launch is none the worse
            probes("indices", out[:32], shared=227 * 1024)


def test_uninitialised_memory(probes):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.empty(100, dtype=dtype).isnan().all()
    assert (ints(100) == -1).all()


def test_fibers_of_other_processors():
    """The switch works that knows no processor's registers."""
    probes = probes_or_skip("probes_ucontext", ["-DSPECEXTEND_EMULATION_UCONTEXT"])
    for schedule in SCHEDULES:
        with probes.guarded_memory(), probes.schedule(schedule):
            out = probes("reverse", ints(2, 96), arange(96), block=96, shared=384)
            assert torch.equal(out[0], arange(96).flip(0))
            text = probes.error(schedule, "warp_faults", ints(32), arange(32), fault=2)
            assert "no thread can go on" in text
            assert "stack overflow" in probes.error(schedule, "stack", ints(1), count=10**6)


def test_the_same_schedule_is_the_same_run(probes):
    def race(seed):
        return probes.error(
            Schedule(seed), "reverse", ints(192), arange(96), block=96, shared=384, fault=1
        )

    assert race(1) == race(1) != race(2)


# ---- faults in the kernels of the ops ------------------------------------------------------------


def merge_states_of(seed):
    shape = [(3, 2, 64), (5, 72), (7, 33)][seed % 3]
    test_merge_states.check(test_merge_states.random_states(shape, DTYPES[seed % 3], seed=seed))


def compact_kv_of(seed):
    caches = [Guarded(LAYOUTS[seed % 4], 2, 70, 3, 40, DTYPES[i], seed=i) for i in range(3)]
    paths = [[0, *range(2, 51)], [0, *range(11, 60)]]
    test_compact_kv.check(caches, [3, 8], paths, [49, 30])


def compact_kv_aligned_of(seed):
    caches = [Guarded("bhsd", 2, 70, 3, 600, seed=i) for i in range(2)]
    paths = [[0, *range(2, 51)], [0, *range(11, 60)]]
    test_compact_kv.check(caches, [3, 8], paths, [49, 30])


def tree_attention_of(seed):
    rows, heads = [(12, (8, 2)), (9, (3, 3))][seed % 2]  # of a unit: 48, which warps share, or 9
    case = test_tree_attention.Case((70, 133), rows, None, heads, 64, torch.bfloat16, seed=seed)
    case.check()


def gather_chunks_of(seed):
    test_gather_chunks.Case(
        lens=(90, 77, 12),
        dims=((2, 80, 8), (1, 72, 24)),
        pairs=[24, 36, 1][seed % 3],
        dtype=torch.float32,
        interleaved=seed % 2 == 1,
        seed=seed,
    ).check()


def chunk_scores_of(seed):
    case = test_chunk_scores.random_case(seed, batch=3, heads=11, chunk_size=2, capacity=140)
    for reduce in ("mean", "max"):
        got = test_chunk_scores.score(*case, chunk_size=2, reduce=reduce).double()
        want = reference.chunk_scores(*case, chunk_size=2, reduce=reduce)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def select_chunks_of(seed):
    scores = torch.rand(2, 1500, generator=torch.Generator().manual_seed(seed))
    lens = torch.tensor([1500, 900], dtype=torch.int32)
    options = {"chunk_size": 1, "budget": 300, "num_sinks": 1, "num_recent": 2}
    got = ops.select_chunks(scores, lens, **options)
    for ours, theirs in zip(got, reference.select_chunks(scores, lens, **options), strict=True):
        assert torch.equal(ours, theirs)


@dataclass(frozen=True)
class Mutation:
    """Changes a kernel's source, which a test of its op must notice.

    Attributes:
        name: what is wrong.
        header: of ``csrc/``, in which the only ``old`` becomes ``new``.
        sources: of ``csrc/``, or by their own path, that include it.
        check: runs the op on data drawn from a seed, and compares.
        options: of the compiler.
        capability: of the device.
    """

    name: str
    header: str
    old: str
    new: str
    sources: tuple[str, ...]
    check: Callable[[int], None]
    options: tuple[str, ...] = ()
    capability: int = 80

    def unchanged(self) -> emulation.Library:
        if not self.options:
            return build_or_skip("specextend_emulated")
        own = [emulation.ROOT / "csrc" / source for source in self.sources]
        return build_or_skip(f"specextend_emulated_sm{self.capability}", own, self.options)

    def library(self) -> emulation.Library:
        text = (emulation.ROOT / "csrc" / self.header).read_text()
        assert text.count(self.old) == 1, (
            f"{self.header} has changed: {self.old!r} is not there once"
        )
        namespace = "specextend_mutant_" + re.sub(r"\W+", "_", self.name)
        changed = emulation.BUILD / namespace / "overlay" / self.header
        text = text.replace(self.old, self.new)
        if not (changed.exists() and changed.read_text() == text):
            changed.parent.mkdir(parents=True, exist_ok=True)
            changed.write_text(text)
        own = [emulation.ROOT / "csrc" / source for source in self.sources]
        overlay = emulation.BUILD / namespace / "overlay"
        return build_or_skip(namespace, own, [f"-I{overlay}", *self.options])


SM90 = {
    "header": "kernels/compact_kv_sm90.cuh",
    "sources": ("ops/compact_kv.cpp", "cuda/compact_kv_sm90.cu"),
    "check": compact_kv_aligned_of,
    "options": ("-DSPECEXTEND_HAS_SM90A",),
    "capability": 90,
}
SELECT = {
    "sources": ("cuda/select_chunks.cu",),
    "check": select_chunks_of,
}
GATHER = {
    "header": "kernels/gather_chunks.cuh",
    "sources": ("cuda/gather_chunks.cu",),
    "check": gather_chunks_of,
}
SCORES = {
    "header": "kernels/chunk_scores.cuh",
    "sources": ("cuda/chunk_scores.cu",),
    "check": chunk_scores_of,
}
TREE = {
    "header": "kernels/attention/portable/tiles.cuh",
    "sources": (emulation.INSTANTIATIONS / "tree_attention_bf16_d64.cu",),
    "check": tree_attention_of,
}
MUTATIONS = [
    Mutation(
        "merge_states: the second part is read with the strides of one row",
        "kernels/merge_states.cuh",
        "static_cast<const Vector*>(p.o_b) + row * vectors",
        "static_cast<const Vector*>(p.o_b) + row * (vectors - 1)",
        ("cuda/merge_states.cu",),
        merge_states_of,
    ),
    Mutation(
        "compact_kv: strides swapped",
        "kernels/compact_kv.cuh",
        "rows + source * p.stride_s",
        "rows + source * p.stride_h",
        ("cuda/compact_kv.cu",),
        compact_kv_of,
    ),
    Mutation(
        "compact_kv: the last row of the path stays where it is",
        "kernels/compact_kv.cuh",
        "const int64_t source = first + i < count ?",
        "const int64_t source = first + i + 1 < count ?",
        ("cuda/compact_kv.cu",),
        compact_kv_of,
    ),
    Mutation(
        "compact_kv_sm90: no wait",
        old="while (!ptx::mbarrier_try_wait_parity",
        new="if (!ptx::mbarrier_try_wait_parity",
        **SM90,
    ),
    Mutation(
        "compact_kv_sm90: buffers used too early",
        old="ptx::bulk_wait_group_read<0>();",
        new="",
        **SM90,
    ),
    Mutation(
        "compact_kv_sm90: half a row",
        old="uint32_t(rest < kCompactSm90SegmentBytes ? rest",
        new="uint32_t(rest < kCompactSm90SegmentBytes ? rest / 2",
        **SM90,
    ),
    Mutation(
        "select_chunks: counts before all bins are 0",
        "kernels/select.cuh",
        old="bins[i] = 0;\n    __syncthreads();",
        new="bins[i] = 0;",
        **SELECT,
    ),
    Mutation(
        "select_chunks: a histogram is read before it is whole",
        "kernels/select.cuh",
        old="    __syncthreads();\n\n    // Every warp adds",
        new="    // Every warp adds",
        **SELECT,
    ),
    Mutation(
        "select_chunks: places before all warps have counted",
        "kernels/block.cuh",
        old="= upto;\n  __syncthreads();",
        new="= upto;",
        **SELECT,
    ),
    Mutation(
        "gather_chunks: a table is read before it is whole",
        old="      }\n      __syncthreads();\n    }\n    for (unsigned done",
        new="      }\n    }\n    for (unsigned done",
        **GATHER,
    ),
    Mutation(
        "chunk_scores: warps are added before they have ended",
        old="= total;\n    __syncthreads();",
        new="= total;",
        **SCORES,
    ),
    Mutation(
        "tree_attention: queries are read before all threads have copied theirs",
        old="ptx::cp_async_wait<kAt.ahead>();\n    __syncthreads();",
        new="ptx::cp_async_wait<kAt.ahead>();",
        **TREE,
    ),
    Mutation(
        "launch: shared memory is left to the L1 cache",
        old="cudaSharedmemCarveoutMaxShared",
        new="cudaSharedmemCarveoutDefault",
        **{**TREE, "header": "kernels/launch.cuh"},
    ),
    Mutation(
        "tree_attention: warps that share keys do not meet",
        old="ptx::named_barrier(1 + at_.key_group, Shape::kGroupThreads);",
        new="",
        **TREE,
    ),
    Mutation(
        "tree_attention: a wait covers a copy too few",
        old="ptx::cp_async_wait<kAt.ahead - 1>();",
        new="ptx::cp_async_wait<kAt.ahead>();",
        **TREE,
    ),
    Mutation(
        "tree_attention: the ring is given up while it is read",
        old="ptx::cp_async_wait<0>();\n    __syncthreads();",
        new="ptx::cp_async_wait<0>();",
        **{**TREE, "header": "kernels/attention/portable/kernel.cuh"},
    ),
    Mutation(
        "tree_attention: strides swapped",
        old="from.row * at_.p.q_stride_m + from.head * at_.p.q_stride_h",
        new="from.row * at_.p.q_stride_h + from.head * at_.p.q_stride_m",
        **TREE,
    ),
    Mutation(
        "tree_attention: a mask's bits are shifted",
        old="mask_bit(mask, int(slot))",
        new="(slot > 0 && mask_bit(mask, int(slot) - 1))",
        **{**TREE, "header": "kernels/attention/masks.cuh"},
    ),
]


def test_one_block_for_all_sequences():
    """Beyond the largest grid blocks go from sequence to sequence."""
    fewer = Mutation(
        "all sequences in one block",
        "kernels/grid.cuh",
        "kMaxGridZ = 65535",
        "kMaxGridZ = 1",
        (
            "cuda/append_kv.cu",
            "cuda/chunk_scores.cu",
            "cuda/compact_kv.cu",
            "cuda/gather_chunks.cu",
            "cuda/rotary_append.cu",
        ),
        gather_chunks_of,
    ).library()
    for schedule in SCHEDULES:
        with emulated(fewer, schedule):
            gather_chunks_of(schedule.seed)
            chunk_scores_of(schedule.seed)
            compact_kv_of(schedule.seed)
            test_append_kv.check("bshd", "bhsd", [0, 7, 13, 19], 5)
            test_rotary_append.check("bshd", "bhsd", [0, 7, 13, 19], 5)


def notices(library, mutation, schedule):
    with emulated(library, replace(schedule, capability=mutation.capability)):
        try:
            mutation.check(schedule.seed)
        except (AssertionError, RuntimeError):
            return True
    return False


@functools.cache
def false_alarms(check):
    """Schedules on which the check fails with the kernel as it is."""
    mutation = next(m for m in MUTATIONS if m.check is check)
    return [s for s in SCHEDULES if notices(mutation.unchanged(), mutation, s)]


@pytest.mark.sweep(2)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutations_are_found(mutation):
    changed = mutation.library()
    assert any(notices(changed, mutation, s) for s in SCHEDULES), "no test notices"
    assert not false_alarms(mutation.check)


class TestForEach:
    """Tests the loop inside a test, of backends.py."""

    def test_every_combination_runs(self):
        seen = []

        @for_each(seed=range(3), layout=LAYOUTS)
        def run(seed, layout, rows):
            seen.append((seed, layout, rows))

        run(rows=5)
        assert seen == [(seed, layout, 5) for seed in range(3) for layout in LAYOUTS]

    @pytest.mark.parametrize("fail", [lambda: int("x"), lambda: pytest.fail("invalid")])
    def test_a_failure_names_its_case(self, fail):
        @for_each(seed=range(9), dtype=DTYPES)
        def run(seed, dtype):
            if (seed, dtype) == (7, torch.float16):
                fail()

        with pytest.raises(AssertionError, match="run, seed=7, dtype=torch.float16: .*invalid"):
            run()

    def test_every_combination_has_a_schedule_of_its_own(self):
        schedules = []

        class Recorder:
            @contextlib.contextmanager
            def schedule(self, schedule):
                schedules.append(schedule)
                yield

        @for_each(seed=range(20))
        def run(seed, device):
            assert len(schedules) % 20 == (seed + 1) % 20

        for _ in range(2):  # the same ones again
            run(device="cpu", schedule=Scheduler(Recorder(), Schedule()))
        assert len(set(schedules)) == 20 and schedules[:20] == schedules[20:]
        assert {schedule.kind for schedule in schedules} == {*KINDS}
