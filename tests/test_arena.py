"""Forks of a cache: each has the rows of the text before it, once in memory, and its own behind."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from emulated_gpu_memory import (
    GRANULE,
    INVALID_VALUE,
    OUT_OF_MEMORY,
    EmulatedDriver,
    emulated_gpu_memory,
)

from specextend import sharing
from specextend.arena import Arena
from specextend.cache import KVCache
from specextend.graphs import capturing

CPU = torch.device("cpu")
LAYERS, HEADS, DIM = 3, 2, 8


def written(cache: KVCache, values: list[float]) -> KVCache:
    """Commit a row for each value, of which all its numbers are made."""
    for value in values:
        for layer in cache.layers:
            if not layer.is_initialized:
                layer.lazy_initialization(*torch.zeros(2, 1, HEADS, 1, DIM))
            layer.keys[:, :, cache.length], layer.values[:, :, cache.length] = value, -value
        cache.advance(1)
    return cache


def rows(cache: KVCache) -> list[float]:
    """Read what all layers have."""
    found = set()
    for layer in cache.layers:
        assert layer.k.data_ptr() == layer.keys.data_ptr()
        for tensor, sign in ((layer.keys, 1), (layer.values, -1)):
            text = sign * tensor[:, :, : cache.length]
            assert (text == text[:, :1, :, :1]).all()
            found.add(tuple(text[0, 0, :, 0].tolist()))
    (text,) = found
    assert int(cache.lens) == cache.length == len(text)
    return list(text)


def tensors(cache: KVCache) -> list[torch.Tensor]:
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


def memory_used() -> int:
    """Read this process's share of all memory that it maps."""
    gc.collect()
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("this system does not say what memory is used")
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


@pytest.fixture
def gpu(monkeypatch) -> Iterator[EmulatedDriver]:
    """Have forks share memory as on a GPU, in small sizes, and see that nothing of it is left.

    Three granules hold 16 rows of a tensor; addresses are soon used up.
    """
    monkeypatch.setitem(globals(), "DIM", 96)
    monkeypatch.setattr(sharing, "with_room", lambda rows: rows + 20)
    monkeypatch.setattr(sharing, "_PIECE", 2)
    with emulated_gpu_memory() as driver:
        before = driver.memory_in_use, driver.ranges
        yield driver
        gc.collect()
        assert (driver.memory_in_use, driver.ranges) == before


@pytest.fixture(params=["arena", "copies", "gpu"])
def where(request, monkeypatch) -> str:
    if request.param == "gpu":
        request.getfixturevalue("gpu")
    elif request.param == "copies":
        monkeypatch.setattr(Arena, "serves", staticmethod(lambda tensors: False))
    elif not Arena.serves([torch.zeros(1)]):
        pytest.skip("rows are copied on this system")
    return request.param


def test_forks_go_on_by_themselves(where):
    parent = written(KVCache(LAYERS, 10, 1, CPU), [1, 2, 3])
    first = parent.fork()
    second = parent.fork()
    for cache, value in ((parent, 10), (first, 20), (second, 30)):
        cache.reserve(5)
        written(cache, [value, value + 1])
    assert rows(parent) == [1, 2, 3, 10, 11]
    assert rows(first) == [1, 2, 3, 20, 21]
    assert rows(second) == [1, 2, 3, 30, 31]


def test_a_parent_that_goes_back_changes_no_fork(where):
    parent = written(KVCache(LAYERS, 10, 1, CPU), [1, 2, 3, 4])
    child = parent.fork()
    parent.go_back(1)
    written(parent, [7, 8, 9, 10, 11])
    assert rows(child) == [1, 2, 3, 4]
    grandchild = parent.fork()
    grandchild.reserve(8)
    assert rows(written(grandchild, [5])) == [1, 7, 8, 9, 10, 11, 5]
    assert rows(child) == [1, 2, 3, 4]


