#pragma once

// The online softmax of the portable kernel: one warp's rows over the keys of its group.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention/pack.cuh"
#include "kernels/attention/portable/shape.cuh"
#include "kernels/attention/softmax.cuh"
#include "kernels/ptx.cuh"

namespace specextend {

// The reference that exponents are taken from follows the largest logit only when that is this much
// (base 2) above it: after the first keys, sums are nearly never rescaled. fp16 weights then stay
// below 2^8.
constexpr float kAttentionSlack = 8.f;

// Holds the softmax of the thread's rows, of which it has the columns that Shape::Logits says.
template <typename T, typename Shape>
class PortableSoftmax {
 public:
  static constexpr int kRowTiles = Shape::kRowTiles;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        limit(i, half) = -INFINITY;
        sum(i, half) = 0.f;
      }
    }
  }

  // Makes weights, 2^(logit - shift), of the logits of 16 keys. Where a row gets a new reference,
  // its outputs are rescaled.
  __device__ __forceinline__ void add_keys(const typename Shape::Logits& logits,
                                           const PortableThread<Shape>& at,
                                           typename Shape::Weights& weights,
                                           typename Shape::Outputs& out) {
    float top[kRowTiles][2];
    bool grows = false;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = 2 * half;
        top[i][half] = fmaxf(fmaxf(logits[i][0][j], logits[i][0][j + 1]),
                             fmaxf(logits[i][1][j], logits[i][1][j + 1])) *
                       at.p.factor;
        grows |= top[i][half] > limit(i, half);
      }
    }
    if (__any_sync(kAllLanes, grows)) raise(top, out);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float down = -shift(i, half);
        float w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          w[j] = ptx::exp2_approx(fmaf(logits[i][j / 2][2 * half + j % 2], at.p.factor, down));
        }
        sum(i, half) += (w[0] + w[1]) + (w[2] + w[3]);
        weights[i][half] = pack(T{}, w[0], w[1]);
        weights[i][2 + half] = pack(T{}, w[2], w[3]);
      }
    }
  }

  // Writes the softmax of a row over all keys so far to `to`; one of the four threads that share
  // the row does.
  __device__ __forceinline__ void store_total(int tile, int half, int lane, PartialSum& to) {
    float total = sum(tile, half);
    total += __shfl_xor_sync(kAllLanes, total, 1);
    total += __shfl_xor_sync(kAllLanes, total, 2);
    if (lane % 4 == 0) to = total == 0.f ? no_keys() : PartialSum{shift(tile, half), total};
  }

 private:
  // Return, for one of the thread's rows, the largest logit that changes nothing, kAttentionSlack
  // above the reference, or -inf before the first key; and the thread's part of the sum of weights.
  __device__ __forceinline__ float& limit(int tile, int half) {
    return own_value(limit_, 0, tile, half);
  }
  __device__ __forceinline__ float& sum(int tile, int half) {
    return own_value(sum_, 1, tile, half);
  }
  // With chunks there are no registers left for these.
  __device__ __forceinline__ float& own_value(float (&values)[kRowTiles][2], int which, int tile,
                                              int half) const {
    if constexpr (Shape::kChunks) {
      float* const kept = reinterpret_cast<float*>(ptx::shared_memory() + Shape::kAt.own_values);
      return kept[((which * kRowTiles + tile) * 2 + half) * kAttentionThreads + int(threadIdx.x)];
    } else {
      return values[tile][half];
    }
  }

  // Returns the reference: what exponents are relative to.
  __device__ __forceinline__ float shift(int tile, int half) {
    const float top = limit(tile, half);
    return top == -INFINITY ? 0.f : top - kAttentionSlack;
  }

  // Gives rows whose logits have outgrown their reference a new one, and rescales what was summed.
  __device__ __forceinline__ void raise(const float (&top)[kRowTiles][2],
                                        typename Shape::Outputs& out) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = top[i][half];
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
        const float before = limit(i, half);
        if (!(most > before)) continue;
        // What was summed before, if anything, was relative to the old reference.
        limit(i, half) = most + kAttentionSlack;
        const float scale =
            before == -INFINITY ? 1.f : ptx::exp2_approx(before - (most + kAttentionSlack));
        sum(i, half) *= scale;
#pragma unroll
        for (int d = 0; d < Shape::kValueDim / 8; ++d) {
          out[i][d][2 * half] *= scale;
          out[i][d][2 * half + 1] *= scale;
        }
      }
    }
  }

  float limit_[kRowTiles][2], sum_[kRowTiles][2];
};

}  // namespace specextend
