#pragma once

// The producer is the warp that walks the block's part of the work and copies tiles of keys and
// values to shared memory.

#include <cuda_runtime.h>

#include <cstdint>

#include "hopper_tiles.h"
#include "kernels/attention/hopper/shared.cuh"
#include "kernels/attention/segments.cuh"
#include "kernels/hopper.cuh"
#include "kernels/ptx.cuh"

namespace specextend {

// Asks for a tile [kKeys, kDim]; in a cluster each block asks for half of its rows, for both
// blocks.
template <int kDim, typename T>
__device__ __forceinline__ void copy_tile(const HopperCall& c, const hopper::TensorMap& map,
                                          T* tile, uint64_t* full, int rank, int key, int kv_head,
                                          int b) {
  using Shape = HopperShape<kDim>;
  // Keys that one cluster alone reads need not stay in the L2 cache.
  const hopper::Keep keep =
      c.attention.cut.row_blocks == 1 ? hopper::Keep::kFirstToGo : hopper::Keep::kNormal;
  const int first = rank * (Shape::kKeys / 2);
  ptx::mbarrier_arrive_expect_tx(full, Shape::kTile * 2);
#pragma unroll
  for (int column = 0; column < kDim; column += 64) {
    T* const to = tile + shared_index(Shape::kKeys, first, column);
    const int row = key + first;
    if (c.cluster == 1) {
      hopper::copy_box(to, map, full, keep, column, row, kv_head, b);
    } else {
      hopper::copy_box_to_both(to, map, full, keep, column, row, kv_head, b);
    }
  }
}

// Returns the job that the warp that copies is at.
template <int kDim>
__device__ __forceinline__ HopperJob describe_job(const SegmentState& state, int rank) {
  constexpr int kKeys = hopper_tile_keys(kDim);
  const auto tile = [&](int64_t key) {  // the job's tile at or behind `key`
    return int(clamp_between(key - state.first_tile, 0, state.num_tiles));
  };
  return {state,
          state.first_packed + rank * kHopperBlockRows,
          int(state.first_tile * kKeys),
          state.done ? -1 : state.num_tiles,
          tile(divide_up(state.all_see_from, kKeys)),
          tile(state.prefix / kKeys)};
}

// Walks the block's segments and copies their tiles. The first warp calls it; one of its threads
// copies, and tells the other warps what.
template <typename T, int kDim>
__device__ __forceinline__ void copy_tiles(const HopperCall& c, const HopperShared<kDim>& shared,
                                           int rank) {
  using Shape = HopperShape<kDim>;
  auto& barriers = shared.barriers();
  SegmentState& state = barriers.state;
  Ring<HopperShared<kDim>::kJobs> jobs;
  Ring<Shape::kStages> ring;
  state.begin(c.attention, int(blockIdx.x) / c.cluster);
  for (;; jobs.advance()) {
    state.advance(c.attention);
    __syncwarp();
    const bool done = state.done;
    if (threadIdx.x == 0) {
      wait_for(&barriers.taken[jobs.stage], jobs.parity ^ 1);
      HopperJob& job = barriers.jobs[jobs.stage];
      job = describe_job<kDim>(state, rank);
      ptx::mbarrier_arrive(&barriers.posted[jobs.stage]);
      for (int t = 0; t < job.tiles; ++t, ring.advance()) {
        const int key = job.key + t * Shape::kKeys;
        wait_for(&barriers.empty_k[ring.stage], ring.parity ^ 1);
        copy_tile<kDim>(c, c.k, shared.template keys<T>(ring.stage), &barriers.full_k[ring.stage],
                        rank, key, state.kv_head, state.b);
        wait_for(&barriers.empty_v[ring.stage], ring.parity ^ 1);
        copy_tile<kDim>(c, c.v, shared.template values<T>(ring.stage), &barriers.full_v[ring.stage],
                        rank, key, state.kv_head, state.b);
      }
    }
    __syncwarp();
    if (done) return;
  }
}

}  // namespace specextend
