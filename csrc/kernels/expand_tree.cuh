#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/block.cuh"
#include "kernels/grid.cuh"
#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"
#include "kernels/select.cuh"
#include "kernels/vocab.cuh"
#include "order.h"
#include "params.h"
#include "workspace.h"

namespace specextend {

// Three launches: every 16 threads summarise a block of a row; one block of threads per row takes
// its best elements; one per sequence takes the best of all rows.

constexpr int kExpandThreads = 512;

template <typename T>
__device__ __forceinline__ const T* logits_row(const ExpandTreeParams& p, int b, int f) {
  return static_cast<const T*>(p.logits) + b * p.stride_b + f * p.stride_f;
}

__device__ __forceinline__ float without_nan(float x) { return x != x ? -INFINITY : x; }

// Finds the largest element and the sum of exponentials of every block, and the best key of each of
// its lanes. Grid: blocks of a row, frontier nodes, sequences.
template <typename T>
__global__ void __launch_bounds__(kVocabThreads)
    expand_blocks_kernel(const __grid_constant__ ExpandTreeParams p,
                         const __grid_constant__ ExpandTreeScratch scratch) {
  const int64_t num_blocks = num_vocab_blocks(p.vocab);
  const int64_t block = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kVocabLanes;
  const int size = vocab_block_size(block, p.vocab);
  for (int b = int(blockIdx.z); b < p.batch; b += int(gridDim.z)) {
    for (int f = int(blockIdx.y); f < p.frontier; f += int(gridDim.y)) {
      float x[kVocabLaneElements];
      load_lane(logits_row<T>(p, b, f), block, size, x);
      float best = -INFINITY;
      int at = 0;
#pragma unroll
      for (int i = 0; i < kVocabLaneElements; ++i) {
        at = x[i] > best ? i : at;
        best = x[i] > best ? x[i] : best;
      }
      const float ref = reduce_lanes(best, [](float a, float b) { return a > b ? a : b; });
      const double sum = exp_sum(x, ref);
      if (block >= num_blocks) continue;
      const int64_t row = int64_t(b) * p.frontier + f, place = row * num_blocks + block;
      const int64_t index = block * kVocabBlock + at * kVocabLanes + vocab_lane();
      scratch.lane_keys[place * kVocabLanes + vocab_lane()] =
          vocab_lane() < size ? rank_key(best, uint32_t(index)) : ~uint64_t(0);
      if (vocab_lane() == 0) {
        scratch.refs[place] = ref;
        scratch.sums[row * run_place(num_blocks) + run_place(block)] = sum;
      }
    }
  }
}

struct ExpandShared {
  uint32_t bins[kSelectBins];
  double log_first;
  int64_t counts[kMaxWarps];
  float refs[kMaxWarps];
  uint32_t num_keys;
};

// Returns where keys are, behind the struct, unless they are in global memory.
__device__ __forceinline__ uint64_t* shared_keys() {
  return reinterpret_cast<uint64_t*>(ptx::shared_memory() + sizeof(ExpandShared));
}

// Returns the log of the softmax at the row's largest logit. Logits of +inf share all the
// probability.
template <typename T>
__device__ __forceinline__ double log_of_first(const ExpandTreeParams& p, const T* logits,
                                               const float* refs, double* sums, float max,
                                               ExpandShared& shared) {
  if (max == -INFINITY) return -INFINITY;
  if (max == INFINITY) {
    int64_t count = 0;
    for (int64_t i = threadIdx.x; i < p.vocab; i += blockDim.x) {
      count += float(logits[i]) == INFINITY;
    }
    count = block_reduce(count, shared.counts, [](int64_t a, int64_t b) { return a + b; });
    return -log(double(count));
  }
  const int64_t num_blocks = num_vocab_blocks(p.vocab);
  for (int64_t i = threadIdx.x; i < num_blocks; i += blockDim.x) {
    sums[run_place(i)] *= block_scale(refs[i], max);
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const double total = cumulative_total(sums, num_blocks);
    if (threadIdx.x == 0) shared.log_first = -log(total);
  }
  __syncthreads();
  return shared.log_first;
}

// Writes the top_k elements of every row, with the log of their probabilities. Grid: nodes,
// sequences.
template <typename T>
__global__ void __launch_bounds__(kExpandThreads)
    expand_rows_kernel(const __grid_constant__ ExpandTreeParams p,
                       const __grid_constant__ ExpandTreeScratch scratch) {
  ExpandShared& shared = *reinterpret_cast<ExpandShared*>(ptx::shared_memory());
  const int64_t num_blocks = num_vocab_blocks(p.vocab);
  const int64_t num_lanes = num_blocks * kVocabLanes;
  const int f = int(blockIdx.x);
  for (int b = int(blockIdx.y); b < p.batch; b += int(gridDim.y)) {
    const int64_t row = int64_t(b) * p.frontier + f;
    const T* const logits = logits_row<T>(p, b, f);
    const float* const refs = scratch.refs + row * num_blocks;
    const uint64_t* const lane_keys = scratch.lane_keys + row * num_lanes;
    uint64_t* const keys =
        scratch.candidates == nullptr
            ? shared_keys()
            : scratch.candidates + row * sort_capacity(expand_candidates(p.vocab, p.top_k));

    float max = -INFINITY;
    for (int64_t i = threadIdx.x; i < num_blocks; i += blockDim.x) max = max_or_nan(max, refs[i]);
    if (threadIdx.x == 0) shared.num_keys = 0;
    max = block_reduce(max, shared.refs, max_or_nan);
    const double log_first =
        log_of_first(p, logits, refs, scratch.sums + row * run_place(num_blocks), max, shared);

    // The top_k lanes are chosen, and of their elements all that are not worse than the worst of
    // these lanes.
    uint64_t last = ~uint64_t(0);
    if (p.top_k < num_lanes) {
      last = select_threshold<uint64_t>([&](int64_t i) { return lane_keys[i]; }, num_lanes, p.top_k,
                                        shared.bins)
                 .key;
    }
    const int64_t warp_first = int64_t(threadIdx.x / 32) * 32;
    for (int64_t first = warp_first; first < num_lanes; first += blockDim.x) {
      const int64_t own = first + threadIdx.x % 32;
      unsigned chosen = __ballot_sync(kWholeWarp, own < num_lanes && lane_keys[own] <= last);
      for (; chosen != 0; chosen &= chosen - 1) {
        const int64_t lane = first + __ffs(int(chosen)) - 1;
        const int64_t element = lane / kVocabLanes * kVocabBlock + lane % kVocabLanes +
                                int64_t(threadIdx.x % 32) * kVocabLanes;
        uint64_t key = ~uint64_t(0);
        if (element < p.vocab)
          key = rank_key(without_nan(float(logits[element])), uint32_t(element));
        append_key(element < p.vocab && key <= last, key, keys, &shared.num_keys);
      }
    }
    __syncthreads();
    sort_keys(keys, shared.num_keys);

    const double logp = double(p.beam_logp[row]);
    for (int i = int(threadIdx.x); i < p.top_k; i += int(blockDim.x)) {
      const uint64_t key = keys[i];
      const float value = rank_value(key);
      const double below = value == max ? 0. : double(value) - double(max);
      const double sum = logp + (below + log_first);
      p.cand_tokens[row * p.top_k + i] = rank_index(key);
      p.cand_logp[row * p.top_k + i] = sum != sum ? -INFINITY : float(sum);
    }
    __syncthreads();
  }
}

// Writes the best `width` candidates of every sequence. Grid: sequences.
__global__ void __launch_bounds__(kExpandThreads)
    expand_beam_kernel(const __grid_constant__ ExpandTreeParams p,
                       const __grid_constant__ ExpandTreeScratch scratch) {
  ExpandShared& shared = *reinterpret_cast<ExpandShared*>(ptx::shared_memory());
  const int64_t b = blockIdx.x, num_candidates = int64_t(p.frontier) * p.top_k;
  const float* const logp = p.cand_logp + b * num_candidates;
  uint64_t* const keys =
      scratch.beam == nullptr ? shared_keys() : scratch.beam + b * sort_capacity(p.width);
  const auto key_of = [&](int64_t i) { return rank_key(logp[i], uint32_t(i)); };

  if (threadIdx.x == 0) shared.num_keys = 0;
  const uint64_t last =
      select_threshold<uint64_t>(key_of, num_candidates, p.width, shared.bins).key;
  for (int64_t first = 0; first < num_candidates; first += blockDim.x) {
    const int64_t i = first + threadIdx.x;
    const uint64_t key = i < num_candidates ? key_of(i) : 0;
    append_key(i < num_candidates && key <= last, key, keys, &shared.num_keys);
  }
  __syncthreads();
  sort_keys(keys, uint32_t(p.width));
  for (int i = int(threadIdx.x); i < p.width; i += int(blockDim.x)) {
    const uint32_t best = rank_index(keys[i]);
    p.beam[b * p.width + i] = int32_t(best);
    p.beam_logp_out[b * p.width + i] = logp[best];
  }
}

inline size_t expand_shared_bytes(const uint64_t* global_keys, int64_t capacity) {
  return sizeof(ExpandShared) + (global_keys == nullptr ? size_t(capacity) * sizeof(uint64_t) : 0);
}

template <typename T>
cudaError_t launch_expand_tree(const ExpandTreeParams& p, const ExpandTreeScratch& scratch,
                               cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  const int64_t num_lanes = num_vocab_blocks(p.vocab) * kVocabLanes;
  const unsigned threads = block_threads(num_lanes, kVocabThreads);
  const dim3 blocks(unsigned((num_lanes + threads - 1) / threads), grid_z(p.frontier),
                    grid_z(p.batch));
  cudaError_t error = launch(expand_blocks_kernel<T>, blocks, threads, 0, stream, p, scratch);
  if (error != cudaSuccess) return error;
  const int64_t row_keys = sort_capacity(expand_candidates(p.vocab, p.top_k));
  error = launch(expand_rows_kernel<T>, dim3(unsigned(p.frontier), grid_z(p.batch)),
                 block_threads(num_lanes, kExpandThreads),
                 expand_shared_bytes(scratch.candidates, row_keys), stream, p, scratch);
  if (error != cudaSuccess) return error;
  return launch(expand_beam_kernel, unsigned(p.batch),
                block_threads(int64_t(p.frontier) * p.top_k, kExpandThreads),
                expand_shared_bytes(scratch.beam, sort_capacity(p.width)), stream, p, scratch);
}

}  // namespace specextend
