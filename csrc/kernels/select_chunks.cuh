#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/block.cuh"
#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"
#include "kernels/select.cuh"
#include "order.h"
#include "params.h"

namespace specextend {

constexpr int kSelectThreads = 512;

struct SelectShared {
  uint32_t bins[kSelectBins];
  uint64_t counts[kMaxWarps];
};

// One block of threads serves a sequence. Scores are read from global memory each time: after the
// first, from L1.
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
  const auto key_of = [scores](int64_t i) { return descending_bits(__ldg(scores + i)); };
  const auto t = select_threshold<uint32_t>(key_of, candidates, free, shared.bins);
  // Each thread looks at neighbours, so that ids come out ascending. Keys below the threshold are
  // counted in the upper half, those equal to it in the lower.
  const int span = (candidates - 1) / kSelectThreads + 1;
  const int64_t first = int64_t(threadIdx.x) * span;
  const int end = int(min(first + span, int64_t(candidates)));
  uint64_t own = 0;
  for (int i = int(min(first, int64_t(end))); i < end; ++i) {
    const uint32_t key = key_of(i);
    own += key < t.key ? uint64_t(1) << 32 : key == t.key;
  }
  const uint64_t before = block_sum_before(own, shared.counts);
  uint32_t equal = uint32_t(before);
  int32_t* to = ids + sinks + uint32_t(before >> 32) + min(equal, t.num_equal);
  for (int i = int(min(first, int64_t(end))); i < end; ++i) {
    const uint32_t key = key_of(i);
    if (key < t.key || (key == t.key && equal++ < t.num_equal)) *to++ = sinks + i;
  }
}

}  // namespace specextend
