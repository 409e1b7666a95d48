#pragma once

// The shared memory of the Hopper kernel: what lies in it, and who waits for whom there.
//
// All but the last two of these are mbarriers in shared memory. A phase ends with all its arrivals
// and bytes. Waits for full, posted and seen_ready begin with parity 0; those for empty, taken and
// seen_read begin with parity 1, which is over at once: the places are free. Everybody takes all
// jobs, and all their tiles, in order, so that nobody is two phases from a barrier that it waits
// at.
//   full_k, full_v  1 arrival, by the copying thread of the block, with the bytes of the whole
//                   tile. In a cluster half of them come from the other block, perhaps before it.
//   empty_k         8 arrivals from each block of the cluster, one per multiplying warp when its
//                   product has ended (wait_products): only then may any block copy to the place.
//   empty_v         9 likewise: warp 1 reads values, too, and arrives for every tile.
//   posted, taken   jobs, in a ring of two: 1 arrival by the copying thread; 9 by the readers,
//                   after their last look at the job. Tiles of -1 end them; nobody takes that.
//   seen_ready      1 arrival by warp 1 for every tile with a mask, when the mask is written and
//                   unread values are cleared (generic writes, then a proxy fence of every lane).
//   seen_read       8 arrivals, by the multiplying warps when they have used the mask.
//   named barriers  each multiplying warpgroup has one, around the writing of its queries.
//   cluster barrier all threads of the cluster meet, after the barriers are made and at the end: no
//                   block may end while another still writes to it or arrives at it. All bytes
//                   that a block was sent have been waited for by then.
// Both blocks of a cluster have the same tiles, and one without rows goes through them as well. A
// block without any posts the end at once. A unit without tiles is a job of 0 tiles.

#include <cuda_runtime.h>

#include <cstdint>

#include "hopper_tiles.h"
#include "kernels/attention/call.cuh"
#include "kernels/attention/segments.cuh"
#include "kernels/hopper.cuh"
#include "kernels/ptx.cuh"

namespace specextend {

constexpr int kHopperThreads = 384;  // a warpgroup that copies, two that multiply
constexpr int kHopperReaders = 8;    // warps that multiply
constexpr int kHopperProducerRegisters = 72, kHopperConsumerRegisters = 216;  // per thread
// A thread begins with its share of the multiprocessor's 64 K. Whoever asks for more waits until it
// is there: for ever, unless others give up as much.
constexpr int kHopperRegisters = 65536 / kHopperThreads / 8 * 8;
static_assert(128 * kHopperProducerRegisters + 256 * kHopperConsumerRegisters <=
              kHopperThreads * kHopperRegisters);
static_assert(kHopperProducerRegisters % 8 == 0 && kHopperProducerRegisters >= 24 &&
              kHopperConsumerRegisters % 8 == 0 && kHopperConsumerRegisters <= 256);
constexpr int kHopperSharedBytes = 227 * 1024;  // a block can have no more

constexpr int kOwnRowsBarrier = 1;  // each warpgroup that multiplies has one: this, and the next

// Holds the parameters of the kernel.
struct HopperCall {
  AttentionCall attention;  // a block of its cut is a cluster here
  hopper::TensorMap k, v;
  int cluster;  // blocks: 1 or 2
};

// Gives the sizes of tiles for head dimensions up to kDim, a multiple of 64; columns behind the
// head dimension are 0.
template <int kDim>
struct HopperShape {
  static constexpr int kKeys = hopper_tile_keys(kDim);
  static constexpr int kTile = kKeys * kDim;  // elements
  static constexpr int kQueryBytes = kHopperBlockRows * kDim * 2;
  static constexpr int kBarrierBytes = 3072;
  static constexpr int kStages =
      (kHopperSharedBytes - kBarrierBytes - kQueryBytes) / (2 * kTile * 2);
  static constexpr int kSharedBytes = kQueryBytes + kStages * 2 * kTile * 2 + kBarrierBytes;
  static_assert(kStages >= 2);
};

// The block's segment of a unit, as the warp that copies tells the others. Keys are below 2^31.
struct HopperJob {
  SegmentState at;
  int row_begin;               // the block's first row of the KV head
  int key, tiles;              // the first key, and how many tiles; -1: there is no more to do
  int plain_begin, plain_end;  // every row sees every key of these tiles
};

// Says where things lie in the shared memory of a block: queries, a ring of tiles (pipeline
// stages), and barriers.
template <int kDim>
struct HopperShared {
  using Shape = HopperShape<kDim>;
  static constexpr int kJobs = 2;
  struct Barriers {
    uint64_t full_k[Shape::kStages], full_v[Shape::kStages];
    uint64_t empty_k[Shape::kStages], empty_v[Shape::kStages];
    uint64_t posted[kJobs], taken[kJobs];
    uint64_t seen_ready, seen_read;
    HopperJob jobs[kJobs];
    SegmentState state;                                  // where the warp that copies is
    uint64_t seen[kHopperBlockRows][Shape::kKeys / 64];  // which keys of a tile each row sees
  };
  static_assert(sizeof(Barriers) <= Shape::kBarrierBytes);
  unsigned char* const base = ptx::shared_memory();

  template <typename T>
  __device__ __forceinline__ T* queries(int warpgroup) const {
    return reinterpret_cast<T*>(base) + warpgroup * kHopperWarpgroupRows * kDim;
  }
  template <typename T>
  __device__ __forceinline__ T* keys(int stage) const {
    return reinterpret_cast<T*>(base + Shape::kQueryBytes) + stage * Shape::kTile;
  }
  template <typename T>
  __device__ __forceinline__ T* values(int stage) const {
    return keys<T>(Shape::kStages + stage);
  }
  __device__ __forceinline__ Barriers& barriers() const {
    return *reinterpret_cast<Barriers*>(base + Shape::kSharedBytes - Shape::kBarrierBytes);
  }
};

// Holds the place (pipeline stage) of the next tile, and the parity of the place's barriers.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// Waits until the phase of this parity is over.
__device__ __forceinline__ void wait_for(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// Tells all blocks that copied parts of a tile that the warp has read it.
__device__ __forceinline__ void release(uint64_t* empty, int cluster) {
  __syncwarp();
  const int lane = int(threadIdx.x % 32);
  if (lane < cluster) hopper::arrive_in_cluster(empty, lane);
}

}  // namespace specextend
