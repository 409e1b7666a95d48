#pragma once

// Log-sum-exps of chunks in the portable kernel. Where chunk borders are borders of the 16 keys of
// a group, each warp keeps the softmax of its keys for a part of 256 keys; else the logits of one
// tile are kept.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention/chunks.cuh"
#include "kernels/attention/portable/shape.cuh"
#include "kernels/attention/softmax.cuh"
#include "kernels/ptx.cuh"
#include "work_partition.h"

namespace specextend {

template <typename Shape>
class PortableChunks {
 public:
  static constexpr AttentionLayout kAt = Shape::kAt;

  __device__ __forceinline__ explicit PortableChunks(const PortableThread<Shape>& at) : at_(at) {}

  // Keeps what chunks need of the warp's logits in a tile.
  __device__ __forceinline__ void keep(const typename Shape::Logits& logits, int tile) const {
    const int prefix_keys = int(clamp_between(at_.s.prefix - at_.first_key(tile), 0, 16));
    if (!chunks_of_groups()) return keep_logits(logits);
    keep_group_sums(logits, tile % Shape::kPartTiles * Shape::kKeyGroups + at_.key_group,
                    prefix_keys);
  }

  // Writes the chunks of a part when its last tile is there. By whole blocks.
  __device__ __forceinline__ void emit_after(int tile) const {
    const int part_tiles = chunks_of_groups() ? Shape::kPartTiles : 1;
    if ((tile + 1) % part_tiles != 0 && tile + 1 < at_.s.num_tiles) return;
    __syncthreads();
    emit_chunks(at_.p, at_.s, tile / part_tiles, part_tiles * Shape::kTileKeys,
                reinterpret_cast<PartialSum*>(ptx::shared_memory() + kAt.carry),
                [&](int row, int begin, int end) { return sum_keys(row, begin, end); });
    __syncthreads();
  }

 private:
  // Returns whether chunk borders are borders of the 16 keys of a group.
  __device__ __forceinline__ bool chunks_of_groups() const { return at_.p.chunk_size % 16 == 0; }

  __device__ __forceinline__ float* logits_at(int row) const {
    return reinterpret_cast<float*>(ptx::shared_memory() + kAt.logits) + row * kAt.logits_pitch;
  }
  // Returns the softmax of a row over 16 keys of a part; these take the place of logits.
  __device__ __forceinline__ PartialSum& group_sum(int row, int group) const {
    return reinterpret_cast<PartialSum*>(ptx::shared_memory() +
                                         kAt.logits)[row * kAt.part_pitch + group];
  }

  __device__ __forceinline__ void keep_logits(const typename Shape::Logits& logits) const {
#pragma unroll
    for (int i = 0; i < Shape::kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float* const to = logits_at(at_.own_row(i, j % 2)) + 16 * at_.key_group + j / 2 * 8;
        *reinterpret_cast<float2*>(to + at_.lane % 4 * 2) =
            make_float2(logits[i][j / 2][j % 2 * 2] * at_.p.factor,
                        logits[i][j / 2][j % 2 * 2 + 1] * at_.p.factor);
      }
    }
  }

  __device__ __forceinline__ void keep_group_sums(const typename Shape::Logits& logits, int group,
                                                  int prefix_keys) const {
#pragma unroll
    for (int i = 0; i < Shape::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        PartialSum row = no_keys();
        float x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool counts = j / 2 * 8 + at_.lane % 4 * 2 + j % 2 < prefix_keys;
          x[j] = counts ? logits[i][j / 2][2 * half + j % 2] * at_.p.factor : -INFINITY;
          row.max = fmaxf(row.max, x[j]);
        }
        row.max = fmaxf(row.max, __shfl_xor_sync(kAllLanes, row.max, 1));
        row.max = fmaxf(row.max, __shfl_xor_sync(kAllLanes, row.max, 2));
        const float shift = row.max == -INFINITY ? 0.f : row.max;
#pragma unroll
        for (int j = 0; j < 4; ++j) row.sum += ptx::exp2_approx(x[j] - shift);
        row.sum += __shfl_xor_sync(kAllLanes, row.sum, 1);
        row.sum += __shfl_xor_sync(kAllLanes, row.sum, 2);
        if (at_.lane % 4 == 0) group_sum(at_.own_row(i, half), group) = row;
      }
    }
  }

  // Returns the softmax of a row over keys [begin, end) of the part.
  __device__ __forceinline__ PartialSum sum_keys(int row, int begin, int end) const {
    if (!chunks_of_groups()) return sum_logits(logits_at(row), begin, end);
    PartialSum total = no_keys();
    for (int group = begin / 16; group * 16 < end; ++group) {
      total = add_partial_sums(total, group_sum(row, group));
    }
    return total;
  }

  const PortableThread<Shape> at_;
};

}  // namespace specextend
