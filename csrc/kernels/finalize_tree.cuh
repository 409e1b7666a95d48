#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/block.cuh"
#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"
#include "kernels/select.cuh"
#include "order.h"
#include "params.h"
#include "tree.h"
#include "workspace.h"

namespace specextend {

constexpr int kFinalizeThreads = 1024;

struct FinalizeShared {
  uint32_t bins[kSelectBins];
  uint64_t counts[kMaxWarps];
};

// One block of threads per sequence. What it works on is in shared memory behind the struct, or in
// `scratch` if that is too small.
__global__ void __launch_bounds__(kFinalizeThreads)
    finalize_tree_kernel(const __grid_constant__ FinalizeTreeParams p,
                         FinalizeTreeScratch scratch) {
  FinalizeShared& shared = *reinterpret_cast<FinalizeShared*>(ptx::shared_memory());
  const int64_t b = blockIdx.x;
  const int size = p.num_candidates, num_slots = 1 + p.num_nodes, words = mask_words(num_slots);
  unsigned char* const memory = scratch.candidates == nullptr
                                    ? ptx::shared_memory() + sizeof(FinalizeShared)
                                    : scratch.candidates + b * size * kFinalizeCandidateBytes;
  uint64_t* const ranks = reinterpret_cast<uint64_t*>(memory);
  uint32_t* const logps = reinterpret_cast<uint32_t*>(ranks + size);  // as descending bits
  int32_t* const parents = reinterpret_cast<int32_t*>(logps + size);  // -1: the root
  for (int i = int(threadIdx.x); i < size; i += int(blockDim.x)) {
    const float logp = p.logp[b * size + i];
    const int32_t parent = p.parents[b * size + i];
    logps[i] = descending_bits(logp == logp ? logp : -INFINITY);
    parents[i] = parent >= 0 && parent < i ? parent : -1;
  }
  __syncthreads();

  // A candidate's rank: the least log probability on its path, then its depth. A child is never
  // better than its parent, so the best n are closed under taking ancestors.
  for (int i = int(threadIdx.x); i < size; i += int(blockDim.x)) {
    uint32_t bound = logps[i], depth = 1;
    for (int j = parents[i]; j >= 0; j = parents[j]) {
      bound = logps[j] > bound ? logps[j] : bound;
      ++depth;
    }
    ranks[i] = uint64_t(bound) << 32 | depth;
  }
  __syncthreads();

  int32_t* const nodes = p.nodes + b * p.num_nodes;
  int32_t* const tree_parents = p.tree_parents + b * num_slots;
  int32_t* const depths = p.depths + b * num_slots;
  int32_t* const slots = reinterpret_cast<int32_t*>(logps);  // of chosen candidates
  if (p.num_nodes > 0) {
    const auto t = select_threshold<uint64_t>([&](int64_t i) { return ranks[i]; }, size,
                                              p.num_nodes, shared.bins);
    // Each thread looks at neighbours, so that nodes come out ascending. Ranks below the threshold
    // are counted in the upper half, those equal to it in the lower.
    const int span = (size - 1) / int(blockDim.x) + 1;
    const int64_t first = int64_t(threadIdx.x) * span;
    const int64_t end = first + span < size ? first + span : size;
    uint64_t own = 0;
    for (int64_t i = first; i < end; ++i) {
      own += ranks[i] < t.key ? uint64_t(1) << 32 : ranks[i] == t.key;
    }
    const uint64_t before = block_sum_before(own, shared.counts);
    uint32_t equal = uint32_t(before);
    uint32_t slot = uint32_t(before >> 32) + (equal < t.num_equal ? equal : t.num_equal);
    for (int64_t i = first; i < end; ++i) {
      if (ranks[i] < t.key || (ranks[i] == t.key && equal++ < t.num_equal)) {
        nodes[slot++] = int32_t(i);
        slots[i] = int32_t(slot);  // the root is slot 0
      }
    }
    __syncthreads();
  }

  for (int slot = int(threadIdx.x); slot < num_slots; slot += int(blockDim.x)) {
    const int node = slot > 0 ? nodes[slot - 1] : -1;
    const int parent = node >= 0 ? parents[node] : -1;
    tree_parents[slot] = parent >= 0 ? slots[parent] : node >= 0 ? 0 : -1;
    depths[slot] = node >= 0 ? int32_t(uint32_t(ranks[node])) : 0;
  }
  __syncthreads();
  // Ancestors have lower slots: a path up fills a row from its last word to its first.
  for (int slot = int(threadIdx.x); slot < num_slots; slot += int(blockDim.x)) {
    uint64_t* const row = p.mask + (b * num_slots + slot) * words;
    int node = slot;
    for (int w = words - 1; w >= 0; --w) {
      uint64_t word = 0;
      for (; node >= 64 * w; node = tree_parents[node]) word |= uint64_t(1) << (node % 64);
      row[w] = word;
    }
  }
}

}  // namespace specextend
