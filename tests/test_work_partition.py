"""Tests how attention work is split over blocks, by a host program around work_partition.h."""

import ctypes
import itertools
import random
import subprocess
from collections import Counter

import emulation
import pytest

from specextend import _C

PROGRAM = r"""
#include "work_partition.h"
using namespace specextend;

// Walks the line as the blocks do. Of every segment: block, unit, begin, end, opens, closes; of
// every unit: its first block and the one after its last. Returns the number of segments.
extern "C" int64_t walk(WorkCut w, const int64_t* begins, const int64_t* ends, int64_t max_segments,
                        int64_t* segments, int64_t* unit_blocks, int64_t* run_out) {
  const int units = units_per_sequence(w);
  int64_t total = 0, found = 0;
  for (int b = 0; b < w.batch; ++b)
    total += units * unit_length(tiles_of({begins[b], ends[b]}, w.tile_keys));
  const int64_t run = *run_out = run_length(w, total);
  for (int64_t block = 0; block < w.grid; ++block) {
    int64_t at = 0;
    for (int b = 0; b < w.batch; ++b) {
      const Range tiles = tiles_of({begins[b], ends[b]}, w.tile_keys);
      for (int u = 0; u < units; ++u, at += unit_length(tiles)) {
        const int64_t count = tiles.end - tiles.begin;
        const Segment s = segment_of(at, count, {block * run, (block + 1) * run});
        const int64_t unit = int64_t(b) * units + u;
        if (block == 0) {
          const Range blocks = blocks_of(at, count, run);
          unit_blocks[2 * unit] = blocks.begin, unit_blocks[2 * unit + 1] = blocks.end;
        }
        if (s.empty()) continue;
        if (found == max_segments) return -1;
        int64_t* to = segments + 6 * found++;
        to[0] = block, to[1] = unit, to[2] = s.begin, to[3] = s.end;
        to[4] = s.opens, to[5] = s.closes;
      }
    }
  }
  return found;
}
extern "C" int grid_of(WorkCut w, int64_t max_tiles, int max_grid) {
  return useful_grid(w, max_tiles, max_grid);
}
extern "C" int64_t partial(int64_t block, bool opens) { return partial_of(block, opens); }
extern "C" int overhead() { return kUnitOverhead; }
"""


