"""Forks of a cache: each has the rows of the text before it, once in memory, and its own behind."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from emulated_gpu_memory import GRANULE, INVALID_VALUE, OUT_OF_MEMORY, EmulatedDriver
from emulated_gpu_memory import emulated_gpu_memory

from specextend import device_memory
from specextend.arena import Arena
from specextend.cache import KVCache

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


def memory_used() -> int:
    """Read this process's share of all memory that it maps."""
    gc.collect()
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("this system does not say what memory is used")
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


@pytest.fixture
def gpu() -> Iterator[EmulatedDriver]:
    """Have forks share memory as on a GPU, and see that nothing of it is left."""
    with emulated_gpu_memory() as driver:
        before = driver.memory_in_use, driver.ranges
        yield driver
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
            cache.reserve(cache.capacity + 5000)
        else:
            values = [100.0 + step + i / 8 for i in range(draw.randint(1, 3))]
            cache.reserve(len(text) + 3)
            written(cache, values)
            text += values
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
