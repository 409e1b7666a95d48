#pragma once

// The end of a segment in the portable kernel: key groups have a split softmax each over the same
// rows, and here these become one, by way of shared memory.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention/masks.cuh"
#include "kernels/attention/pack.cuh"
#include "kernels/attention/portable/shape.cuh"
#include "kernels/attention/portable/softmax.cuh"
#include "kernels/attention/softmax.cuh"
#include "kernels/ptx.cuh"
#include "work_partition.h"

namespace specextend {

template <typename T, typename Shape>
class PortableGroups {
 public:
  static constexpr int kDim = Shape::kValueDim, kRows = Shape::kRows;
  static constexpr AttentionLayout kAt = Shape::kAt;

  __device__ __forceinline__ explicit PortableGroups(const PortableThread<Shape>& at)
      : at_(at),
        whole_(at.s.segment.opens && at.s.segment.closes),
        partial_(partial_of(blockIdx.x, at.s.segment.opens)) {}

  // Puts the softmax of the thread's rows where the other groups see it.
  __device__ __forceinline__ void share_sums(PortableSoftmax<T, Shape>& softmax) const {
#pragma unroll
    for (int i = 0; i < Shape::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        softmax.store_total(i, half, at_.lane,
                            sums()[at_.key_group * kRows + at_.own_row(i, half)]);
      }
    }
  }

  // Puts the thread's outputs likewise, in the place of the ring.
  __device__ __forceinline__ void share_outputs(const typename Shape::Outputs& out) const {
#pragma unroll
    for (int i = 0; i < Shape::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const to =
            outputs() + (at_.key_group * kRows + at_.own_row(i, half)) * kAt.output_pitch;
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d) {
          *reinterpret_cast<float2*>(to + 8 * d + at_.lane % 4 * 2) =
              make_float2(out[i][d][2 * half], out[i][d][2 * half + 1]);
        }
      }
    }
  }

  // Adds the groups' softmaxes, a row per thread, and writes the log-sum-exp of a whole unit or the
  // softmax of a partial. What each group's outputs are rescaled with takes the place of its sum.
  __device__ __forceinline__ void merge_sums() const {
    const AttentionCall& p = at_.p;
    if (int(threadIdx.x) < at_.s.num_rows) {
      const int row = int(threadIdx.x);
      PartialSum total = no_keys();
#pragma unroll
      for (int g = 0; g < Shape::kKeyGroups; ++g) {
        total = add_partial_sums(total, sums()[g * kRows + row]);
      }
      float scale = 1.f;
      if (whole_) {
        const PackedRow packed(p, at_.s.kv_head, at_.s.first_packed + row);
        scale = output_scale(p, total, packed.head);
        p.lse[packed.output(p, at_.s.b)] = natural_lse(total);
      } else {
        p.workspace.sums[partial_ * kRows + row] = total;
      }
#pragma unroll
      for (int g = 0; g < Shape::kKeyGroups; ++g) {
        PartialSum& part = sums()[g * kRows + row];
        part.sum = part.max == -INFINITY ? 0.f : exp2f(part.max - total.max) * scale;
      }
    }
  }

  // Adds the groups' outputs, rescaled, and writes them: a whole unit's, or those of a partial.
  __device__ __forceinline__ void merge_outputs() const {
    const AttentionCall& p = at_.p;
    for (int i = int(threadIdx.x); i < at_.s.num_rows * (kDim / 4); i += kAttentionThreads) {
      const int row = i / (kDim / 4), column = i % (kDim / 4) * 4;
      if (column >= p.value_dim) continue;
      float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int g = 0; g < Shape::kKeyGroups; ++g) {
        const float scale = sums()[g * kRows + row].sum;
        const float4 part = *reinterpret_cast<const float4*>(
            outputs() + (g * kRows + row) * kAt.output_pitch + column);
        x.x += scale * part.x, x.y += scale * part.y;
        x.z += scale * part.z, x.w += scale * part.w;
      }
      if (whole_) {
        const PackedRow packed(p, at_.s.kv_head, at_.s.first_packed + row);
        const int64_t to = packed.output(p, at_.s.b);
        store4(static_cast<T*>(p.out) + to * p.value_dim + column, x);
      } else {
        store4(p.workspace.values + (partial_ * kRows + row) * p.value_dim + column, x);
      }
    }
  }

 private:
  // Both are indexed by key group, then by row.
  __device__ __forceinline__ static PartialSum* sums() {
    return reinterpret_cast<PartialSum*>(ptx::shared_memory() + kAt.sums);
  }
  __device__ __forceinline__ static float* outputs() {
    return reinterpret_cast<float*>(ptx::shared_memory() + kAt.ring);
  }

  const PortableThread<Shape> at_;
  const bool whole_;       // the segment is a whole unit
  const int64_t partial_;  // else it is this partial
};

}  // namespace specextend
