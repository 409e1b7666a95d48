#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/block.cuh"
#include "kernels/grid.cuh"
#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"
#include "kernels/vocab.cuh"
#include "order.h"
#include "params.h"
#include "workspace.h"

namespace specextend {

// Two launches: every 16 threads summarise a block of a row, then one block of threads per row
// takes the token. The summaries are those of vocab.h and ranks, so that the token is the CPU's.

constexpr uint64_t kNanKey = 0;  // it comes before all keys of numbers

template <typename T>
__device__ __forceinline__ const T* logits_row(const SampleNodesParams& p, int b, int node) {
  return static_cast<const T*>(p.logits) + b * p.stride_b + node * p.stride_n;
}

// Finds the key of the largest element of every block. Grid: blocks of a row, nodes, sequences.
template <typename T>
__global__ void __launch_bounds__(kVocabThreads)
    argmax_blocks_kernel(const __grid_constant__ SampleNodesParams p,
                         const __grid_constant__ SampleNodesScratch scratch) {
  const int64_t num_blocks = num_vocab_blocks(p.vocab);
  const int64_t block = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kVocabLanes;
  const int size = vocab_block_size(block, p.vocab);
  for (int b = int(blockIdx.z); b < p.batch; b += int(gridDim.z)) {
    for (int node = int(blockIdx.y); node < p.num_nodes; node += int(gridDim.y)) {
      float x[kVocabLaneElements];
      load_lane(logits_row<T>(p, b, node), block, size, x);
      float best = -INFINITY;
      int at = 0;
      bool nan = false;
#pragma unroll
      for (int i = 0; i < kVocabLaneElements; ++i) {
        nan = nan || x[i] != x[i];
        at = x[i] > best ? i : at;
        best = x[i] > best ? x[i] : best;
      }
      const int64_t index = block * kVocabBlock + at * kVocabLanes + vocab_lane();
      const uint64_t key = reduce_lanes(nan ? kNanKey : rank_key(best, uint32_t(index)),
                                        [](uint64_t a, uint64_t b) { return a < b ? a : b; });
      if (block < num_blocks && vocab_lane() == 0) {
        scratch.keys[(int64_t(b) * p.num_nodes + node) * num_blocks + block] = key;
      }
    }
  }
}

// Finds the best key of every row, a warp per row.
__global__ void __launch_bounds__(kVocabThreads)
    argmax_rows_kernel(const __grid_constant__ SampleNodesParams p,
                       const __grid_constant__ SampleNodesScratch scratch) {
  const int64_t num_blocks = num_vocab_blocks(p.vocab);
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (row >= int64_t(p.batch) * p.num_nodes) return;
  uint64_t best = ~uint64_t(0);
  for (int64_t block = threadIdx.x % 32; block < num_blocks; block += 32) {
    const uint64_t key = scratch.keys[row * num_blocks + block];
    best = key < best ? key : best;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const uint64_t other = __shfl_xor_sync(kWholeWarp, best, step);
    best = other < best ? other : best;
  }
  if (threadIdx.x % 32 == 0) {
    const bool none = best == kNanKey || rank_value(best) == -INFINITY;
    p.tokens[row] = none ? -1 : int64_t(rank_index(best));
  }
}

// Finds the largest element of every block, NaN if it has one, and the sum of its exponentials. The
// grid is that of argmax.
template <typename T>
__global__ void __launch_bounds__(kVocabThreads)
    sum_blocks_kernel(const __grid_constant__ SampleNodesParams p,
                      const __grid_constant__ SampleNodesScratch scratch) {
  const int64_t num_blocks = num_vocab_blocks(p.vocab);
  const int64_t block = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kVocabLanes;
  const int size = vocab_block_size(block, p.vocab);
  for (int b = int(blockIdx.z); b < p.batch; b += int(gridDim.z)) {
    for (int node = int(blockIdx.y); node < p.num_nodes; node += int(gridDim.y)) {
      float x[kVocabLaneElements];
      load_lane(logits_row<T>(p, b, node), block, size, x);
      float ref = -INFINITY;
#pragma unroll
      for (int i = 0; i < kVocabLaneElements; ++i) ref = max_or_nan(ref, x[i]);
      ref = reduce_lanes(ref, max_or_nan);
      const double sum = exp_sum(x, ref);
      if (block < num_blocks && vocab_lane() == 0) {
        const int64_t row = int64_t(b) * p.num_nodes + node;
        scratch.refs[row * num_blocks + block] = ref;
        scratch.sums[row * run_place(num_blocks) + run_place(block)] = sum;
      }
    }
  }
}

struct DrawRowsShared {
  DrawShared draw;
  float refs[kMaxWarps];
};

// Draws the token of every row. Grid: nodes, sequences.
template <typename T>
__global__ void __launch_bounds__(kVocabThreads)
    draw_rows_kernel(const __grid_constant__ SampleNodesParams p,
                     const __grid_constant__ SampleNodesScratch scratch) {
  DrawRowsShared& shared = *reinterpret_cast<DrawRowsShared*>(ptx::shared_memory());
  const int64_t num_blocks = num_vocab_blocks(p.vocab);
  for (int b = int(blockIdx.y); b < p.batch; b += int(gridDim.y)) {
    const int node = int(blockIdx.x);
    const int64_t row = int64_t(b) * p.num_nodes + node;
    const float* const refs = scratch.refs + row * num_blocks;
    double* const sums = scratch.sums + row * run_place(num_blocks);
    float max = -INFINITY;
    for (int64_t i = threadIdx.x; i < num_blocks; i += blockDim.x) max = max_or_nan(max, refs[i]);
    max = block_reduce(max, shared.refs, max_or_nan);
    int64_t token = -1;
    if (max - max == 0.f) {  // else softmax is undefined
      for (int64_t i = threadIdx.x; i < num_blocks; i += blockDim.x) {
        sums[run_place(i)] *= block_scale(refs[i], max);
      }
      const T* const logits = logits_row<T>(p, b, node);
      const auto value_of = [&](int64_t block, int j) {
        const float ref = refs[block];
        const float e = exp_nonpositive(float(logits[block * kVocabBlock + j]) - ref);
        return double(e) * block_scale(ref, max);
      };
      const double u = uniform_at(p.uniforms, p.uniforms_are_double, row);
      token = draw_token(sums, p.vocab, u, value_of, shared.draw);
    }
    if (threadIdx.x == 0) p.tokens[row] = token;
  }
}

template <typename T>
cudaError_t launch_sample_nodes(const SampleNodesParams& p, const SampleNodesScratch& scratch,
                                cudaStream_t stream) {
  if (p.batch == 0 || p.num_nodes == 0) return cudaSuccess;
  const int64_t num_blocks = num_vocab_blocks(p.vocab);
  const unsigned threads = block_threads(num_blocks * kVocabLanes, kVocabThreads);
  const dim3 blocks(unsigned((num_blocks * kVocabLanes + threads - 1) / threads),
                    grid_z(p.num_nodes), grid_z(p.batch));
  if (p.uniforms == nullptr) {
    const cudaError_t error =
        launch(argmax_blocks_kernel<T>, blocks, threads, 0, stream, p, scratch);
    if (error != cudaSuccess) return error;
    const int64_t lanes = int64_t(p.batch) * p.num_nodes * 32;
    const unsigned row_threads = block_threads(lanes, kVocabThreads);
    return launch(argmax_rows_kernel, unsigned((lanes + row_threads - 1) / row_threads),
                  row_threads, 0, stream, p, scratch);
  }
  const cudaError_t error = launch(sum_blocks_kernel<T>, blocks, threads, 0, stream, p, scratch);
  if (error != cudaSuccess) return error;
  return launch(draw_rows_kernel<T>, dim3(unsigned(p.num_nodes), grid_z(p.batch)),
                block_threads(num_blocks, kVocabThreads), sizeof(DrawRowsShared), stream, p,
                scratch);
}

}  // namespace specextend
