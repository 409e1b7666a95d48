#pragma once

// How two partial softmaxes (split attention) become one. Host and device code share this.

#include <cmath>

#include "host_device.h"

namespace specextend {

struct MergeWeights {
  float a, b, lse;
};

// Returns the weights of two partial softmaxes; both empty -> (0, 0, -inf), never NaN. +inf, which
// some libraries write for an empty set, is read as empty.
SPECEXTEND_HOST_DEVICE MergeWeights merge_weights(float lse_a, float lse_b) {
  if (lse_a == INFINITY) lse_a = -INFINITY;
  if (lse_b == INFINITY) lse_b = -INFINITY;
  const float m = lse_a > lse_b ? lse_a : lse_b;
  if (m == -INFINITY) return {0.f, 0.f, -INFINITY};
  const float a = expf(lse_a - m), b = expf(lse_b - m), inv = 1.f / (a + b);
  return {a * inv, b * inv, m + logf(a + b)};
}

// Returns the values of two parts as one. Products are not fused into the sum, so that exchanging
// the parts changes no bit. A part of weight 0 may hold anything.
SPECEXTEND_HOST_DEVICE float merge_values(const MergeWeights& w, float a, float b) {
  const float x = rounded_product(w.a, a), y = rounded_product(w.b, b);
  return (w.a == 0.f ? 0.f : x) + (w.b == 0.f ? 0.f : y);
}

}  // namespace specextend
