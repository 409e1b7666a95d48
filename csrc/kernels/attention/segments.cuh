#pragma once

// The work partition on the device: each block finds its segments of the line (work_partition.h)
// from the lengths that the device knows. Functions that say "by whole warps" are called by all
// lanes of a warp.

#include <cuda_runtime.h>

#include <cstdint>

#include "attention_layout.h"
#include "kernels/attention/call.cuh"
#include "kernels/attention/masks.cuh"
#include "work_partition.h"

namespace specextend {

// Calls f(b, begin, length) with where the units of a sequence lie on the line, a lane per
// sequence, and returns the line's length. By whole warps.
template <typename F>
__device__ __forceinline__ int64_t for_each_sequence(const AttentionCall& c, const F& f) {
  const int lane = int(threadIdx.x % 32);
  int64_t total = 0;
  for (int first = 0; first < c.batch; first += 32) {
    int depth = 0;
    for (int i = 0; sees_by_position(c) && i < 32 && first + i < c.batch; ++i) {
      const int least = least_depth(c, first + i);
      if (lane == i) depth = least;
    }
    const int b = first + lane;
    int64_t length = 0;
    if (b < c.batch) {
      const Range keys = keys_of(c, prefix_length(c, b), depth);
      length = units_per_sequence(c.cut) * unit_length(tiles_of(keys, c.cut.tile_keys));
    }
    int64_t end = length;
    for (int step = 1; step < 32 && step < c.batch; step *= 2) {
      const int64_t below = __shfl_up_sync(kAllLanes, end, unsigned(step));
      if (lane >= step) end += below;
    }
    if (b < c.batch) f(b, total + end - length, length);
    total += __shfl_sync(kAllLanes, end, min(31, c.batch - 1 - first));
  }
  return total;
}

// Where a block is on the line, and its segment of the unit there. The state lies in shared memory,
// so that it takes no registers; the block's first warp writes it.
struct SegmentState {
  Range run;     // the block's positions of the line
  int64_t at;    // how far the block is
  int64_t line;  // where the sequence's units begin on the line

  int b;           // the sequence
  int64_t prefix;  // its length
  Range keys;      // the keys that rows of the sequence see
  Range tiles;     // the tiles that hold them

  Segment segment;
  int64_t first_tile;  // the segment's first tile, of those of the sequence
  int num_tiles;
  int kv_head;
  int first_packed, num_rows;  // the unit's rows, of those of the KV head
  int row_begin, row_end;      // the query rows that they belong to
  int64_t all_see_from;        // from this position on they all see all of the prefix
  bool done;

  // The whole first warp calls begin, enter and advance.

  // Takes up the run of block `block` of the cut.
  __device__ __forceinline__ void begin(const AttentionCall& c, int block) {
    const int lane = int(threadIdx.x % 32);
    // One block, of a cluster too, notes for the combine where sequences begin.
    const int64_t total = for_each_sequence(c, [&](int b, int64_t begin, int64_t length) {
      if (blockIdx.x > 0) return;
      c.workspace.lines[b] = begin;
      if (b == c.batch - 1) c.workspace.lines[c.batch] = begin + length;
    });
    const int64_t length = run_length(c.cut, total);
    const int64_t first = block * length;
    if (lane == 0) {
      run = {first, first + length < total ? first + length : total};
      at = first;
    }
    __syncwarp();
    for_each_sequence(c, [&](int candidate, int64_t begin, int64_t length) {
      if (begin <= first && first < begin + length) b = candidate, line = begin;
    });
    __syncwarp();
    if (first < total) enter(c);
  }

  // Takes up the sequence b.
  __device__ __forceinline__ void enter(const AttentionCall& c) {
    const int depth = least_depth(c, b);
    if (threadIdx.x == 0) {
      prefix = prefix_length(c, b);
      keys = keys_of(c, prefix, depth);
      tiles = tiles_of(keys, c.cut.tile_keys);
    }
    __syncwarp();
  }

