#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"
#include "order.h"
#include "params.h"

namespace specextend {

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kSelectDigits = 4;  // of a key, the highest first
constexpr int kSelectBins = 256;
constexpr int kBinsPerLane = kSelectBins / 32;

struct SelectShared {
  uint32_t bins[kSelectDigits][kSelectBins];
  uint64_t warp_counts[kSelectWarps];
};

// What is chosen among keys: all below `key`, and of those equal to it the first `num_equal`.
struct SelectThreshold {
  uint32_t key;
  uint32_t num_equal;
};

// The wanted-th smallest of the scores' keys (order.h), digit by digit: a histogram of the keys
// that begin like it. Every warp adds the histogram up for itself. By all threads; 0 < wanted <= n.
__device__ __forceinline__ SelectThreshold select_threshold(const float* scores, int n, int wanted,
                                                            SelectShared& shared) {
  for (int i = int(threadIdx.x); i < kSelectDigits * kSelectBins; i += kSelectThreads) {
    shared.bins[i / kSelectBins][i % kSelectBins] = 0;
  }
  __syncthreads();
  const unsigned lane = threadIdx.x % 32;
  SelectThreshold t{0, uint32_t(wanted)};
  uint32_t known = 0;  // bits of t.key that are
  for (int digit = 0; digit < kSelectDigits; ++digit) {
    const int shift = 8 * (kSelectDigits - 1 - digit);
    uint32_t* const bins = shared.bins[digit];
#pragma unroll 4
    for (int i = int(threadIdx.x); i < n; i += kSelectThreads) {
      const uint32_t key = descending_bits(__ldg(scores + i));
      if ((key & known) == t.key) atomicAdd(&bins[key >> shift & (kSelectBins - 1)], 1u);
    }
    __syncthreads();

    uint32_t count[kBinsPerLane], sum = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerLane; ++i) {
      count[i] = bins[lane * kBinsPerLane + i];
      sum += count[i];
    }
    uint32_t upto = sum;  // with those of lower lanes
#pragma unroll
    for (unsigned step = 1; step < 32; step *= 2) {
      const uint32_t lower = __shfl_up_sync(0xffffffffu, upto, step);
      if (lane >= step) upto += lower;
    }
    const int owner = __ffs(int(__ballot_sync(0xffffffffu, upto >= t.num_equal))) - 1;
    uint32_t below = upto - sum, bin = lane * kBinsPerLane;
    bool found = false;
#pragma unroll
    for (int i = 0; i < kBinsPerLane; ++i) {
      found = found || below + count[i] >= t.num_equal;
      below += found ? 0 : count[i];
      bin += found ? 0 : 1;
    }
    t.key |= __shfl_sync(0xffffffffu, bin, owner) << shift;
    t.num_equal -= __shfl_sync(0xffffffffu, below, owner);
    known |= uint32_t(kSelectBins - 1) << shift;
  }
  return t;
}

// The sum of `count` over the threads before this one. By all threads.
__device__ __forceinline__ uint64_t sum_before(uint64_t count, SelectShared& shared) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t upto = count;
#pragma unroll
  for (unsigned step = 1; step < 32; step *= 2) {
    const uint64_t lower = __shfl_up_sync(0xffffffffu, upto, step);
    if (lane >= step) upto += lower;
  }
  if (lane == 31) shared.warp_counts[warp] = upto;
  __syncthreads();
  uint64_t before = upto - count;
  for (unsigned i = 0; i < warp; ++i) before += shared.warp_counts[i];
  return before;
}

// One block per sequence. Scores are read from global memory each time: after the first, from L1.
__global__ void __launch_bounds__(kSelectThreads)
    select_chunks_kernel(const __grid_constant__ SelectChunksParams p) {
  SelectShared& shared = *reinterpret_cast<SelectShared*>(ptx::shared_memory());
  const int64_t b = blockIdx.x;
  int32_t* const ids = p.ids + b * p.budget;

  const int len = max(p.lens[b], 0);
  const int begun = len % p.chunk_size != 0 ? 1 : 0;
  const int valid = min(len / p.chunk_size + begun, p.num_chunks);
  const int count = min(valid, p.budget);
  const int recent = min(p.num_recent, count);
  const int sinks = min(p.num_sinks, count - recent);
  const int free = count - sinks - recent, candidates = valid - sinks - recent;
  const bool all = free == candidates;

  if (threadIdx.x == 0) p.counts[b] = count;
  for (int i = int(threadIdx.x); i < p.budget; i += kSelectThreads) {
    const int from_end = count - i;
    if (i < sinks || (all && i < count)) {
      ids[i] = i;
    } else if (from_end <= recent) {
      ids[i] = from_end > 0 ? valid - from_end : -1;
    }
  }
  if (all || free == 0) return;

  const float* const scores = p.scores + b * p.num_chunks + sinks;
  const SelectThreshold t = select_threshold(scores, candidates, free, shared);
  // Each thread looks at neighbours, so that ids come out ascending. Keys below the threshold are
  // counted in the upper half, those equal to it in the lower.
  const int span = (candidates - 1) / kSelectThreads + 1;
  const int64_t first = int64_t(threadIdx.x) * span;
  const int end = int(min(first + span, int64_t(candidates)));
  uint64_t own = 0;
  for (int i = int(min(first, int64_t(end))); i < end; ++i) {
    const uint32_t key = descending_bits(__ldg(scores + i));
    own += key < t.key ? uint64_t(1) << 32 : key == t.key;
  }
  const uint64_t before = sum_before(own, shared);
  uint32_t equal = uint32_t(before);
  int32_t* to = ids + sinks + uint32_t(before >> 32) + min(equal, t.num_equal);
  for (int i = int(min(first, int64_t(end))); i < end; ++i) {
    const uint32_t key = descending_bits(__ldg(scores + i));
    if (key < t.key || (key == t.key && equal++ < t.num_equal)) *to++ = sinks + i;
  }
}

}  // namespace specextend
