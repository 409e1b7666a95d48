#pragma once

// How a block finds the smallest keys of many (radix select), and sorts them. All threads call
// these.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/block.cuh"

namespace specextend {

constexpr int kSelectBins = 256;  // a digit's histogram has so many

// What is chosen: all keys below `key`, and of those equal to it the first num_equal.
template <typename Key>
struct SelectThreshold {
  Key key;
  uint32_t num_equal;
};

// Returns the threshold of the `wanted` smallest of the keys key_of(0), ..., key_of(n - 1). It is
// found digit by digit, from a histogram of the keys that begin like it. 0 < wanted <= n. `bins` is
// shared memory.
template <typename Key, typename KeyOf>
__device__ __forceinline__ SelectThreshold<Key> select_threshold(KeyOf key_of, int64_t n,
                                                                 int64_t wanted, uint32_t* bins) {
  const unsigned lane = threadIdx.x % 32;
  SelectThreshold<Key> t{0, uint32_t(wanted)};
  for (int shift = 8 * int(sizeof(Key)) - 8; shift >= 0; shift -= 8) {
    for (unsigned i = threadIdx.x; i < kSelectBins; i += blockDim.x) bins[i] = 0;
    __syncthreads();
    for (int64_t first = 0; first < n; first += blockDim.x) {
      const int64_t i = first + threadIdx.x;
      const Key key = i < n ? key_of(i) : 0;
      const bool counts = i < n && (key ^ t.key) >> shift >> 8 == 0;
      const unsigned digit = unsigned(key >> shift) % kSelectBins;
      // High digits are much alike: those like the first lane's are counted together.
      const unsigned counting = __ballot_sync(kWholeWarp, counts);
      if (counting == 0) continue;
      const int leader = __ffs(int(counting)) - 1;
      const bool like_leader = digit == __shfl_sync(kWholeWarp, digit, leader);
      const unsigned alike = __ballot_sync(kWholeWarp, counts && like_leader);
      if (int(lane) == leader) {
        atomicAdd(&bins[digit], unsigned(__popc(alike)));
      } else if (counts && !like_leader) {
        atomicAdd(&bins[digit], 1u);
      }
    }
    __syncthreads();

    // Every warp adds the histogram up for itself.
    constexpr int kBinsPerLane = kSelectBins / 32;
    uint32_t count[kBinsPerLane], sum = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerLane; ++i) {
      count[i] = bins[lane * kBinsPerLane + i];
      sum += count[i];
    }
    const uint32_t upto = warp_sum_upto(sum);
    const int owner = __ffs(int(__ballot_sync(kWholeWarp, upto >= t.num_equal))) - 1;
    uint32_t below = upto - sum, bin = lane * kBinsPerLane, inside = 0;
    bool found = false;
#pragma unroll
    for (int i = 0; i < kBinsPerLane; ++i) {
      if (!found && below + count[i] >= t.num_equal) {
        found = true;
        inside = count[i];
      }
      below += found ? 0 : count[i];
      bin += found ? 0 : 1;
    }
    t.key |= Key(__shfl_sync(kWholeWarp, bin, owner)) << shift;
    t.num_equal -= __shfl_sync(kWholeWarp, below, owner);
    __syncthreads();
    if (__shfl_sync(kWholeWarp, inside, owner) == t.num_equal) {  // all keys that begin like it
      t.key |= (Key(1) << shift) - 1;
      break;
    }
  }
  return t;
}

// Appends the key of every lane that has one to keys[*count ...), in any order: *count is in shared
// memory. By whole warps.
__device__ __forceinline__ void append_key(bool has_one, uint64_t key, uint64_t* keys,
                                           uint32_t* count) {
  const unsigned having = __ballot_sync(kWholeWarp, has_one);
  if (having == 0) return;
  const unsigned lane = threadIdx.x % 32;
  uint32_t place = 0;
  if (lane == 0) place = atomicAdd(count, uint32_t(__popc(having)));
  place = __shfl_sync(kWholeWarp, place, 0) + __popc(having & ((1u << lane) - 1));
  if (has_one) keys[place] = key;
}

// Sorts keys ascending, by a bitonic network. `keys` has room for sort_capacity(n) (workspace.h).
__device__ __forceinline__ void sort_keys(uint64_t* keys, uint32_t n) {
  uint32_t padded = 1;
  while (padded < n) padded *= 2;
  for (uint32_t i = n + threadIdx.x; i < padded; i += blockDim.x) keys[i] = ~uint64_t(0);
  for (uint32_t size = 2; size <= padded && size != 0; size *= 2) {
    for (uint32_t stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (uint32_t i = threadIdx.x; i < padded / 2; i += blockDim.x) {
        const uint32_t low = 2 * i - i % stride, high = low + stride;
        const uint64_t a = keys[low], b = keys[high];
        if ((a > b) != ((low & size) != 0)) {
          keys[low] = b;
          keys[high] = a;
        }
      }
    }
  }
  __syncthreads();
}

}  // namespace specextend
