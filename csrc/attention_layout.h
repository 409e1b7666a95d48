#pragma once

// The shapes of the portable kernels of tree attention, and where things lie in the shared memory
// of their blocks. Host and device code share this; it has no CUDA header, so that any machine can
// plan.

#include <initializer_list>

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

// Returns the head dimension of the kernel that serves D, which is 8 to 256.
constexpr int attention_dim(int head_dim) {
  for (int dim : {64, 80, 96, 128, 192}) {
    if (head_dim <= dim) return dim;
  }
  return 256;
}

// Returns the rows of a block (tree rows x group) where a KV head has `packed` of them.
constexpr int attention_rows(int packed) { return packed <= 16 ? 16 : packed <= 32 ? 32 : 64; }

// Warps of 32 rows halve what is read from shared memory; above 128 dimensions their sums would not
// fit into registers.
constexpr int attention_row_tiles(int dim, int rows) { return rows > 16 && dim <= 128 ? 2 : 1; }
constexpr int attention_row_warps(int dim, int rows) {
  return rows / (16 * attention_row_tiles(dim, rows));
}
// Each group of warps that share rows takes 16 keys at a time.
constexpr int attention_tile_keys(int dim, int rows) {
  return 16 * 4 / attention_row_warps(dim, rows);
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

constexpr AttentionLayout attention_layout(int dim, int rows, bool chunks) {
  const int warp_rows = 4 * 16 * attention_row_tiles(dim, rows);
  const int tile_keys = attention_tile_keys(dim, rows);
  AttentionLayout at{};
  at.sums = kSegmentStateBytes;
  at.carry = at.sums + warp_rows * kPartialSumBytes;
  at.own_values = at.carry + (chunks ? 2 * rows * kPartialSumBytes : 0);
  at.ring =
      at.own_values + (chunks ? attention_row_tiles(dim, rows) * 4 * kAttentionThreads * 4 : 0);
  at.half = tile_keys * dim * 2;
  at.logits_pitch = tile_keys + 4;
  at.part_pitch = kAttentionPartKeys / 16 + 1;
  const int tile_bytes = at.logits_pitch * 4, part_bytes = at.part_pitch * kPartialSumBytes;
  const int logits_bytes = chunks ? rows * (tile_bytes > part_bytes ? tile_bytes : part_bytes) : 0;
  at.slots = (kAttentionShared - at.ring - logits_bytes) / at.half;
  at.slots = at.slots < 16 ? at.slots : 16;
  at.ahead = at.slots - (rows + tile_keys - 1) / tile_keys;  // the queries come through the others
  at.logits = at.ring + at.slots * at.half;
  at.output_pitch = dim + 8;  // rows of a quarter warp in different banks
  const int stream_bytes = at.slots * at.half + logits_bytes;
  const int output_bytes = warp_rows * at.output_pitch * 4;
  at.bytes = at.ring + (stream_bytes > output_bytes ? stream_bytes : output_bytes);
  return at;
}

// --- float32 ---

constexpr int kFloatAttentionThreads = 128;
constexpr int kFloatAttentionRows = 16;      // eight threads each
constexpr int kFloatAttentionTileKeys = 32;  // each of these threads has four
constexpr int kFloatAttentionTilePitch = kFloatAttentionTileKeys + 1;
constexpr int kFloatAttentionMaxDim = 256;

// Where things lie behind the SegmentState, in floats. Rows are odd in length, so that threads that
// read one column of different rows read different banks.
struct FloatAttentionLayout {
  int pitch, carry, queries, keys, logits, weights, end;
};

SPECEXTEND_HOST_DEVICE FloatAttentionLayout float_attention_layout(int dim) {
  FloatAttentionLayout at{};
  at.pitch = dim + 1;
  at.carry = 0;
  at.queries = at.carry + 4 * kFloatAttentionRows;
  at.keys = at.queries + kFloatAttentionRows * at.pitch;
  at.logits = at.keys + kFloatAttentionTileKeys * at.pitch;
  at.weights = at.logits + kFloatAttentionRows * kFloatAttentionTilePitch;
  at.end = at.weights + kFloatAttentionRows * kFloatAttentionTilePitch;
  return at;
}

inline int float_attention_bytes(int dim) {
  return kSegmentStateBytes + float_attention_layout(dim).end * int(sizeof(float));
}

}  // namespace specextend