class WorkCut(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "batch",
            "num_kv_heads",
            "row_blocks",
            "rows_per_block",
            "tile_keys",
            "grid",
            "min_run",
        )
    ]


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work_partition")
    source, library = folder / "walk.cpp", folder / "walk.so"
    source.write_text(PROGRAM)
    command = ["c++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, *emulation.headers(), source, "-o", library], check=True)
    lib = ctypes.CDLL(str(library))
    lib.walk.restype = lib.partial.restype = ctypes.c_int64
    lib.partial.argtypes = [ctypes.c_int64, ctypes.c_bool]
    lib.grid_of.argtypes = [WorkCut, ctypes.c_int64, ctypes.c_int]
    return lib


def check(lib, keys, *, kv_heads=1, row_blocks=1, tile_keys=64, grid=4, min_run=1):
    """`keys`: (begin, end) of each sequence. Returns the segments."""
    cut = WorkCut(len(keys), kv_heads, row_blocks, 16, tile_keys, grid, min_run)
    units = kv_heads * row_blocks
    most = grid * (2 + len(keys) * units)
    segments = (ctypes.c_int64 * (6 * most))()
    unit_blocks = (ctypes.c_int64 * (2 * len(keys) * units))()
    run = ctypes.c_int64()
    begins, ends = ((ctypes.c_int64 * len(keys))(*side) for side in zip(*keys, strict=True))
    count = lib.walk(cut, begins, ends, most, segments, unit_blocks, ctypes.byref(run))
    assert count >= 0
    found = [tuple(segments[6 * i : 6 * i + 6]) for i in range(count)]

    tiles = [
        -(-e // tile_keys) - b // tile_keys if b < e else 0 for b, e in keys for _ in range(units)
    ]
    total = sum(tiles) + lib.overhead() * len(tiles)
    assert run.value == max(-(-total // grid), min_run)
    # Every tile of every unit once, in the order of the blocks; a unit without tiles once.
    per_unit = {u: [s for s in found if s[1] == u] for u in range(len(tiles))}
    for u, own in per_unit.items():
        assert own[0][2] == 0 and own[-1][3] == tiles[u]
        assert all(a[3] == b[2] and a[0] + 1 == b[0] for a, b in itertools.pairwise(own))
        assert all(s[2] < s[3] for s in own) or (len(own) == 1 and tiles[u] == 0)
        assert [s[4] for s in own] == [1] + [0] * (len(own) - 1)
        assert [s[5] for s in own] == [0] * (len(own) - 1) + [1]
        # The combine finds the same blocks, in this order.
        assert list(range(*unit_blocks[2 * u : 2 * u + 2])) == [s[0] for s in own]
    # Nobody has more than the run; partial segments have places of their own.
    partials = [lib.partial(s[0], bool(s[4])) for s in found if not (s[4] and s[5])]
    assert len(set(partials)) == len(partials) and all(0 <= p < 2 * grid for p in partials)
    for block in range(grid):
        own = [s for s in found if s[0] == block]
        assert [s[1] for s in own] == sorted({s[1] for s in own})
        assert sum(s[3] - s[2] for s in own) <= run.value
    return found


def test_small_shapes_exhaustively(lib):
    for lengths in itertools.product(range(6), repeat=3):
        for grid, kv_heads in itertools.product((1, 2, 3, 5, 8, 40), (1, 2)):
            check(lib, [(0, n) for n in lengths], tile_keys=1, grid=grid, kv_heads=kv_heads)


@pytest.mark.parametrize("min_run", [1, 2, 5, 100])
def test_short_runs_are_not_cut(lib, min_run):
    for tokens in (0, 1, 64, 65, 640, 6400):
        found = check(lib, [(0, tokens)] * 2, kv_heads=2, grid=132, min_run=min_run)
        if min_run == 100 and tokens <= 640:
            assert len({s[0] for s in found}) == 1


def test_random_shapes(lib):
    draw = random.Random(0)
    for _ in range(300):
        spread = draw.choice([10, 300, 5000, 140000])
        keys = []
        for _ in range(draw.choice([1, 1, 2, 7, 40])):
            end = draw.randrange(spread)
            keys.append((draw.choice([0, 0, draw.randrange(end + 1)]), end))
        check(
            lib,
            keys,
            kv_heads=draw.choice([1, 4, 8, 32]),
            row_blocks=draw.choice([1, 2, 5]),
            tile_keys=draw.choice([32, 64, 128]),
            grid=draw.choice([1, 7, 132, 264]),
            min_run=draw.choice([1, 2, 4, 16]),
        )


def test_long_prefix_is_balanced(lib):
    """The longest block has at most one tile and the overheads of its units more than the mean."""
    for kv_heads, tokens in [(8, 65536), (4, 131072), (32, 16384), (8, 16384)]:
        found = check(lib, [(0, tokens)], kv_heads=kv_heads, grid=264)
        per_block = [sum(s[3] - s[2] for s in found if s[0] == block) for block in range(264)]
        mean = kv_heads * (tokens / 64) / 264
        assert max(per_block) <= mean + 1 + lib.overhead()


def test_grid_is_no_larger_than_the_work(lib):
    one = WorkCut(1, 1, 1, 16, 64, 0, 2)
    assert lib.grid_of(one, 0, 264) == 1
    assert lib.grid_of(one, 8, 264) == (8 + lib.overhead()) // 2
    several = WorkCut(3, 2, 5, 16, 64, 0, 2)  # sequences, KV heads, row blocks
    assert lib.grid_of(several, 8, 264) == 3 * 2 * 5 * (8 + lib.overhead()) // 2
    assert lib.grid_of(WorkCut(4, 8, 2, 16, 64, 0, 2), 1024, 264) == 264


@pytest.mark.parametrize("heads", [(32, 8), (32, 32), (28, 4)])
def test_what_is_planned_is_what_blocks_find(lib, heads):
    """The totals that predictions are made of are those of the walk of all blocks."""
    shape = dict(num_heads=heads[0], num_kv_heads=heads[1], head_dim=128)
    for rows, prefix in itertools.product(
        (1, 8, 31, 32, 33, 64, 65, 128), (0, 1, 500, 2048, 16384, 65536)
    ):
        plan = _C.plan_attention(num_rows=rows, prefix_len=prefix, **shape)
        row_blocks = plan["units"] // heads[1]
        found = check(
            lib, [(0, prefix + rows)], kv_heads=heads[1], row_blocks=row_blocks,
            tile_keys=plan["tile_keys"], grid=plan["grid"] // plan["cluster"],
            min_run=plan["min_run"],
        )  # fmt: skip
        assert plan["partials"] == sum(not (s[4] and s[5]) for s in found)
        assert plan["busy"] == len({s[0] for s in found}) * plan["cluster"]
        assert plan["most_partials"] == max(Counter(s[1] for s in found).values())
        assert 0 <= plan["padded_rows"] - plan["packed_rows"] < plan["padded_rows"] // row_blocks


def test_sizes_of_heads():
    """Hopper's kernels are for values as large as keys; wide heads have blocks of fewer rows."""
    shape = dict(num_rows=33, num_heads=8, num_kv_heads=1, prefix_len=1000, batch=200)
    for dims, family, padded in [
        ((128, 128), "hopper", 512), ((192, 128), "portable", 320), ((128, 192), "portable", 320),
        ((256, 256), "hopper", 512), ((264, 264), "portable", 288), ((576, 512), "portable", 288),
    ]:  # fmt: skip
        plan = _C.plan_attention(head_dim=dims[0], value_dim=dims[1], **shape)
        assert (plan["family"], plan["padded_rows"]) == (family, padded)
    # A multiprocessor has registers for one block of 32 rows of such heads.
    assert (plan["grid"], plan["waves"]) == (132, 1.0)


def test_a_plan_says_what_is_wrong():
    right = dict(num_rows=3, num_heads=8, num_kv_heads=2, head_dim=64, prefix_len=9)
    for wrong in (
        dict(num_heads=7), dict(num_rows=0), dict(prefix_len=-1), dict(head_dim=577),
        dict(head_dim=520), dict(value_dim=513), dict(value_dim=0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="plan_attention: sizes must be positive"):
            _C.plan_attention(**{**right, **wrong})
    with pytest.raises(ValueError, match="dtype must be fp32, fp16 or bf16, got int8"):
        _C.plan_attention(**right, dtype="int8")
