#pragma once

// The shapes of the tensor-core kernels of tree attention, and what other files may call of them
// and of the combine.

#include <cuda_runtime.h>

#include "kernels/attention_work.cuh"

namespace specextend {

constexpr int kAttentionThreads = 128;
constexpr int kAttentionBlocksPerSm = 2;
constexpr int kAttentionShared = 99 * 1024;  // bytes that a block can have from sm_86 on, but sm_87

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

// Keys whose sums are kept, by group, before log-sum-exps of chunks are made of them; with chunks
// that are not whole groups the logits of one tile are kept.
constexpr int kAttentionPartKeys = 256;

// Shared memory of a block, in bytes from its begin, where its SegmentState is. The output of all
// warps, 4 bytes an element, takes the place of ring and logits at the end of a segment.
struct AttentionLayout {
  int sums, carry, own_values, ring, half, slots, ahead, logits, logits_pitch, part_pitch,
      output_pitch, bytes;
};

constexpr AttentionLayout attention_layout(int dim, int rows, bool chunks) {
  const int warp_rows = 4 * 16 * attention_row_tiles(dim, rows);
  const int tile_keys = attention_tile_keys(dim, rows);
  AttentionLayout at{};
  at.sums = (int(sizeof(SegmentState)) + 127) / 128 * 128;
  at.carry = at.sums + warp_rows * int(sizeof(PartialSum));
  at.own_values = at.carry + (chunks ? 2 * rows * int(sizeof(PartialSum)) : 0);
  at.ring =
      at.own_values + (chunks ? attention_row_tiles(dim, rows) * 4 * kAttentionThreads * 4 : 0);
  at.half = tile_keys * dim * 2;
  at.logits_pitch = tile_keys + 4;
  at.part_pitch = kAttentionPartKeys / 16 + 1;
  const int tile_bytes = at.logits_pitch * 4, part_bytes = at.part_pitch * int(sizeof(PartialSum));
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

// The kernel of tree_attention.cuh for call.cut; D is at most kDim.
template <typename T, int kDim, bool kChunks>
cudaError_t launch_attention(const AttentionCall& call, cudaStream_t stream);

// The kernel of attention_combine.cuh, behind the one that made the parts. `early`: that one lets
// it begin (launch_early).
template <typename T>
cudaError_t launch_attention_combine(const AttentionCall& call, bool early, cudaStream_t stream);

}  // namespace specextend
