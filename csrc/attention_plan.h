#pragma once

// How tree attention is laid out on a GPU, from shapes and a few numbers of the device alone. The
// launch uses this, and so do predictions and tests on a machine without a GPU.

#include <cstdint>

#include "attention_layout.h"
#include "hopper_tiles.h"
#include "params.h"
#include "work_partition.h"

namespace specextend {

struct GpuLimits {
  int multiprocessors;
  int shared_bytes;  // a multiprocessor's shared memory
  int major, minor;  // compute capability
};

// Returns the rows of a KV head: tree rows x group.
inline int packed_rows(const TreeAttentionParams& p) {
  return p.num_rows * (p.num_heads / p.num_kv_heads);
}

// --- the portable family ---

// Returns the size of values, 0 where none are read.
inline int read_value_dim(const TreeAttentionParams& p) { return p.out ? p.value_dim : 0; }

// Returns the sizes of the kernel for 16-bit floats.
inline AttentionDims portable_dims(const TreeAttentionParams& p) {
  return attention_dims(p.head_dim, read_value_dim(p));
}

// Returns the size of rows in the shared memory of the kernel for fp32.
inline int float_dim(const TreeAttentionParams& p) {
  return AttentionDims{p.head_dim, read_value_dim(p)}.larger();
}

// Returns the shared memory of a block.
inline int portable_block_bytes(const TreeAttentionParams& p, DType dtype) {
  if (dtype == DType::kFloat32) return float_attention_bytes(float_dim(p));
  const AttentionDims dims = portable_dims(p);
  const int rows = attention_rows(dims, packed_rows(p));
  return is_wide(dims) ? wide_layout(dims, rows).bytes
                       : attention_layout(dims, rows, p.chunk_lse != nullptr).bytes;
}

// Returns how many blocks a multiprocessor holds at a time (its occupancy).
inline int portable_blocks_per_sm(const TreeAttentionParams& p, DType dtype, const GpuLimits& gpu) {
  constexpr int kReserved = 1024;  // bytes that the system takes of every block
  const int fitting = gpu.shared_bytes / (portable_block_bytes(p, dtype) + kReserved);
  const AttentionDims dims = portable_dims(p);
  const bool wide = dtype != DType::kFloat32 && is_wide(dims);
  return int(clamp_between(
      fitting, 1,
      wide ? wide_blocks_per_sm(attention_rows(dims, packed_rows(p))) : kAttentionBlocksPerSm));
}

// Returns the work partition of the portable kernels.
inline WorkCut portable_cut(const TreeAttentionParams& p, DType dtype, const GpuLimits& gpu) {
  WorkCut cut{};
  cut.batch = p.batch;
  cut.num_kv_heads = p.num_kv_heads;
  if (dtype == DType::kFloat32) {
    cut.rows_per_block = kFloatAttentionRows;
    cut.tile_keys = float_attention_tile_keys(float_dim(p));
  } else {
    const AttentionDims dims = portable_dims(p);
    cut.rows_per_block = attention_rows(dims, packed_rows(p));
    cut.tile_keys = attention_tile_keys(dims, cut.rows_per_block);
  }
  cut.row_blocks = int(divide_up(packed_rows(p), cut.rows_per_block));
  // A part's output, written and read in fp32, is as much memory traffic as the keys and values of
  // twice its rows. Four times as many keys are worth it.
  cut.min_run = int(divide_up(4 * cut.rows_per_block, cut.tile_keys));
  cut.grid = useful_grid(cut, divide_up(p.capacity, cut.tile_keys) + 1,
                         portable_blocks_per_sm(p, dtype, gpu) * gpu.multiprocessors);
  return cut;
}

// --- the Hopper family ---

// Returns whether the family has a kernel for these shapes. Where the tensors lie in memory is
// another question.
inline bool hopper_serves(const TreeAttentionParams& p, DType dtype) {
  const bool chunks = p.chunk_lse != nullptr;
  return dtype != DType::kFloat32 && packed_rows(p) > kHopperMinRows && p.softcap == 0 &&
         p.head_dim == p.value_dim && p.head_dim <= kHopperMaxDim &&
         (!chunks || (p.chunk_size == kHopperChunk && p.head_dim <= kHopperChunkDim)) &&
         p.batch > 0 && p.capacity > 0;
}

// Returns the number of blocks of a cluster, which share keys and values.
inline int hopper_cluster(const TreeAttentionParams& p) {
  return packed_rows(p) > kHopperBlockRows ? 2 : 1;
}

// Returns the work partition of the Hopper kernel. A block of the cut is a cluster.
inline WorkCut hopper_cut(const TreeAttentionParams& p, const GpuLimits& gpu) {
  const int cluster = hopper_cluster(p);
  WorkCut cut{};
  cut.batch = p.batch;
  cut.num_kv_heads = p.num_kv_heads;
  cut.rows_per_block = cluster * kHopperBlockRows;
  cut.row_blocks = int(divide_up(packed_rows(p), cut.rows_per_block));
  cut.tile_keys = hopper_tile_keys(hopper_dim(p.head_dim));
  cut.min_run = kHopperMinRun;
  cut.grid =
      useful_grid(cut, divide_up(p.capacity, cut.tile_keys) + 1, gpu.multiprocessors / cluster);
  return cut;
}

// --- what a cut comes to ---

// How work is spread over blocks, where all sequences have one length.
struct WorkTotals {
  int64_t run;       // a block has at most so many positions of the line
  int64_t busy;      // blocks that have tiles
  int64_t partials;  // results that wait for the combine
  int64_t most;      // partials of one unit
};

// Adds up what a cut makes of the keys that every sequence sees.
inline WorkTotals total_work(const WorkCut& cut, Range keys) {
  const Range tiles = tiles_of(keys, cut.tile_keys);
  const int64_t count = tiles.end - tiles.begin, length = unit_length(tiles);
  const int64_t units = int64_t(cut.batch) * units_per_sequence(cut);
  WorkTotals t{run_length(cut, units * length), 0, 0, 0};
  int64_t last = -1;  // block that has been counted
  for (int64_t unit = 0; unit < units; ++unit) {
    const Range blocks = blocks_of(unit * length, count, t.run);
    t.busy += blocks.end - blocks.begin - (blocks.begin == last);
    last = blocks.end - 1;
    const int64_t parts = blocks.end - blocks.begin;
    if (parts > 1) t.partials += parts;
    if (parts > t.most) t.most = parts;
  }
  return t;
}

}  // namespace specextend
