#pragma once

// The consumers are the warpgroups that multiply.

#include <cuda_runtime.h>

#include <cstdint>

#include "hopper_tiles.h"
#include "kernels/attention/call.cuh"
#include "kernels/attention/hopper/masks.cuh"
#include "kernels/attention/hopper/rows.cuh"
#include "kernels/attention/hopper/shared.cuh"
#include "kernels/attention/hopper/softmax.cuh"
#include "kernels/attention/masks.cuh"
#include "kernels/attention/pack.cuh"
#include "kernels/hopper.cuh"
#include "kernels/ptx.cuh"

namespace specextend {

// A consumer is a warpgroup that multiplies its 64 rows with the tiles of one job after the other.
// It holds the logits of a tile and the weights of the tile before, so that both products go on at
// once.
template <typename T, int kDim, int kChunk>
class HopperConsumer {
 public:
  __device__ __forceinline__ HopperConsumer(const HopperCall& c, const HopperShared<kDim>& shared,
                                            int rank, int warpgroup)
      : c_(c),
        shared_(shared),
        barriers_(shared.barriers()),
        queries_(shared.template queries<T>(warpgroup)),
        rank_(rank),
        warpgroup_(warpgroup),
        own_rows_(warpgroup * kHopperWarpgroupRows),
        thread_(int(threadIdx.x) % 128),
        lane_(int(threadIdx.x) % 32) {}

  // Takes all jobs of the block in turn.
  __device__ __forceinline__ void run() {
    Ring<HopperShared<kDim>::kJobs> jobs;
    for (;; jobs.advance()) {
      wait_for(&barriers_.posted[jobs.stage], jobs.parity);
      const HopperJob& job = barriers_.jobs[jobs.stage];       // not in registers, which are scarce
      const int tiles = __shfl_sync(kAllLanes, job.tiles, 0);  // the compiler takes it for uniform
      if (tiles < 0) return;
      plain_begin_ = __shfl_sync(kAllLanes, job.plain_begin, 0);
      plain_end_ = __shfl_sync(kAllLanes, job.plain_end, 0);
      begin(job);
      if (tiles > 0) multiply(job, tiles);
      store_rows<T, kDim>(c_, job, rank_ * kHopperBlockRows + own_rows_, job.row_begin + own_rows_,
                          softmax_, thread_, o_);
      __syncwarp();
      if (lane_ == 0) ptx::mbarrier_arrive(&barriers_.taken[jobs.stage]);
    }
  }

 private:
  using Shape = HopperShape<kDim>;
  static constexpr int kKeys = Shape::kKeys;

  // Copies the job's queries, and forgets the job before.
  __device__ __forceinline__ void begin(const HopperJob& job) {
    const AttentionCall& p = c_.attention;
    // Nobody reads the last job's queries any more.
    ptx::named_barrier(kOwnRowsBarrier + warpgroup_, 128);
    load_queries<T, kDim>(p, job.at.b, job.at.kv_head, job.row_begin + own_rows_, thread_,
                          queries_);
    hopper::publish_shared();
    ptx::named_barrier(kOwnRowsBarrier + warpgroup_, 128);

    softmax_ = OnlineSoftmax{p.factor};
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) o_[i] = 0.f;
    if constexpr (kChunk > 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        chunk_lse_[r] = nullptr;
        const PackedRow packed(p, job.at.kv_head,
                               job.row_begin + own_rows_ + fragment_row(thread_, 2 * r));
        if (packed.row >= p.num_rows) continue;
        chunk_lse_[r] = p.chunk_lse + packed.output(p, job.at.b) * p.num_chunks + job.key / kChunk;
      }
    }
  }

  // Adds all tiles of a job to the output. The products of a tile's keys and of the values of the
  // tile before are under way together.
  __device__ __forceinline__ void multiply(const HopperJob& job, int tiles) {
    wait_for(&barriers_.full_k[ring_.stage], ring_.parity);
    begin_keys();
    hopper::wait_products<0>();
    end_keys();
    weigh(job, 0);
    pack_weights();
    Ring<Shape::kStages> before = ring_;
    ring_.advance();
    for (int t = 1; t < tiles; ++t) {
      wait_for(&barriers_.full_k[ring_.stage], ring_.parity);
      begin_keys();
      wait_for(&barriers_.full_v[before.stage], before.parity);
      begin_values(before.stage);
      hopper::wait_products<1>();
      end_keys();
      weigh(job, t);
      hopper::wait_products<0>();
      end_values(before.stage);
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) o_[i] *= softmax_.correction[i / 2 % 2];
      pack_weights();
      before = ring_;
      ring_.advance();
    }
    wait_for(&barriers_.full_v[before.stage], before.parity);
    begin_values(before.stage);
    hopper::wait_products<0>();
    end_values(before.stage);
  }

  // Begin the product of the queries and the ring's keys, and give its place back at the end.
  __device__ __forceinline__ void begin_keys() {
    hopper::multiply_queries<kKeys, kDim>(s_, queries_, shared_.template keys<T>(ring_.stage));
  }
  __device__ __forceinline__ void end_keys() {
    hopper::fence_registers(s_);
    release(&barriers_.empty_k[ring_.stage], c_.cluster);
  }

  // Do the same for the product of the weights and the values of a stage.
  __device__ __forceinline__ void begin_values(int stage) {
    hopper::multiply_values<kKeys, kDim>(o_, w_, shared_.template values<T>(stage));
  }
  __device__ __forceinline__ void end_values(int stage) {
    hopper::fence_registers(o_);
    release(&barriers_.empty_v[stage], c_.cluster);
  }

  // Makes weights of the logits of tile t: mask, log-sum-exps of chunks, softmax.
  __device__ __forceinline__ void weigh(const HopperJob& job, int t) {
    if (t >= plain_begin_ && t < plain_end_) {
      if constexpr (kChunk > 0) {
        softmax_.template add_tile_of_chunks<kChunk>(s_, chunk_lse_);
      } else {
        softmax_.add_tile(s_);
      }
    } else {
      wait_for(&barriers_.seen_ready, seen_.parity);
      mask_logits(barriers_.seen, own_rows_, thread_, s_);
      __syncwarp();
      if (lane_ == 0) ptx::mbarrier_arrive(&barriers_.seen_read);
      seen_.advance();
      if constexpr (kChunk > 0) {
        softmax_.template store_chunks<kChunk>(s_, thread_, job.at.prefix - job.key - t * kKeys,
                                               chunk_lse_);
      }
      softmax_.add_tile(s_);
    }
    if constexpr (kChunk > 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (chunk_lse_[r]) chunk_lse_[r] += kKeys / kChunk;
      }
    }
  }

  // Rounds the weights to the left operand of the product with the values.
  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) w_[i] = pack(T{}, s_[2 * i], s_[2 * i + 1]);
  }

  const HopperCall& c_;
  const HopperShared<kDim>& shared_;
  typename HopperShared<kDim>::Barriers& barriers_;
  T* const queries_;
  const int rank_, warpgroup_, own_rows_, thread_, lane_;

  Ring<Shape::kStages> ring_;
  Ring<1> seen_;
  int plain_begin_, plain_end_;  // the job's
  OnlineSoftmax softmax_;
  float* chunk_lse_[2];  // where the next tile's chunks go, for each row
  float o_[kDim / 2];    // outputs
  float s_[kKeys / 2];   // logits of a tile, then weights
  uint32_t w_[kKeys / 4];
};

}  // namespace specextend
