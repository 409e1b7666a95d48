#pragma once

// The second kernel of attention: the combine adds up the partials of units that are split between
// blocks, and completes the chunks.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention/call.cuh"
#include "kernels/attention/launch.cuh"
#include "kernels/attention/masks.cuh"
#include "kernels/attention/pack.cuh"
#include "kernels/attention/softmax.cuh"
#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"
#include "work_partition.h"

namespace specextend {

constexpr int kCombineThreads = 128;

// Where the partials of an output row are.
struct CombineRow {
  int b, unit;   // the sequence, and its unit
  PackedRow at;  // query row and head
  int row;       // the row's index in the unit
  Range blocks;  // the blocks that have parts of the unit
  int64_t unit_begin, num_tiles, run;

  __device__ __forceinline__ CombineRow(const AttentionCall& c, int64_t index) : at(c, 0, 0) {
    const int packed_rows = c.num_rows * (c.num_heads / c.num_kv_heads);
    const int packed = int(index % packed_rows),
              kv_head = int(index / packed_rows % c.num_kv_heads);
    b = int(index / packed_rows / c.num_kv_heads);
    unit = kv_head * c.cut.row_blocks + packed / c.cut.rows_per_block;
    row = packed % c.cut.rows_per_block;
    at = PackedRow(c, kv_head, packed);
    const int64_t* lines = c.workspace.lines;
    const int64_t length = (lines[b + 1] - lines[b]) / units_per_sequence(c.cut);
    unit_begin = lines[b] + unit * length;
    num_tiles = length - kUnitOverhead;
    run = run_length(c.cut, lines[c.batch]);
    blocks = blocks_of(unit_begin, num_tiles, run);
  }
  // Returns the row's place in the arrays of partials.
  __device__ __forceinline__ int64_t partial_row(const AttentionCall& c, int64_t block) const {
    return partial_of(block, block == blocks.begin) * c.cut.rows_per_block + row;
  }
};

// Writes the row's output and log-sum-exp from its partials, which are rescaled to a common
// maximum. By whole warps.
template <typename T>
__device__ __forceinline__ void combine_parts(const AttentionCall& c, const CombineRow& r) {
  const int lane = int(threadIdx.x % 32);
  PartialSum total = no_keys();
  for (int64_t block = r.blocks.begin + lane; block < r.blocks.end; block += 32) {
    total = add_partial_sums(total, c.workspace.sums[r.partial_row(c, block)]);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    total = add_partial_sums(total, {__shfl_xor_sync(kAllLanes, total.max, step),
                                     __shfl_xor_sync(kAllLanes, total.sum, step)});
  }
  // Rounding may differ between the two sides of an exchange.
  total = {__shfl_sync(kAllLanes, total.max, 0), __shfl_sync(kAllLanes, total.sum, 0)};
  const int64_t output = r.at.output(c, r.b);
  if (lane == 0) c.lse[output] = natural_lse(total);
  if (!c.out) return;
  const float scale = output_scale(c, total, r.at.head);
  for (int column = lane * 4; column < c.value_dim; column += 128) {
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
    for (int64_t block = r.blocks.begin; block < r.blocks.end; ++block) {
      const int64_t at = r.partial_row(c, block);
      const float max = c.workspace.sums[at].max;
      const float weight = max == -INFINITY ? 0.f : exp2f(max - total.max);
      const float4 part =
          *reinterpret_cast<const float4*>(c.workspace.values + at * c.value_dim + column);
      x.x += weight * part.x, x.y += weight * part.y;
      x.z += weight * part.z, x.w += weight * part.w;
    }
    store4(static_cast<T*>(c.out) + output * c.value_dim + column,
           make_float4(x.x * scale, x.y * scale, x.z * scale, x.w * scale));
  }
}

// Writes the chunks that lie in the parts of several blocks: the first of these has the chunk's
// begin at its own end, others have all or the rest of it at their begin. By whole warps, a lane
// per chunk.
__device__ __forceinline__ void combine_chunks(const AttentionCall& c, const CombineRow& r,
                                               int64_t prefix, Range tiles) {
  const int64_t size = c.chunk_size, rows = c.cut.rows_per_block;
  const int64_t first_tile = r.unit_begin + kUnitOverhead;  // on the line
  const auto end_of = [&](int64_t block) {                  // the first key behind a block's part
    return (tiles.begin + min((block + 1) * r.run - first_tile, r.num_tiles)) * c.cut.tile_keys;
  };
  for (int64_t block = r.blocks.begin + int(threadIdx.x % 32); block + 1 < r.blocks.end;
       block += 32) {
    const int64_t end = end_of(block);
    const int64_t chunk = end / size, chunk_end = min((chunk + 1) * size, prefix);
    const int64_t begin = block == r.blocks.begin ? 0 : end_of(block - 1);
    if (end >= chunk_end || chunk * size == end || chunk * size < begin) continue;
    const auto edge = [&](int64_t block, int side) {
      const int64_t partial = partial_of(block, block == r.blocks.begin);
      return c.workspace.edges[(partial * 2 + side) * rows + r.row];
    };
    PartialSum sum = edge(block, 1);
    for (int64_t next = block + 1;; ++next) {
      sum = add_partial_sums(sum, edge(next, 0));
      if (end_of(next) >= chunk_end) break;
    }
    c.chunk_lse[r.at.output(c, r.b) * c.num_chunks + chunk] = natural_lse(sum);
  }
}

// Writes -inf to chunks without any key that the row's sequence sees: they lie behind the prefix,
// or before the first position of all rows. By whole warps.
__device__ __forceinline__ void clear_chunks(const AttentionCall& c, const CombineRow& r,
                                             int64_t prefix, Range tiles) {
  float* const to = c.chunk_lse + r.at.output(c, r.b) * c.num_chunks;
  const int64_t first_key = tiles.begin * c.cut.tile_keys;
  const int64_t seen = first_key < prefix ? first_key / c.chunk_size : c.num_chunks;
  const int64_t end = max(seen, divide_up(prefix, c.chunk_size));
  for (int64_t i = threadIdx.x % 32; i < seen; i += 32) to[i] = -INFINITY;
  for (int64_t i = end + threadIdx.x % 32; i < c.num_chunks; i += 32) to[i] = -INFINITY;
}

// Each warp serves an output row.
template <typename T>
__global__ void __launch_bounds__(kCombineThreads)
    attention_combine_kernel(const __grid_constant__ AttentionCall c) {
  ptx::wait_for_predecessors();
  const int64_t index = int64_t(blockIdx.x) * (kCombineThreads / 32) + threadIdx.x / 32;
  if (index >= int64_t(c.batch) * c.num_rows * c.num_heads) return;
  const CombineRow r(c, index);
  if (r.blocks.end - r.blocks.begin > 1) combine_parts<T>(c, r);
  if (!c.chunk_lse) return;
  const int64_t prefix = prefix_length(c, r.b);
  const Range tiles = tiles_of(keys_of(c, prefix, least_depth(c, r.b)), c.cut.tile_keys);
  combine_chunks(c, r, prefix, tiles);
  clear_chunks(c, r, prefix, tiles);
}

template <typename T>
cudaError_t launch_attention_combine(const AttentionCall& call, bool early, cudaStream_t stream) {
  const int64_t rows = int64_t(call.batch) * call.num_rows * call.num_heads;
  const unsigned blocks = unsigned(divide_up(rows, kCombineThreads / 32));
  return launch_early(early, attention_combine_kernel<T>, blocks, kCombineThreads, 0, stream, call);
}

}  // namespace specextend