def test_rows_that_are_written_late(where):
    """A draft reads of a long text what it comes to need."""
    parent = written(KVCache(LAYERS, 40, 1, CPU), [float(i) for i in range(30)])
    first = parent.fork()
    parent.own(8)
    for tensor, sign in zip(tensors(parent), LAYERS * (1, -1), strict=True):
        tensor[:, :, 8:20] = sign * 99
    second = parent.fork()
    assert rows(first) == [float(i) for i in range(30)]
    assert rows(parent) == rows(second) == [*range(8), *[99] * 12, *range(20, 30)]


def test_any_tree_of_forks(where):
    """Random forks, writings, ways back and growths, against lists."""
    draw = random.Random(0)
    caches = [(written(KVCache(LAYERS, 4, 1, CPU), [1.0, 2.0]), [1.0, 2.0])]
    for step in range(300):
        cache, text = caches[draw.randrange(len(caches))]
        what = draw.random()
        if what < 0.2 and len(caches) < 12:
            caches.append((cache.fork(), list(text)))
        elif what < 0.4 and text:
            length = draw.randrange(len(text) + 1)
            cache.go_back(length)
            del text[length:]
        elif what < 0.45:
            cache.reserve(cache.capacity + (30 if where == "gpu" else 5000))
        else:
            values = [100.0 + step + i / 8 for i in range(draw.randint(1, 3))]
            cache.reserve(len(text) + 3)
            written(cache, values)
            text += values
        if where == "gpu":  # rows that nobody has written are read under masks
            assert not any(tensor.sum().isnan() for tensor in tensors(cache))
        for cache, text in caches:
            assert rows(cache) == text


def test_a_text_is_in_memory_once():
    if not Arena.serves([torch.zeros(1)]):
        pytest.skip("rows are copied on this system")
    cache = KVCache(2, 20000, 1, CPU)
    for layer in cache.layers:
        layer.lazy_initialization(*torch.zeros(2, 1, 2, 1, 64))
        layer.keys.fill_(1)
        layer.values.fill_(2)
    cache.advance(20000)
    size = cache.num_bytes
    assert size == 2 * 2 * 2 * 20000 * 64 * 4
    cache.share()
    before, forks = memory_used(), [cache.fork() for _ in range(5)]
    for fork in forks:
        assert all(float(layer.keys[:, :, :20000].sum()) for layer in fork.layers)
        fork.reserve(20100)
        for layer in fork.layers:
            layer.keys[:, :, 20000:20100] = 3
    assert memory_used() - before < 0.2 * size
    assert cache.num_bytes == size
    held = len(os.listdir("/proc/self/fd"))
    del forks, fork, cache, layer
    assert before - memory_used() > 0.8 * size
    assert len(os.listdir("/proc/self/fd")) == held - 1


# ---- on a GPU, emulated --------------------------------------------------------------------------

TEXT = [float(i) for i in range(1, 101)]  # 18.75 granules of a tensor
TENSORS = 2 * LAYERS


def text_of_100() -> KVCache:
    cache = written(KVCache(LAYERS, 100, 1, CPU), TEXT[:1])
    for tensor, sign in zip(tensors(cache), LAYERS * (1, -1), strict=True):
        tensor[:, :, :] = sign * torch.tensor(TEXT)[:, None]
    cache.advance(99)
    return cache


def test_a_text_is_on_a_gpu_once(gpu):
    cache = text_of_100()
    cache.share()
    assert gpu.memory_in_use == TENSORS * 19 * GRANULE
    assert cache.num_bytes == TENSORS * 101 * 768
    forks = [cache.fork() for _ in range(5)]
    assert gpu.memory_in_use == TENSORS * (19 + 5) * GRANULE
    grandchild = written(forks[0], [7.0]).fork()
    assert gpu.memory_in_use == TENSORS * (19 + 6) * GRANULE
    assert rows(grandchild) == [*TEXT, 7] and rows(forks[1]) == rows(cache) == TEXT
    forks[2].reserve(103)  # 19.3 granules
    assert gpu.memory_in_use == TENSORS * (19 + 7) * GRANULE
    assert forks[2].num_bytes == TENSORS * 106 * 768
    del cache, forks  # what the last one has stays
    assert gpu.memory_in_use == TENSORS * 19 * GRANULE and rows(grandchild) == [*TEXT, 7]


