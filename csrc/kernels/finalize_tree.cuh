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

// Says where the block's numbers of each of the T candidates lie: in shared memory behind
// FinalizeShared, or in `scratch` if that is too small.
struct FinalizePool {
  uint64_t* ranks;
  uint32_t* logps;   // as descending bits
  int32_t* parents;  // -1: the root
  int32_t* slots;    // of chosen candidates; these take the place of logps

  __device__ __forceinline__ FinalizePool(const FinalizeTreeParams& p,
                                          const FinalizeTreeScratch& scratch, int64_t b) {
    const int size = p.num_candidates;
    unsigned char* const memory = scratch.candidates == nullptr
                                      ? ptx::shared_memory() + sizeof(FinalizeShared)
                                      : scratch.candidates + b * size * kFinalizeCandidateBytes;
    ranks = reinterpret_cast<uint64_t*>(memory);
    logps = reinterpret_cast<uint32_t*>(ranks + size);
    parents = reinterpret_cast<int32_t*>(logps + size);
    slots = reinterpret_cast<int32_t*>(logps);
  }
};

// Ranks the candidates of a sequence. A candidate's rank is the least log probability on its path,
// then its depth. A child is never better than its parent, so the best n are closed under taking
// ancestors.
__device__ __forceinline__ void rank_candidates(const FinalizeTreeParams& p, int64_t b,
                                                const FinalizePool& pool) {
  const int size = p.num_candidates;
  for (int i = int(threadIdx.x); i < size; i += int(blockDim.x)) {
    const float logp = p.logp[b * size + i];
    const int32_t parent = p.parents[b * size + i];
    pool.logps[i] = descending_bits(logp == logp ? logp : -INFINITY);
    pool.parents[i] = parent >= 0 && parent < i ? parent : -1;
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < size; i += int(blockDim.x)) {
    uint32_t bound = pool.logps[i], depth = 1;
    for (int j = pool.parents[i]; j >= 0; j = pool.parents[j]) {
      bound = pool.logps[j] > bound ? pool.logps[j] : bound;
      ++depth;
    }
    pool.ranks[i] = uint64_t(bound) << 32 | depth;
  }
  __syncthreads();
}

// Chooses the best n candidates, n > 0, as nodes in ascending order.
__device__ __forceinline__ void choose_nodes(const FinalizeTreeParams& p, int64_t b,
                                             const FinalizePool& pool, FinalizeShared& shared) {
  const int size = p.num_candidates;
  int32_t* const nodes = p.nodes + b * p.num_nodes;
  const auto t = select_threshold<uint64_t>([&](int64_t i) { return pool.ranks[i]; }, size,
                                            p.num_nodes, shared.bins);
  // Each thread looks at neighbours, so that nodes come out ascending. Ranks below the threshold
  // are counted in the upper half, those equal to it in the lower.
  const int span = (size - 1) / int(blockDim.x) + 1;
  const int64_t first = int64_t(threadIdx.x) * span;
  const int64_t end = first + span < size ? first + span : size;
  uint64_t own = 0;
  for (int64_t i = first; i < end; ++i) {
    own += pool.ranks[i] < t.key ? uint64_t(1) << 32 : pool.ranks[i] == t.key;
  }
  const uint64_t before = block_sum_before(own, shared.counts);
  uint32_t equal = uint32_t(before);
  uint32_t slot = uint32_t(before >> 32) + (equal < t.num_equal ? equal : t.num_equal);
  for (int64_t i = first; i < end; ++i) {
    if (pool.ranks[i] < t.key || (pool.ranks[i] == t.key && equal++ < t.num_equal)) {
      nodes[slot++] = int32_t(i);
      pool.slots[i] = int32_t(slot);  // the root is slot 0
    }
  }
  __syncthreads();
}

// Writes the parents, depths and masks of the tree's slots.
__device__ __forceinline__ void write_tree(const FinalizeTreeParams& p, int64_t b,
                                           const FinalizePool& pool) {
  const int num_slots = 1 + p.num_nodes, words = mask_words(num_slots);
  const int32_t* const nodes = p.nodes + b * p.num_nodes;
  int32_t* const tree_parents = p.tree_parents + b * num_slots;
  int32_t* const depths = p.depths + b * num_slots;
  for (int slot = int(threadIdx.x); slot < num_slots; slot += int(blockDim.x)) {
    const int node = slot > 0 ? nodes[slot - 1] : -1;
    const int parent = node >= 0 ? pool.parents[node] : -1;
    tree_parents[slot] = parent >= 0 ? pool.slots[parent] : node >= 0 ? 0 : -1;
    depths[slot] = node >= 0 ? int32_t(uint32_t(pool.ranks[node])) : 0;
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

// One block of threads serves a sequence.
__global__ void __launch_bounds__(kFinalizeThreads)
    finalize_tree_kernel(const __grid_constant__ FinalizeTreeParams p,
                         FinalizeTreeScratch scratch) {
  FinalizeShared& shared = *reinterpret_cast<FinalizeShared*>(ptx::shared_memory());
  const int64_t b = blockIdx.x;
  const FinalizePool pool(p, scratch, b);
  rank_candidates(p, b, pool);
  if (p.num_nodes > 0) choose_nodes(p, b, pool, shared);
  write_tree(p, b, pool);
}

}  // namespace specextend
