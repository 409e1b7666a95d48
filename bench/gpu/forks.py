"""Forks a cache on a device, and looks at what the forks have, and at the memory that they take.

    python bench/gpu/forks.py [--device cuda]

On a GPU the driver maps the same memory to several addresses: operators, copies, a CUDA graph, what
is written behind a fork and in its place, growth, and what is free again in the end are tried.
"""

import argparse
import gc
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from specextend import device_memory, ops  # noqa: E402
from specextend.cache import KVCache  # noqa: E402

LAYERS, HEADS, DIM, GROUP = 4, 8, 128, 4
LENGTH = 20_000  # no whole number of granules; without a GPU as many rows would take a minute


def written(cache: KVCache, count: int, seed: int) -> None:
    """Append random rows, as rounds do."""
    draw = torch.Generator(cache.lens.device).manual_seed(seed)
    for layer in cache.layers:
        shape, device = (1, count, HEADS, DIM), cache.lens.device
        k, v = (torch.randn(shape, generator=draw, device=device).bfloat16() for _ in range(2))
        if not layer.is_initialized:
            layer.lazy_initialization(k.transpose(1, 2), v.transpose(1, 2))
        ops.append_kv(layer.k, layer.v, k, v, cache.lens)
    cache.advance(count)


def rows(cache: KVCache) -> list[torch.Tensor]:
    """Copy what is committed."""
    held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return [t[:, :, : cache.length].clone() for t in held]


def same(cache: KVCache, wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(rows(cache), wanted, strict=True))


def attention(cache: KVCache, q: torch.Tensor) -> torch.Tensor:
    """Attend to the committed rows but the last, which is the tree's."""
    layer = cache.layers[-1]
    return ops.tree_attention(q, layer.k, layer.v, cache.lens - 1, num_tree_keys=1)[0]


def free_bytes(device: torch.device) -> int:
    """Return the device's memory that nobody has."""
    gc.collect()
    device_memory.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    name = parser.parse_args().device
    device = torch.device("cpu" if name == "cpu" else "cuda:0")
    cuda = device.type == "cuda"
    length = LENGTH if cuda else 500
    more = length // 8
    granule = device_memory.granularity(device)
    print(f"granularity: {granule}", flush=True)
    assert granule or not cuda, "the driver cannot map memory: forks copy"
    parent = KVCache(LAYERS, length, 1, device)
    written(parent, length, 0)
    text = rows(parent)
    before_any = free_bytes(device) if cuda else 0
    parent.share()
    before = free_bytes(device) if cuda else 0
    forks = [parent.fork() for _ in range(4)]
    if cuda:
        taken = before - free_bytes(device)
        print(f"four forks take {taken} bytes, a text {parent.num_bytes}", flush=True)
        assert taken < 4 * 2 * LAYERS * granule + parent.num_bytes // 2
    assert all(same(cache, text) for cache in (parent, *forks))

    q = torch.randn(1, 1, GROUP * HEADS, DIM, device=device).bfloat16()
    layer = parent.layers[-1]  # the same rows in ordinary memory, head by head
    apart = [t.clone(memory_format=torch.contiguous_format) for t in (layer.keys, layer.values)]
    k, v = (t.transpose(1, 2) for t in apart)
    wanted = ops.tree_attention(q, k, v, parent.lens - 1, num_tree_keys=1)[0]
    assert all(torch.equal(attention(cache, q), wanted) for cache in (parent, *forks))

    for seed, fork in enumerate(forks, 1):  # each goes on by itself
        fork.reserve(length + more)
        written(fork, more, seed)
    assert same(parent, text)
    assert all(
        torch.equal(a[:, :, :length], b)
        for fork in forks
        for a, b in zip(rows(fork), text, strict=True)
    )
    kept = [rows(fork) for fork in forks[1:]]
    graph, out = None, attention(forks[0], q)
    if cuda:  # addresses stay while the memory behind them changes
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention(forks[0], q)
    forks[0].go_back(length // 2)
    written(forks[0], more, 9)
    if cuda:
        graph.replay()
        assert torch.equal(out, attention(forks[0], q))
    assert same(parent, text) and all(map(same, forks[1:], kept))
    forks[1].reserve(4 * length)  # beyond its addresses
    written(forks[1], length, 10)
    assert all(
        torch.equal(a[:, :, : length + more], b)
        for a, b in zip(rows(forks[1]), kept[0], strict=True)
    )
    del forks, fork, graph, out, kept, apart, k, v, wanted
    assert same(parent, text)
    if cuda:
        left = before_any - free_bytes(device)
        print(f"left behind: {left} bytes", flush=True)
        assert left < parent.num_bytes // 2
    print("forks are right", flush=True)


if __name__ == "__main__":
    main()
