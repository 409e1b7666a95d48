#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/isa.h"

namespace specextend::cpu {

inline int64_t num_vocab_blocks(int64_t vocab) { return (vocab + kVocabBlock - 1) / kVocabBlock; }

// What a block's sum, in units of exp(ref), counts in units of exp(max).
inline double block_scale(float ref, float max) {
  return ref == max ? 1. : std::exp(double(ref) - double(max));
}

// Turns the sums of row_stats into cumulative sums over the blocks, all in units of exp(max), and
// returns the last: the denominator of the row's softmax. max is finite.
inline double accumulate_blocks(const float* refs, double* sums, int64_t num_blocks, float max) {
  double total = 0.;
  for (int64_t b = 0; b < num_blocks; ++b) {
    total += sums[b] * block_scale(refs[b], max);
    sums[b] = total;
  }
  return total;
}

}  // namespace specextend::cpu
