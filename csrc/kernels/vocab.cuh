#pragma once

// Rows of logits, on a GPU, as vocab.h defines their sums.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/block.cuh"
#include "vocab.h"

namespace specextend {

constexpr int kVocabThreads = 256;  // a block of threads that looks at blocks of a row has so many

// --- a block of a row by 16 threads, a lane each; half a warp ---

__device__ __forceinline__ int vocab_lane() { return int(threadIdx.x % kVocabLanes); }

// Returns the number of elements of a block of the row; there is none behind its end.
__device__ __forceinline__ int vocab_block_size(int64_t block, int64_t vocab) {
  const int64_t left = vocab - block * kVocabBlock;
  return int(left < 0 ? 0 : left < kVocabBlock ? left : kVocabBlock);
}

// Loads the lane's elements; -inf where there is none.
template <typename T>
__device__ __forceinline__ void load_lane(const T* row, int64_t block, int size,
                                          float (&x)[kVocabLaneElements]) {
  const T* const from = row + block * kVocabBlock + vocab_lane();
#pragma unroll
  for (int i = 0; i < kVocabLaneElements; ++i) {
    x[i] = i * kVocabLanes + vocab_lane() < size ? float(from[i * kVocabLanes]) : -INFINITY;
  }
}

__device__ __forceinline__ float max_or_nan(float a, float b) {
  return a != a || b < a ? a : b;  // b if it is NaN
}

// Returns op over all lanes, to all lanes.
template <typename T, typename Op>
__device__ __forceinline__ T reduce_lanes(T x, Op op) {
#pragma unroll
  for (int step = kVocabLanes / 2; step > 0; step /= 2) {
    x = op(x, __shfl_xor_sync(kWholeWarp, x, step));
  }
  return x;
}

// Returns the sum of the lanes, folded as vocab.h says: either half adds the same two numbers.
__device__ __forceinline__ double fold_lanes(double sum) {
  return reduce_lanes(sum, [](double a, double b) { return a + b; });
}

// Returns the sum of exp(x - ref) over the block, in which NaN counts 0.
__device__ __forceinline__ double exp_sum(const float (&x)[kVocabLaneElements], float ref) {
  double sum = 0.;
#pragma unroll
  for (int i = 0; i < kVocabLaneElements; ++i) sum += double(exp_nonpositive(x[i] - ref));
  return fold_lanes(sum);
}

// --- cumulative sums by runs, by one warp; value i is at values[run_place(i)] ---

__device__ __forceinline__ double run_sum(const double* values, int64_t first, int64_t n) {
  double sum = 0.;
#pragma unroll
  for (int i = 0; i < kVocabRun; ++i) {
    if (first + i < n) sum += values[run_place(first) + i];
  }
  return sum;
}

__device__ __forceinline__ double cumulative_total(const double* values, int64_t n) {
  double total = 0.;
  for (int64_t begin = 0; begin < n; begin += 32 * kVocabRun) {
    const double sum = run_sum(values, begin + int64_t(threadIdx.x % 32) * kVocabRun, n);
#pragma unroll
    for (int i = 0; i < 32; ++i) total += __shfl_sync(kWholeWarp, sum, i);
  }
  return total;
}

// Names a value of a sequence, and the cumulative sum before it.
struct CumulativePlace {
  int64_t index;
  double before;
};

// Finds the first value whose cumulative sum, from `base` on, exceeds the threshold; index -1:
// none.
__device__ __forceinline__ CumulativePlace first_above(const double* values, int64_t n, double base,
                                                       double threshold) {
  const int lane = int(threadIdx.x % 32);
  for (int64_t begin = 0; begin < n; begin += 32 * kVocabRun) {
    const int64_t first = begin + lane * kVocabRun;
    const double sum = run_sum(values, first, n);
    double before = base;  // the lane's run
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const double other = __shfl_sync(kWholeWarp, sum, i);
      if (i < lane) before += other;
      base += other;
    }
    int at = 0;
    double inside = 0.;  // the sum of the run's first `at` values
    bool found = false;
    for (; at < kVocabRun && first + at < n; ++at) {
      const double next = inside + values[run_place(first) + at];
      found = before + next > threshold;
      if (found) break;
      inside = next;
    }
    const unsigned finders = __ballot_sync(kWholeWarp, found);
    if (finders != 0) {
      const int finder = __ffs(int(finders)) - 1;
      return {__shfl_sync(kWholeWarp, first + at, finder),
              __shfl_sync(kWholeWarp, before + inside, finder)};
    }
  }
  return {-1, base};
}

// --- draws, by all threads of a block ---

__device__ __forceinline__ double uniform_at(const void* uniforms, bool are_double, int64_t i) {
  return are_double ? static_cast<const double*>(uniforms)[i]
                    : double(static_cast<const float*>(uniforms)[i]);
}

struct DrawShared {
  double values[kVocabBlock + kVocabBlock / kVocabRun];  // of the block drawn from
  CumulativePlace block;
  double threshold;
};

// Draws a token (inverse CDF): the first whose cumulative sum exceeds u of the total, -1 where that
// is undefined. Block b of the row sums to sums[run_place(b)], and value_of(b, j) is its element j.
// Thread 0 gets the token.
template <typename ValueOf>
__device__ __forceinline__ int64_t draw_token(const double* sums, int64_t vocab, double u,
                                              ValueOf value_of, DrawShared& shared) {
  const int64_t num_blocks = num_vocab_blocks(vocab);
  __syncthreads();
  if (threadIdx.x < 32) {
    const double total = cumulative_total(sums, num_blocks);
    CumulativePlace place{-1, 0.};
    double threshold = 0.;
    if (total > 0. && total < INFINITY && u == u) {
      threshold = draw_threshold(u, total);
      place = first_above(sums, num_blocks, 0., threshold);
    }
    if (threadIdx.x == 0) {
      shared.block = place;
      shared.threshold = threshold;
    }
  }
  __syncthreads();
  const CumulativePlace block = shared.block;
  if (block.index < 0) return -1;
  const int size = vocab_block_size(block.index, vocab);
  for (int j = int(threadIdx.x); j < size; j += int(blockDim.x)) {
    shared.values[run_place(j)] = value_of(block.index, j);
  }
  __syncthreads();
  if (threadIdx.x >= 32) return -1;
  int64_t element = first_above(shared.values, size, block.before, shared.threshold).index;
  if (element < 0) {  // rounding: the last above 0
    int last = -1;
    for (int j = int(threadIdx.x); j < size; j += 32) {
      if (shared.values[run_place(j)] > 0.) last = j;
    }
    element = __reduce_max_sync(kWholeWarp, last);
  }
  return block.index * kVocabBlock + element;
}

}  // namespace specextend
