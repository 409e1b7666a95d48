#pragma once

// Reductions and scans over the threads of a block, in fixed order. All threads call them; a block
// consists of whole warps.

#include <cuda_runtime.h>

#include <cstdint>

namespace specextend {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kMaxWarps = 32;  // a block has no more

// Returns the threads of a block for `count` items: whole warps, no more than there is work for.
inline unsigned block_threads(int64_t count, int most) {
  return unsigned(count < most ? (count + 31) / 32 * 32 : most);
}

// Returns to all threads op(...op(op(x of warp 0, x of warp 1)...). `shared` holds kMaxWarps.
template <typename T, typename Op>
__device__ __forceinline__ T block_reduce(T x, T* shared, Op op) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = op(x, __shfl_xor_sync(kWholeWarp, x, step));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) x = op(x, shared[warp]);
  __syncthreads();
  return x;
}

// Returns the sum over the warp's lanes up to this one.
template <typename T>
__device__ __forceinline__ T warp_sum_upto(T x) {
#pragma unroll
  for (unsigned step = 1; step < 32; step *= 2) {
    const T lower = __shfl_up_sync(kWholeWarp, x, step);
    if (threadIdx.x % 32 >= step) x += lower;
  }
  return x;
}

// Returns the sum over the threads before this one. `shared` holds kMaxWarps.
template <typename T>
__device__ __forceinline__ T block_sum_before(T x, T* shared) {
  const T upto = warp_sum_upto(x);
  if (threadIdx.x % 32 == 31) shared[threadIdx.x / 32] = upto;
  __syncthreads();
  T before = upto - x;
  for (unsigned warp = 0; warp < threadIdx.x / 32; ++warp) before += shared[warp];
  __syncthreads();
  return before;
}

}  // namespace specextend