  // Goes on to the next unit that the block has a segment of.
  __device__ __forceinline__ void advance(const AttentionCall& c) {
    const int lane = int(threadIdx.x % 32);
    for (;;) {
      if (at >= run.end) {
        if (lane == 0) done = true;
        return;
      }
      const int64_t length = unit_length(tiles);
      const int unit = int((at - line) / length);
      if (unit == units_per_sequence(c.cut)) {
        __syncwarp();
        if (lane == 0) line = at, ++b;
        __syncwarp();
        enter(c);
        continue;
      }
      const int64_t begin = line + unit * length;
      const Segment found = segment_of(begin, length - kUnitOverhead, run);
      __syncwarp();
      if (lane == 0) at = begin + length;
      __syncwarp();
      if (!found.empty()) return describe(c, unit, found);
    }
  }

 private:
  // Describes a segment of a unit. `unit` counts the sequence's units, row blocks inside KV heads.
  __device__ __forceinline__ void describe(const AttentionCall& c, int unit, const Segment& found) {
    const int lane = int(threadIdx.x % 32), group = c.num_heads / c.num_kv_heads;
    const int packed = unit % c.cut.row_blocks * c.cut.rows_per_block;
    const int rows = min(c.cut.rows_per_block, c.num_rows * group - packed);
    const int begin = packed / group, end = (packed + rows - 1) / group + 1;
    int64_t from = 0;
    if (sees_by_position(c)) {
      int most = INT32_MIN;
      for (int row = begin + lane; row < end; row += 32) most = max(most, row_depth(c, b, row));
      from = first_position(c, prefix, __reduce_max_sync(kAllLanes, most));
    }
    if (lane == 0) {
      segment = found;
      first_tile = tiles.begin + found.begin;
      num_tiles = int(found.end - found.begin);
      kv_head = unit / c.cut.row_blocks;
      first_packed = packed, num_rows = rows;
      row_begin = begin, row_end = end;
      all_see_from = from;
      done = false;
    }
  }
};

static_assert(sizeof(SegmentState) <= kSegmentStateBytes);

// Calls f() for one segment of the block after the other; `state`, in shared memory, describes it.
template <typename F>
__device__ __forceinline__ void for_each_segment(const AttentionCall& c, SegmentState& state,
                                                 const F& f) {
  const bool first_warp = threadIdx.x < 32;
  if (first_warp) state.begin(c, int(blockIdx.x));
  for (;;) {
    if (first_warp) state.advance(c);
    __syncthreads();
    if (state.done) return;
    f();
    __syncthreads();
  }
}

// Returns which of the 32 keys from `key` on any of the unit's rows sees: bit i stands for key + i.
// Other keys may hold anything and are not read. By whole warps.
__device__ __forceinline__ uint32_t readable_keys(const TreeAttentionParams& p,
                                                  const SegmentState& s, int64_t key) {
  const int slot = int(clamp_between(key - s.prefix, -32, p.num_tree_keys));
  const uint32_t prefix = low_bits32(-slot) & ~low_bits32(s.keys.begin - key);
  if (slot <= -32 || slot >= p.num_tree_keys) return prefix;
  if (!p.mask) {  // a chain: the last row sees most
    const int seen = min(s.row_end + p.num_tree_keys - p.num_rows, p.num_tree_keys);
    return prefix | (low_bits32(seen - slot) & ~low_bits32(-slot));
  }
  uint32_t tree = 0;
  const int words = mask_words(p.num_tree_keys);
  for (int row = s.row_begin + int(threadIdx.x % 32); row < s.row_end; row += 32) {
    tree |= mask_bits32(p.mask + (int64_t(s.b) * p.num_rows + row) * words, p.num_tree_keys, slot);
  }
  return prefix | __reduce_or_sync(kAllLanes, tree);
}

}  // namespace specextend