def test_memory_changes_behind_the_same_addresses(gpu):
    """Graphs have them."""
    parent = text_of_100()
    fork = parent.fork()
    before = [t.data_ptr() for t in tensors(fork)]
    capacity = fork.capacity
    fork.go_back(40)  # in the middle of memory that is shared
    assert fork.capacity == capacity
    fork.reserve(110)
    assert [t.data_ptr() for t in tensors(fork)] == before
    assert rows(written(fork, [5.0] * 60)) == [*TEXT[:40], *[5] * 60] and rows(parent) == TEXT
    fork.reserve(300)  # beyond the addresses
    assert [t.data_ptr() for t in tensors(fork)] != before
    assert rows(fork) == [*TEXT[:40], *[5] * 60]
    # 14 granules in pieces of two lie behind row 40, which is in the eighth.
    assert gpu.memory_in_use == TENSORS * (19 + 57 - 6) * GRANULE


def test_what_only_one_has_is_not_copied(gpu):
    parent = text_of_100()
    parent.share()
    fork = parent.fork()
    del parent
    before = gpu.memory_in_use
    gpu.leave(0)
    fork.go_back(3)
    assert gpu.memory_in_use == before and rows(fork) == TEXT[:3]


def fails(do: Callable[[], object]) -> str | None:
    """Return the error that a function ends with; what it had by then is gone."""
    try:
        do()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("error", [INVALID_VALUE, OUT_OF_MEMORY])
@pytest.mark.parametrize("what", ["first fork", "fork", "go back", "reserve", "reserve more"])
def test_errors_of_the_driver(gpu, what, error):
    """Whichever call fails, all texts are what they were, and nothing is lost."""
    do = {
        "go back": lambda: fork.go_back(40),
        "reserve": lambda: fork.reserve(110),
        "reserve more": lambda: fork.reserve(130),
    }.get(what, lambda: parent.fork())
    for call in range(0, 1000, 7):
        parent = text_of_100()
        fork = parent if what == "first fork" else parent.fork()
        before = gpu.memory_in_use, gpu.ranges, fork.capacity
        gpu.fail(call, error)
        said = fails(do)
        if not gpu.has_failed():
            break
        # Memory that could not be had is asked for again, and was to be had then.
        assert "CUDA_ERROR_" in said if said else error == OUT_OF_MEMORY
        if said:
            assert rows(parent) == rows(fork) == TEXT
            if what == "fork":
                assert before == (gpu.memory_in_use, gpu.ranges, fork.capacity)
            do()
        fork.go_back(40)
        assert rows(fork) == TEXT[:40] and (fork is parent or rows(parent) == TEXT)
    assert said is None and call > TENSORS


@pytest.mark.parametrize("what", ["fork", "go back", "reserve"])
def test_a_full_gpu(gpu, what):
    parent = text_of_100()
    fork = parent.fork()
    do, needed = {
        "fork": (parent.fork, TENSORS),
        "go back": (lambda: fork.go_back(40), TENSORS * 12),
        "reserve": (lambda: fork.reserve(110), TENSORS * 2),
    }[what]
    before = gpu.memory_in_use
    for left in range(needed):
        gpu.leave(left * GRANULE)
        said = fails(do)
        assert said.startswith("OutOfMemoryError: cpu has no memory left for rows of a text: ")
        assert what == "reserve" or gpu.memory_in_use == before
        assert rows(parent) == rows(fork) == TEXT
        if what == "reserve":  # it has what there was
            gpu.leave(None)
            fork = parent.fork()
    gpu.leave(needed * GRANULE)
    do()


