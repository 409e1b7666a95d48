#pragma once

// How the work of attention is laid over a fixed grid of blocks, from lengths that only the device
// knows. Host and device code share this.
//
// A unit is what one pass over keys serves: one block of query rows of one KV head of one sequence.
// All units lie on a line, those of a sequence together; a unit takes kUnitOverhead positions for
// being begun and then one per tile of keys. Block c has the positions [c * run, (c + 1) * run): a
// unit is split between blocks (split-KV) where a border falls into it. (FlashMLA cuts its work
// like this, with a kernel of its own; here every block computes its part itself.) Who does what
// follows from the lengths alone, so that sums are always made in the same order.

#include <cstdint>

#include "host_device.h"

namespace specextend {

constexpr int kUnitOverhead = 2;  // so many tiles are read in the time that a unit costs besides
constexpr int kPartialsPerBlock = 2;

// Holds the constants of a launch.
struct WorkCut {
  int batch;
  int num_kv_heads;
  int row_blocks;      // each KV head has so many
  int rows_per_block;  // tree rows x group
  int tile_keys;
  int grid;     // blocks
  int min_run;  // a block has no fewer positions
};

SPECEXTEND_HOST_DEVICE int64_t clamp_between(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

SPECEXTEND_HOST_DEVICE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t begin, end;
};

// Returns the tiles that hold the keys [keys.begin, keys.end); begin = end if there are none.
SPECEXTEND_HOST_DEVICE Range tiles_of(Range keys, int tile_keys) {
  const int64_t begin = keys.begin / tile_keys;
  return {begin, keys.begin < keys.end ? divide_up(keys.end, tile_keys) : begin};
}

// Returns how many positions of the line a unit takes.
SPECEXTEND_HOST_DEVICE int64_t unit_length(Range tiles) {
  return kUnitOverhead + tiles.end - tiles.begin;
}

SPECEXTEND_HOST_DEVICE int units_per_sequence(const WorkCut& w) {
  return w.num_kv_heads * w.row_blocks;
}

// Returns how many positions a block has, of a line of `total`.
SPECEXTEND_HOST_DEVICE int64_t run_length(const WorkCut& w, int64_t total) {
  const int64_t even = divide_up(total, w.grid);
  return even > w.min_run ? even : w.min_run;
}

// Returns how many blocks are worth launching, of at most `max_grid`, where units have at most
// `max_tiles`.
SPECEXTEND_HOST_DEVICE int useful_grid(const WorkCut& w, int64_t max_tiles, int max_grid) {
  const int64_t most = units_per_sequence(w) * int64_t(w.batch) * unit_length({0, max_tiles});
  return int(clamp_between(divide_up(most, w.min_run), 1, max_grid));
}

// The part of a unit that lies in a run.
struct Segment {
  int64_t begin, end;  // tiles, counted from the unit's first
  bool opens, closes;  // it holds the unit's begin, its end: both, where a unit has no tiles

  SPECEXTEND_HOST_DEVICE bool empty() const { return begin == end && !opens; }
};

// Returns the segment of a unit that has `num_tiles` and begins at `unit_begin` of the line. The
// segment is empty if the run holds only the unit's overhead.
SPECEXTEND_HOST_DEVICE Segment segment_of(int64_t unit_begin, int64_t num_tiles, Range run) {
  if (num_tiles == 0) {
    const bool here = run.begin <= unit_begin && unit_begin < run.end;
    return {0, 0, here, here};
  }
  const int64_t first = unit_begin + kUnitOverhead;
  const int64_t begin = clamp_between(run.begin - first, 0, num_tiles);
  const int64_t end = clamp_between(run.end - first, begin, num_tiles);
  return {begin, end, begin == 0 && end > 0, begin < end && end == num_tiles};
}

// Returns the blocks [begin, end) that have segments of a unit.
SPECEXTEND_HOST_DEVICE Range blocks_of(int64_t unit_begin, int64_t num_tiles, int64_t run) {
  if (num_tiles == 0) return {unit_begin / run, unit_begin / run + 1};
  const int64_t first = unit_begin + kUnitOverhead;
  return {first / run, (first + num_tiles - 1) / run + 1};
}

// Returns where a block puts the result of a segment that is not a whole unit. A segment that does
// not open its unit is the block's first, one that does not close it is its last: two places are
// enough.
SPECEXTEND_HOST_DEVICE int64_t partial_of(int64_t block, bool opens) {
  return block * kPartialsPerBlock + opens;
}

}  // namespace specextend
