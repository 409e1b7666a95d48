#pragma once

// The online softmax of the Hopper kernel, and the log-sum-exps of chunks that come with it.

#include <cuda_runtime.h>

#include <cstdint>

#include "hopper_tiles.h"
#include "kernels/attention/softmax.cuh"
#include "kernels/ptx.cuh"

namespace specextend {

// Return the largest of four threads' numbers, and their sum, to all four: they share a row.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// The online softmax of the two rows that a thread has a part of. Element i of a tile's logits in
// the thread is at fragment_row and fragment_column (hopper_tiles.h): it belongs to row r of two
// where i / 2 % 2 == r. `scale` > 0 makes base-2 exponents of logits.
struct OnlineSoftmax {
  float scale;
  float max[2] = {-INFINITY, -INFINITY};  // the largest logit
  float sum[2] = {0.f, 0.f};              // the sum of weights, of the thread's columns
  float correction[2];                    // the rescale factor of sums made before the last tile

  // Returns what exponents are relative to, in base 2; 0 for a row that has seen nothing, so that
  // no exponent is -inf + inf.
  __device__ __forceinline__ float offset(int r) const {
    return max[r] == -INFINITY ? 0.f : max[r] * scale;
  }

  // Takes the largest logit of a tile in, and rescales the row's sum.
  __device__ __forceinline__ void raise(int r, float to) {
    const float before = max[r] * scale;
    max[r] = fmaxf(max[r], to);
    correction[r] = ptx::exp2_approx(before - offset(r));
    sum[r] *= correction[r];
  }

  // Makes weights of a tile's logits.
  template <int kN>
  __device__ __forceinline__ void add_tile(float (&s)[kN]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m = -INFINITY;
#pragma unroll
      for (int i = 2 * r; i < kN; i += 4) m = fmaxf(m, fmaxf(s[i], s[i + 1]));
      raise(r, quad_max(m));
      const float x = offset(r);
#pragma unroll
      for (int i = 2 * r; i < kN; i += 4) {
        s[i] = ptx::exp2_approx(fmaf(s[i], scale, -x));
        s[i + 1] = ptx::exp2_approx(fmaf(s[i + 1], scale, -x));
        sum[r] += s[i] + s[i + 1];
      }
    }
  }

  // Does the same for a tile of the prefix, and writes the log-sum-exp of each chunk of kChunk keys
  // to chunk_lse[r], which is null for a row that does not exist. Exponents are taken once,
  // relative to the chunk's maximum.
  template <int kChunk, int kN>
  __device__ __forceinline__ void add_tile_of_chunks(float (&s)[kN], float* const (&chunk_lse)[2]) {
    constexpr int kSpan = kChunk / 2, kCount = kN / kSpan;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m[kCount], all = -INFINITY;
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        m[c] = -INFINITY;
#pragma unroll
        for (int i = c * kSpan + 2 * r; i < (c + 1) * kSpan; i += 4) {
          m[c] = fmaxf(m[c], fmaxf(s[i], s[i + 1]));
        }
        m[c] = quad_max(m[c]);
        all = fmaxf(all, m[c]);
      }
      raise(r, all);
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        const float x = m[c] * scale;
        float total = 0.f;
#pragma unroll
        for (int i = c * kSpan + 2 * r; i < (c + 1) * kSpan; i += 4) {
          s[i] = ptx::exp2_approx(fmaf(s[i], scale, -x));
          s[i + 1] = ptx::exp2_approx(fmaf(s[i + 1], scale, -x));
          total += s[i] + s[i + 1];
        }
        const float factor = ptx::exp2_approx(x - offset(r));
        sum[r] += total * factor;
#pragma unroll
        for (int i = c * kSpan + 2 * r; i < (c + 1) * kSpan; i += 4) {
          s[i] *= factor;
          s[i + 1] *= factor;
        }
        store_chunk(chunk_lse[r], c, {x, quad_sum(total)});
      }
    }
  }

  // Writes the log-sum-exps of the chunks of a tile's first `columns` columns; the tile may hold
  // other keys too. Changes nothing here.
  template <int kChunk, int kN>
  __device__ __forceinline__ void store_chunks(const float (&s)[kN], int thread, int columns,
                                               float* const (&chunk_lse)[2]) const {
    constexpr int kSpan = kChunk / 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < kN / kSpan; ++c) {
        if (c * kChunk >= columns) continue;
        float m = -INFINITY, total = 0.f;
#pragma unroll
        for (int i = c * kSpan; i < (c + 1) * kSpan; ++i) {
          if (i / 2 % 2 == r && fragment_column(thread, i) < columns) m = fmaxf(m, s[i]);
        }
        m = quad_max(m);
        const float x = m == -INFINITY ? 0.f : m * scale;
#pragma unroll
        for (int i = c * kSpan; i < (c + 1) * kSpan; ++i) {
          if (i / 2 % 2 != r || fragment_column(thread, i) >= columns) continue;
          total += ptx::exp2_approx(fmaf(s[i], scale, -x));
        }
        total = quad_sum(total);
        store_chunk(chunk_lse[r], c, m == -INFINITY ? no_keys() : PartialSum{x, total});
      }
    }
  }

  // Writes a chunk's log-sum-exp: one of the four threads that know it does.
  __device__ __forceinline__ static void store_chunk(float* to, int c, PartialSum s) {
    if (to && int(threadIdx.x) % 4 == c % 4) to[c] = natural_lse(s);
  }

  // Returns the softmax over all keys seen so far. By whole warps.
  __device__ __forceinline__ PartialSum total(int r) const {
    const float all = quad_sum(sum[r]);
    return max[r] == -INFINITY ? no_keys() : PartialSum{offset(r), all};
  }
};

}  // namespace specextend