def test_nothing_is_taken_away_while_a_graph_is_captured(gpu):
    parent = text_of_100()
    fork, other = parent.fork(), parent.fork()
    before = gpu.memory_in_use, gpu.ranges
    with gpu.capture():
        del fork
        assert (gpu.memory_in_use, gpu.ranges) == before
        said = fails(partial(other.go_back, 40))
        assert said.endswith("memory of a cache cannot be changed while a graph is captured")
    assert rows(other) == TEXT
    assert gpu.memory_in_use == TENSORS * 20 * GRANULE
    with capturing:  # in another thread, say
        del other
        assert gpu.memory_in_use == TENSORS * 20 * GRANULE
    assert gpu.memory_in_use == TENSORS * 19 * GRANULE and rows(parent) == TEXT


def test_what_a_gpu_cannot_share_is_copied(gpu):
    batch = KVCache(LAYERS, 100, 2, CPU)
    for layer in batch.layers:
        layer.lazy_initialization(*torch.zeros(2, 2, HEADS, 1, DIM))
    batch.advance(100)
    short = written(KVCache(LAYERS, 100, 1, CPU), TEXT[:5])  # no granule
    gpu.support(False)
    old = text_of_100()
    forks = [cache.fork() for cache in (old, short, batch)]
    gpu.support(True)
    forks += [cache.fork() for cache in (short, batch)]
    assert gpu.ranges == gpu.memory_in_use == 0
    assert rows(forks[0]) == TEXT and rows(forks[1]) == rows(forks[3]) == TEXT[:5]
    assert old.fork() is not None and gpu.memory_in_use  # a text that is shared later


class TestEmulatedDriver:
    """It refuses what a driver refuses."""

    @pytest.mark.parametrize(
        "do",
        [
            lambda gpu, at, memory: gpu.create_memory(0, 100),
            lambda gpu, at, memory: gpu.create_memory(1, GRANULE),
            lambda gpu, at, memory: gpu.reserve_addresses(100),
            lambda gpu, at, memory: gpu.map_memory(0, at + GRANULE, GRANULE, memory),
            lambda gpu, at, memory: gpu.map_memory(0, at + 2 * GRANULE + 8, GRANULE, memory),
            lambda gpu, at, memory: gpu.map_memory(0, at + 2 * GRANULE, 8, memory),
            lambda gpu, at, memory: gpu.map_memory(0, at + 2 * GRANULE, 3 * GRANULE, memory),
            lambda gpu, at, memory: gpu.map_memory(0, at + 3 * GRANULE, 2 * GRANULE, memory),
            lambda gpu, at, memory: gpu.map_memory(0, at + 2 * GRANULE, GRANULE, memory + 1),
            lambda gpu, at, memory: gpu.unmap_memory(0, at + 2 * GRANULE, GRANULE),
            lambda gpu, at, memory: gpu.unmap_memory(0, at, GRANULE),
            lambda gpu, at, memory: gpu.free_addresses(at, 4 * GRANULE),
            lambda gpu, at, memory: gpu.free_addresses(at + GRANULE, 3 * GRANULE),
            lambda gpu, at, memory: gpu.release_memory(memory + 1),
        ],
    )
    def test_refused(self, gpu, do):
        at, memory = gpu.reserve_addresses(4 * GRANULE), gpu.create_memory(0, 2 * GRANULE)
        gpu.map_memory(0, at, 2 * GRANULE, memory)
        with pytest.raises(RuntimeError, match=r"cu\w+ failed: CUDA_ERROR_\w+ \(error \d+\)"):
            do(gpu, at, memory)
        gpu.unmap_memory(0, at, 2 * GRANULE)
        gpu.release_memory(memory)
        gpu.free_addresses(at, 4 * GRANULE)
