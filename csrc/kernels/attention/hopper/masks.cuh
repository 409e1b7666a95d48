#pragma once

// Masks of tiles in which not every row sees all keys. A warp of its own writes them, so that the
// warps that multiply need no registers for positions.

#include <cuda_runtime.h>

#include <cstdint>

#include "hopper_tiles.h"
#include "kernels/attention/hopper/shared.cuh"
#include "kernels/attention/masks.cuh"
#include "kernels/attention/segments.cuh"
#include "kernels/hopper.cuh"
#include "kernels/ptx.cuh"
#include "params.h"

namespace specextend {

// Returns which of the 64 keys from `key` on a row sees: bit i stands for key + i.
__device__ __forceinline__ uint64_t visible_keys(const RowView& view, int64_t key) {
  uint64_t bits = low_bits(view.prefix - key) & ~low_bits(view.first - key);
  const int64_t slot = key - view.prefix;
  if (slot <= -64 || slot >= view.num_tree_keys) return bits;
  uint64_t tree = view.mask ? mask_bits(view.mask, view.num_tree_keys, slot)
                            : low_bits(view.last + 1 - slot) & low_bits(view.num_tree_keys - slot) &
                                  ~low_bits(-slot);
  for (uint64_t rest = view.by_position ? tree : 0; rest != 0; rest &= rest - 1) {
    const int i = __ffsll(static_cast<long long>(rest)) - 1;
    if (!view.sees(key + i)) tree &= ~(uint64_t(1) << i);
  }
  return bits | tree;
}

// Writes zeros in the place of values that no row of the unit sees: they may be anything, and a
// weight of 0 would not undo a NaN. One warp calls it.
template <int kDim, typename T>
__device__ __forceinline__ void clear_unread(const TreeAttentionParams& p, const SegmentState& at,
                                             int64_t key, T* values) {
  constexpr int kKeys = hopper_tile_keys(kDim);
  for (int first = 0; first < kKeys; first += 32) {
    for (uint32_t rest = ~readable_keys(p, at, key + first); rest != 0; rest &= rest - 1) {
      const int row = first + __ffs(int(rest)) - 1;
      for (int column = int(threadIdx.x % 32) * 8; column < kDim; column += 32 * 8) {
        *reinterpret_cast<uint4*>(values + shared_index(kKeys, row, column)) =
            make_uint4(0, 0, 0, 0);
      }
    }
  }
}

// Writes the masks of tiles in turn, and tells the warps that multiply. One warp calls it.
template <typename T, int kDim>
__device__ __forceinline__ void prepare_masks(const HopperCall& c,
                                              const HopperShared<kDim>& shared) {
  using Shape = HopperShape<kDim>;
  constexpr int kWords = Shape::kKeys / 64;
  const TreeAttentionParams& p = c.attention;
  const int lane = int(threadIdx.x % 32), group = p.num_heads / p.num_kv_heads;
  auto& barriers = shared.barriers();
  Ring<HopperShared<kDim>::kJobs> jobs;
  Ring<Shape::kStages> ring;
  Ring<1> seen;
  for (;; jobs.advance()) {
    wait_for(&barriers.posted[jobs.stage], jobs.parity);
    const HopperJob& job = barriers.jobs[jobs.stage];
    if (job.tiles < 0) return;
    for (int t = 0; t < job.tiles; ++t, ring.advance()) {
      const int64_t key = job.key + int64_t(t) * Shape::kKeys;
      const bool plain = t >= job.plain_begin && t < job.plain_end;
      if (!plain) {
        wait_for(&barriers.seen_read, seen.parity ^ 1);
        for (int i = lane; i < kHopperBlockRows * kWords; i += 32) {
          const int row = i / kWords, word = i % kWords;
          const RowView view(p, job.at.b, job.at.prefix, (job.row_begin + row) / group);
          barriers.seen[row][word] = visible_keys(view, key + word * 64);
        }
      }
      wait_for(&barriers.full_v[ring.stage], ring.parity);
      if (!plain) {
        clear_unread<kDim>(p, job.at, key, shared.template values<T>(ring.stage));
        hopper::publish_shared();
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&barriers.seen_ready);
        seen.advance();
      }
      release(&barriers.empty_v[ring.stage], c.cluster);
    }
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&barriers.taken[jobs.stage]);
  }
}

// Makes logits -inf where a row does not see the key.
template <int kWords>
__device__ __forceinline__ void mask_logits(const uint64_t (&seen)[kHopperBlockRows][kWords],
                                            int first_row, int thread, float (&s)[32 * kWords]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const uint64_t bits =
          seen[first_row + fragment_row(thread, 2 * r)][word] >> fragment_column(thread, 0);
#pragma unroll
      for (int i = 2 * r; i < 32; i += 4) {
        const int bit = fragment_column(0, i);
        if (!(bits >> bit & 1)) s[32 * word + i] = -INFINITY;
        if (!(bits >> (bit + 1) & 1)) s[32 * word + i + 1] = -INFINITY;
      }
    }
  }
}

}  // namespace specextend
