#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/block.cuh"
#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"
#include "kernels/verify_tree.cuh"
#include "kernels/vocab.cuh"
#include "params.h"
#include "workspace.h"

namespace specextend {

constexpr int kRejectionThreads = 1024;

struct RejectionShared {
  DrawShared draw;
  double total;
  int64_t last_token;
};

// The first child of `node` from index `from` on; num_nodes: none. By whole warps.
__device__ __forceinline__ int next_child(const int32_t* parents, int num_nodes, int node,
                                          int from) {
  for (int first = from; first < num_nodes; first += 32) {
    const int i = first + int(threadIdx.x % 32);
    const unsigned children = __ballot_sync(kWholeWarp, i < num_nodes && parents[i] == node);
    if (children != 0) return first + __ffs(int(children)) - 1;
  }
  return num_nodes;
}

// sums of the blocks of weight_of(0), weight_of(1), ...; by all threads, which then have to meet.
template <typename WeightOf>
__device__ __forceinline__ void sum_blocks(WeightOf weight_of, int64_t vocab, double* sums) {
  const int64_t num_blocks = num_vocab_blocks(vocab), step = blockDim.x / kVocabLanes;
  const int64_t warp_first = threadIdx.x / 32 * 2;
  for (int64_t first = warp_first; first < num_blocks; first += step) {
    const int64_t block = first + threadIdx.x / kVocabLanes % 2;
    const int size = vocab_block_size(block, vocab);
    double sum = 0.;
#pragma unroll 8
    for (int i = 0; i < kVocabLaneElements; ++i) {
      const int j = i * kVocabLanes + vocab_lane();
      if (j < size) sum += double(weight_of(block * kVocabBlock + j));
    }
    sum = fold_lanes(sum);
    if (block < num_blocks && vocab_lane() == 0) sums[run_place(block)] = sum;
  }
}

// One block of threads per sequence. Every thread follows the walk, all looking at the same
// numbers; what a rejection leaves of the law is computed by all together.
__global__ void __launch_bounds__(kRejectionThreads)
    verify_tree_rejection_kernel(const __grid_constant__ VerifyTreeRejectionParams p,
                                 const __grid_constant__ VerifyTreeRejectionScratch scratch) {
  RejectionShared& shared = *reinterpret_cast<RejectionShared*>(ptx::shared_memory());
  const VerifyTreeParams& tree = p.tree;
  const int64_t b = blockIdx.x, offset = b * tree.num_nodes;
  const int64_t num_blocks = num_vocab_blocks(p.vocab);
  const int64_t* const tokens = tree.tokens + offset;
  const int32_t* const parents = tree.parents + offset;
  float* const rests = scratch.rest + b * 2 * p.vocab;
  double* const sums = scratch.sums + b * run_place(num_blocks);

  int node = 0, length = 1;
  if (threadIdx.x == 0) tree.path[offset] = 0;
  // The target's law at the node, or what is left of it: weights / total.
  const float* weights;
  bool summed;  // `sums` are those of the weights
  while (true) {
    weights = p.target_probs + b * p.target_stride_b + node * p.target_stride_n;
    summed = false;
    double total = 1.;  // probabilities are taken as they are given
    const float* const draft = p.draft_probs + b * p.draft_stride_b + node * p.draft_stride_n;
    int child = next_child(parents, tree.num_nodes, node, 1);
    for (; child < tree.num_nodes; child = next_child(parents, tree.num_nodes, node, child + 1)) {
      const int64_t token = tokens[child];
      // What the draft cannot have drawn is no trial.
      if (token < 0 || token >= p.vocab || !(draft[token] > 0.f)) continue;
      const double u = uniform_at(p.uniforms, p.uniforms_are_double, offset + child);
      if (u * double(draft[token]) < double(weights[token]) / total) break;

      float* const rest = weights == rests ? rests + p.vocab : rests;
      const double scale = 1. / total;
      const auto subtract = [&](int64_t i) {
        const float x = float(rounded_product(double(weights[i]), scale) - double(draft[i]));
        return rest[i] = x < 0.f ? 0.f : x;  // NaN stays
      };
      sum_blocks(subtract, p.vocab, sums);
      __syncthreads();
      if (threadIdx.x < 32) {
        const double sum = cumulative_total(sums, num_blocks);
        if (threadIdx.x == 0) shared.total = sum;
      }
      __syncthreads();
      // Where the draft's law is the target's up to rounding nothing is left, and any token will
      // do: a rejection has the probability of that rounding.
      summed = shared.total != 0.;
      if (summed) {
        weights = rest;
        total = shared.total;
      }
    }
    if (child == tree.num_nodes) break;
    if (threadIdx.x == 0) tree.path[offset + length] = child;
    ++length;
    node = child;
    __syncthreads();  // nobody reads the rests of the node before
  }

  if (!summed) sum_blocks([&](int64_t i) { return weights[i]; }, p.vocab, sums);
  const auto value_of = [&](int64_t block, int j) {
    const float weight = weights[block * kVocabBlock + j];
    return weight > 0.f ? double(weight) : 0.;
  };
  const double u = uniform_at(p.final_uniforms, p.uniforms_are_double, offset + node);
  const int64_t token = draw_token(sums, p.vocab, u, value_of, shared.draw);
  if (threadIdx.x == 0) shared.last_token = token;
  __syncthreads();
  write_walk(tree, b, length, shared.last_token);
}

}  // namespace specextend
