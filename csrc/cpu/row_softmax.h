#pragma once

#include <algorithm>
#include <cstdint>

#include "vocab.h"

namespace specextend::cpu {

// Turns the blocks' values into their cumulative sums by runs, and returns the last.
inline double accumulate(double* values, int64_t n) {
  double total = 0.;
  for (int64_t begin = 0; begin < n; begin += kVocabRun) {
    const int64_t end = std::min(begin + kVocabRun, n);
    double sum = 0.;
    for (int64_t i = begin; i < end; ++i) {
      sum += values[i];
      values[i] = total + sum;
    }
    total += sum;
  }
  return total;
}

// Does the same for the sums of row_stats, in units of exp(max), and returns the denominator of the
// row's softmax. max is finite.
inline double accumulate_blocks(const float* refs, double* sums, int64_t num_blocks, float max) {
  for (int64_t b = 0; b < num_blocks; ++b) sums[b] *= block_scale(refs[b], max);
  return accumulate(sums, num_blocks);
}

// Returns the first block whose cumulative sum exceeds the threshold of a draw.
inline int64_t block_above(const double* cumulative, int64_t num_blocks, double threshold) {
  return std::upper_bound(cumulative, cumulative + num_blocks, threshold) - cumulative;
}

// Returns the first of n values whose cumulative sum by runs, from `base` on, exceeds the
// threshold; where rounding lets none, the last above 0.
inline int first_above(const double* values, int n, double base, double threshold) {
  int last = 0;
  for (int begin = 0; begin < n; begin += kVocabRun) {
    double sum = 0.;
    for (int i = begin; i < std::min(begin + kVocabRun, n); ++i) {
      if (!(values[i] > 0.)) continue;
      last = i;
      sum += values[i];
      if (base + sum > threshold) return i;
    }
    base += sum;
  }
  return last;
}

}  // namespace specextend::cpu
