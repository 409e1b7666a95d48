#pragma once

#include <algorithm>
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

// The first block whose cumulative sum exceeds the threshold; where none does, because the
// threshold is the whole sum, the last block that adds to it.
inline int64_t block_above(const double* cumulative, int64_t num_blocks, double threshold) {
  const double* end = cumulative + num_blocks;
  const double* above = std::upper_bound(cumulative, end, threshold);
  if (above == end) above = std::lower_bound(cumulative, end, end[-1]);
  return above - cumulative;
}

}  // namespace specextend::cpu
