#pragma once

// The rows of a warpgroup: queries on their way in, outputs on their way out.

#include <cuda_runtime.h>

#include <cstdint>

#include "hopper_tiles.h"
#include "kernels/attention/call.cuh"
#include "kernels/attention/hopper/shared.cuh"
#include "kernels/attention/hopper/softmax.cuh"
#include "kernels/attention/masks.cuh"
#include "kernels/attention/pack.cuh"
#include "params.h"
#include "work_partition.h"

namespace specextend {

// Copies the warpgroup's 64 rows of q to shared memory, with zeros where there are none.
template <typename T, int kDim>
__device__ __forceinline__ void load_queries(const TreeAttentionParams& p, int b, int kv_head,
                                             int row_begin, int thread, T* queries) {
  const uint32_t sign = p.scale < 0 ? 0x80008000u : 0;  // AttentionCall::factor is without it
#pragma unroll 4
  for (int i = thread; i < kHopperWarpgroupRows * kDim / 8; i += 128) {
    const int row = i / (kDim / 8), column = i % (kDim / 8) * 8;
    const PackedRow from(p, kv_head, row_begin + row);
    uint4 x = make_uint4(0, 0, 0, 0);
    if (from.row < p.num_rows && column < p.head_dim) {
      x = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.q) + b * p.q_stride_b +
                                          from.row * p.q_stride_m + from.head * p.q_stride_h +
                                          column);
      x.x ^= sign, x.y ^= sign, x.z ^= sign, x.w ^= sign;
    }
    *reinterpret_cast<uint4*>(queries + shared_index(kHopperWarpgroupRows, row, column)) = x;
  }
}

// Writes the outputs of a whole unit, or a partial to its place for the combine. The warpgroup's
// rows begin at `unit_row` of the unit and at `row_begin` of the KV head.
template <typename T, int kDim>
__device__ __forceinline__ void store_rows(const HopperCall& c, const HopperJob& job, int unit_row,
                                           int row_begin, const OnlineSoftmax& softmax, int thread,
                                           const float (&o)[kDim / 2]) {
  const AttentionCall& p = c.attention;
  const Segment segment = job.at.segment;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const PartialSum sum = softmax.total(r);
    const int row = fragment_row(thread, 2 * r);
    const PackedRow packed(p, job.at.kv_head, row_begin + row);
    if (packed.row >= p.num_rows) continue;
    const bool notes = thread % 4 == 0;
    if (segment.opens && segment.closes) {
      const int64_t to = packed.output(p, job.at.b);
      if (notes) p.lse[to] = natural_lse(sum);
      const float scale = output_scale(p, sum, packed.head);
      T* const out = static_cast<T*>(p.out) + to * p.head_dim;
#pragma unroll
      for (int i = 2 * r; i < kDim / 2; i += 4) {
        const int column = fragment_column(thread, i);
        if (column >= p.head_dim) continue;
        *reinterpret_cast<uint32_t*>(out + column) = pack(T{}, o[i] * scale, o[i + 1] * scale);
      }
    } else {
      const int block = int(blockIdx.x) / c.cluster;
      const int64_t to = partial_of(block, segment.opens) * p.cut.rows_per_block + unit_row + row;
      if (notes) p.workspace.sums[to] = sum;
      float* const values = p.workspace.values + to * p.head_dim;
#pragma unroll
      for (int i = 2 * r; i < kDim / 2; i += 4) {
        const int column = fragment_column(thread, i);
        if (column >= p.head_dim) continue;
        *reinterpret_cast<float2*>(values + column) = make_float2(o[i], o[i + 1]);
      }
    }
  }
}

}  // namespace specextend
