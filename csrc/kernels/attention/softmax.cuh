#pragma once

// Softmaxes over a part of a row's keys (split softmax): how two become one, and what they come to.

#include <cuda_runtime.h>

#include "attention_layout.h"
#include "params.h"

namespace specextend {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The softmax of some keys, of which sum * 2^max is the denominator.
struct alignas(8) PartialSum {
  float max, sum;  // in base 2; -inf and 0 for no keys
};
static_assert(sizeof(PartialSum) == kPartialSumBytes);

__device__ __forceinline__ PartialSum no_keys() { return {-INFINITY, 0.f}; }

// Returns the softmax of both sets of keys together: the sum with the smaller maximum is rescaled.
// Either set may be empty.
__device__ __forceinline__ PartialSum add_partial_sums(PartialSum a, PartialSum b) {
  const float max = fmaxf(a.max, b.max);
  if (max == -INFINITY) return no_keys();
  return {max, a.sum * exp2f(a.max - max) + b.sum * exp2f(b.max - max)};
}

// Returns the log-sum-exp in natural logarithms, -inf for no keys.
__device__ __forceinline__ float natural_lse(PartialSum s) {
  return s.max == -INFINITY ? -INFINITY : (s.max + log2f(s.sum)) * kLn2;
}

// Returns what a weighted sum of values is multiplied with to become an output: one over the
// denominator of the softmax, in which the sink takes part with no value, or 0 for a row that sees
// no key.
__device__ __forceinline__ float output_scale(const TreeAttentionParams& p, PartialSum s,
                                              int head) {
  if (s.max == -INFINITY) return 0.f;
  const float sink = p.sinks ? exp2f(p.sinks[head] * kLog2E - s.max) : 0.f;
  return 1.f / (s.sum + sink);
}

// Returns the softmax of the logits [begin, end), which are in base 2.
__device__ __forceinline__ PartialSum sum_logits(const float* logits, int begin, int end) {
  PartialSum total = no_keys();
  for (int i = begin; i < end; ++i) total.max = fmaxf(total.max, logits[i]);
  if (total.max == -INFINITY) return total;
  for (int i = begin; i < end; ++i) total.sum += exp2f(logits[i] - total.max);
  return total;
}

}  // namespace specextend
