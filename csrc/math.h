#pragma once

#include <cmath>

#ifdef __CUDACC__
#define SPECEXTEND_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SPECEXTEND_HOST_DEVICE inline
#endif

namespace specextend {

struct MergeWeights {
  float a, b, lse;
};

// Weights of two partial softmaxes; both empty -> (0, 0, -inf), never NaN. +inf, which some libraries
// write for an empty set, is read as empty.
SPECEXTEND_HOST_DEVICE MergeWeights merge_weights(float lse_a, float lse_b) {
  if (lse_a == INFINITY) lse_a = -INFINITY;
  if (lse_b == INFINITY) lse_b = -INFINITY;
  const float m = lse_a > lse_b ? lse_a : lse_b;
  if (m == -INFINITY) return {0.f, 0.f, -INFINITY};
  const float a = expf(lse_a - m), b = expf(lse_b - m), inv = 1.f / (a + b);
  return {a * inv, b * inv, m + logf(a + b)};
}

}  // namespace specextend
