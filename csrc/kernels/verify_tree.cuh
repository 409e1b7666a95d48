#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/block.cuh"
#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"
#include "params.h"

namespace specextend {

constexpr int kVerifyThreads = 256;
constexpr int kVerifySharedNodes = 8192;  // so many have their successors in shared memory

// Writes the results of one sequence, whose walk is in its path already: what it emits, and the
// tails. All threads call it.
__device__ __forceinline__ void write_walk(const VerifyTreeParams& p, int64_t b, int length,
                                           int64_t last_token) {
  const int64_t* const tokens = p.tokens + b * p.num_nodes;
  int32_t* const path = p.path + b * p.num_nodes;
  int64_t* const emitted = p.emitted + b * p.num_nodes;
  for (int i = int(threadIdx.x); i < p.num_nodes; i += int(blockDim.x)) {
    emitted[i] = i + 1 < length ? tokens[path[i + 1]] : i + 1 == length ? last_token : -1;
    if (i >= length) path[i] = -1;
  }
  if (threadIdx.x == 0) {
    p.num_accepted[b] = length - 1;
    p.next_root[b] = last_token;
  }
}

struct VerifyShared {
  int length;
};

// One block of threads serves a sequence. All nodes at once find out whether they follow their
// parents, then one thread walks, along successors in shared memory. For trees that are too large
// for it they are in the memory of the results, `emitted`, which are written last.
__global__ void __launch_bounds__(kVerifyThreads)
    verify_tree_kernel(const __grid_constant__ VerifyTreeParams p) {
  VerifyShared& shared = *reinterpret_cast<VerifyShared*>(ptx::shared_memory());
  const int64_t b = blockIdx.x;
  const int64_t* const tokens = p.tokens + b * p.num_nodes;
  const int32_t* const parents = p.parents + b * p.num_nodes;
  const int64_t* const target = p.target_tokens + b * p.num_nodes;
  int32_t* const path = p.path + b * p.num_nodes;
  int* const successors = p.num_nodes <= kVerifySharedNodes
                              ? reinterpret_cast<int*>(ptx::shared_memory() + sizeof(VerifyShared))
                              : reinterpret_cast<int*>(p.emitted + b * p.num_nodes);
  for (int i = int(threadIdx.x); i < p.num_nodes; i += int(blockDim.x)) successors[i] = p.num_nodes;
  __syncthreads();
  // Node 0 is nobody's child, so that the walk meets no node twice, whatever the parents are.
  for (int i = 1 + int(threadIdx.x); i < p.num_nodes; i += int(blockDim.x)) {
    const int parent = parents[i];
    if (parent < 0 || parent >= p.num_nodes) continue;
    const int64_t choice = target[parent];  // negative: there was none
    if (choice >= 0 && tokens[i] == choice) atomicMin(&successors[parent], i);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int length = 0;
    for (int node = 0; node < p.num_nodes; node = successors[node]) path[length++] = node;
    shared.length = length;
  }
  __syncthreads();
  write_walk(p, b, shared.length, target[path[shared.length - 1]]);
}

}  // namespace specextend
