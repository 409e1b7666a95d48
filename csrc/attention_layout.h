#pragma once

// The shapes of the portable kernels of tree attention, and where things lie in the shared memory
// of their blocks. Host and device code share this; it has no CUDA header, so that any machine can
// plan.

#include "host_device.h"

namespace specextend {

// A SegmentState and a PartialSum (kernels/attention/) take so many bytes of shared memory.
constexpr int kSegmentStateBytes = 256;
constexpr int kPartialSumBytes = 8;

// --- 16-bit floats, on tensor cores ---

constexpr int kAttentionThreads = 128;
constexpr int kAttentionBlocksPerSm = 2;
constexpr int kAttentionShared =
    99 * 1024;  // bytes: a block can have them from sm_86 on, not on sm_87

// The sizes of heads that a kernel is made for: D of queries and keys, Dv of values and outputs.
struct AttentionDims {
  int keys, values;

  constexpr int larger() const { return keys > values ? keys : values; }
};

// There is a kernel for each of these. Smaller heads are padded with zeros on their way to shared
// memory.
constexpr AttentionDims kAttentionDims[] = {{64, 64},   {80, 80},   {96, 96},
                                            {128, 128}, {192, 128}, {192, 192},
                                            {256, 256}, {512, 512}, {576, 512}};

// Returns the sizes of the kernel that serves D and Dv, which are at most 576 and 512.
constexpr AttentionDims attention_dims(int head_dim, int value_dim) {
  AttentionDims found{};
  for (const AttentionDims& dims : kAttentionDims) {
    found = dims;
    if (head_dim <= dims.keys && value_dim <= dims.values) break;
  }
  return found;
}

// Returns whether the sizes are beyond the registers of a warp that has rows of its own: the warps
// of a block then share rows, and each has some columns of them (portable/wide.cuh).
constexpr bool is_wide(AttentionDims dims) { return dims.larger() > 256; }

// Returns the rows of a block (tree rows x group) where a KV head has `packed` of them.
constexpr int attention_rows(AttentionDims dims, int packed) {
  return packed <= 16 ? 16 : packed <= 32 || is_wide(dims) ? 32 : 64;
}

// Warps of 32 rows halve what is read from shared memory; above 128 dimensions their sums would not
// fit into registers.
constexpr int attention_row_tiles(AttentionDims dims, int rows) {
  return rows > 16 && dims.larger() <= 128 ? 2 : 1;
}
constexpr int attention_row_warps(AttentionDims dims, int rows) {
  return rows / (16 * attention_row_tiles(dims, rows));
}
// Each group of warps that share rows takes 16 keys at a time.
constexpr int attention_tile_keys(AttentionDims dims, int rows) {
  return is_wide(dims) ? 16 : 16 * 4 / attention_row_warps(dims, rows);
}

// The softmax of each group is kept for so many keys before log-sum-exps of chunks are made of
// them; with chunks that are not whole groups the logits of one tile are kept.
constexpr int kAttentionPartKeys = 256;

// Where things lie in the shared memory of a block, in bytes from its begin, where its SegmentState
// is. The output of all warps, 4 bytes an element, takes the place of ring and logits at the end of
// a segment.
struct AttentionLayout {
  int sums, carry, own_values, ring, half, slots, ahead, logits, logits_pitch, part_pitch,
      output_pitch, bytes;
};

constexpr AttentionLayout attention_layout(AttentionDims dims, int rows, bool chunks) {
  const int warp_rows = 4 * 16 * attention_row_tiles(dims, rows);
  const int tile_keys = attention_tile_keys(dims, rows);
  AttentionLayout at{};
  at.sums = kSegmentStateBytes;
  at.carry = at.sums + warp_rows * kPartialSumBytes;
  at.own_values = at.carry + (chunks ? 2 * rows * kPartialSumBytes : 0);
  at.ring =
      at.own_values + (chunks ? attention_row_tiles(dims, rows) * 4 * kAttentionThreads * 4 : 0);
  at.half = tile_keys * dims.larger() * 2;
  at.logits_pitch = tile_keys + 4;
  at.part_pitch = kAttentionPartKeys / 16 + 1;
  const int tile_bytes = at.logits_pitch * 4, part_bytes = at.part_pitch * kPartialSumBytes;
  const int logits_bytes = chunks ? rows * (tile_bytes > part_bytes ? tile_bytes : part_bytes) : 0;
  at.slots = (kAttentionShared - at.ring - logits_bytes) / at.half;
  at.slots = at.slots < 16 ? at.slots : 16;
  at.ahead = at.slots - (rows + tile_keys - 1) / tile_keys;  // the queries come through the others
  at.logits = at.ring + at.slots * at.half;
  at.output_pitch = dims.values + 8;  // rows of a quarter warp in different banks
  const int stream_bytes = at.slots * at.half + logits_bytes;
  const int output_bytes = warp_rows * at.output_pitch * 4;
  at.bytes = at.ring + (stream_bytes > output_bytes ? stream_bytes : output_bytes);
  return at;
}

// In blocks for wide heads, each row has eight threads that make its weights, and each 16 rows have
// four warps.
constexpr int kWideRowThreads = 8;
constexpr int wide_threads(int rows) { return kWideRowThreads * rows; }
constexpr int wide_blocks_per_sm(int rows) { return rows == 16 ? 2 : 1; }  // registers suffice

// The same for wide heads. The warps' sums over their own dimensions are [4, rows, 16].
struct WideLayout {
  int carry, rescale, weights, weights_pitch, logits, logits_pitch, sums, ring, half, slots, ahead,
      bytes;
};

constexpr WideLayout wide_layout(AttentionDims dims, int rows) {
  const int tile_keys = attention_tile_keys(dims, rows);
  WideLayout at{};
  at.weights_pitch = tile_keys + 8;  // rows of a matrix in different banks
  at.logits_pitch = tile_keys + 1;
  at.carry = kSegmentStateBytes;
  at.rescale = at.carry + 2 * rows * kPartialSumBytes;
  at.weights = at.rescale + rows * 4;
  at.logits = at.weights + rows * at.weights_pitch * 2;
  at.sums = at.logits + rows * at.logits_pitch * 4;
  at.ring = at.sums + 4 * rows * tile_keys * 4;
  at.half = tile_keys * dims.larger() * 2;
  at.slots = (kAttentionShared - at.ring) / at.half;
  at.ahead = at.slots - (rows + tile_keys - 1) / tile_keys;  // the queries come through the others
  at.bytes = at.ring + at.slots * at.half;
  return at;
}

// --- float32 ---

constexpr int kFloatAttentionThreads = 128;
constexpr int kFloatAttentionRows = 16;  // eight threads each

// Returns the keys of a tile, of which each of these threads has every eighth. Large heads leave
// room for fewer.
constexpr int float_attention_tile_keys(int larger_dim) { return larger_dim <= 256 ? 32 : 16; }

// Where things lie behind the SegmentState, in floats. Rows are odd in length, so that threads that
// read one column of different rows read different banks.
struct FloatAttentionLayout {
  int pitch, tile_pitch, carry, queries, keys, logits, weights, end;
};

SPECEXTEND_HOST_DEVICE FloatAttentionLayout float_attention_layout(int larger_dim) {
  const int tile_keys = float_attention_tile_keys(larger_dim);
  FloatAttentionLayout at{};
  at.pitch = larger_dim + 1;
  at.tile_pitch = tile_keys + 1;
  at.carry = 0;
  at.queries = at.carry + 4 * kFloatAttentionRows;
  at.keys = at.queries + kFloatAttentionRows * at.pitch;
  at.logits = at.keys + tile_keys * at.pitch;
  at.weights = at.logits + kFloatAttentionRows * at.tile_pitch;
  at.end = at.weights + kFloatAttentionRows * at.tile_pitch;
  return at;
}

inline int float_attention_bytes(int larger_dim) {
  return kSegmentStateBytes + float_attention_layout(larger_dim).end * int(sizeof(float));
}

}  // namespace specextend
