#pragma once

// Partial attentions over disjoint keys: how two become one, and how the last becomes a row of the
// result.

#include "cpu/isa/attention/item_rows.h"

namespace specextend::cpu {
namespace {
namespace attention {

// Merges a part into (state, out), each rescaled to the larger maximum.
SPECEXTEND_ALWAYS_INLINE void merge_part(SoftmaxState* state, float* out, SoftmaxState part,
                                         const float* part_out, int dim) {
  if (part.sum == 0.f) return;
  if (state->sum == 0.f) {
    *state = part;
    memcpy(out, part_out, size_t(dim) * 4);
    return;
  }
  const float max = part.max > state->max ? part.max : state->max;
  const float a = simd::exp2(state->max - max), b = simd::exp2(part.max - max);
  for (int d = 0; d < dim; d += kLanes)
    store(out + d, fma(load(part_out + d), broadcast(b), load(out + d) * a));
  state->sum = state->sum * a + part.sum * b;
  state->max = max;
}

// Writes a row's LSE and, divided by its sum, its output. A sink adds to that divisor alone.
template <typename T>
void finish_row(const TreeAttentionParams& p, int64_t row, SoftmaxState state, const float* out) {
  const bool empty = state.sum == 0.f;
  const float lse = empty ? -INFINITY : (state.max + log2f(state.sum)) * kLn2;
  p.lse[row] = lse;
  if (!p.out) return;
  T* to = static_cast<T*>(p.out) + row * p.value_dim;
  float factor = empty ? 0.f : 1.f / state.sum;
  if (p.sinks && !empty) factor /= 1.f + expf(p.sinks[row % p.num_heads] - lse);
  for (int d = 0; d < p.value_dim; ++d) from_float(empty ? 0.f : out[d] * factor, to + d);
}

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
