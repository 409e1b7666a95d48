#pragma once

// tree_attention for more than 64 rows of a KV head, on Hopper: warp-specialised, with an online
// softmax.
//
// A block holds 128 rows (tree rows x group), 64 in each of two warpgroups that multiply, the
// consumers. A consumer has the product of a tile's keys and that of the values of the tile before
// under way at once, and one consumer's softmax goes on while the other multiplies. In a third
// warpgroup, warp 0, the producer, walks the block's part of the work and copies tiles of keys and
// values to shared memory, as far ahead as there is room; warp 1 prepares the masks of tiles in
// which not every row sees every key, so that the consumers have no registers to spend on them.
// With more than 128 rows two blocks are a cluster over the same keys: each copies half of every
// tile to both. hopper/shared.cuh says who waits for whom.

#include <cuda_runtime.h>

#include <cstdint>

#include "hopper_tiles.h"
#include "kernels/attention/call.cuh"
#include "kernels/attention/hopper/consumer.cuh"
#include "kernels/attention/hopper/masks.cuh"
#include "kernels/attention/hopper/producer.cuh"
#include "kernels/attention/hopper/shared.cuh"
#include "kernels/attention/launch.cuh"
#include "kernels/hopper.cuh"
#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"
#include "kernels/tensor_map.cuh"

namespace specextend {

template <typename T, int kDim, int kChunk>
__global__ void __launch_bounds__(kHopperThreads, 1)
    tree_attention_sm90_kernel(const __grid_constant__ HopperCall c) {
  const HopperShared<kDim> shared;
  auto& barriers = shared.barriers();
  if (threadIdx.x == 0) {
    const uint32_t blocks = uint32_t(c.cluster);
    for (int i = 0; i < HopperShape<kDim>::kStages; ++i) {
      ptx::mbarrier_init(&barriers.full_k[i], 1);
      ptx::mbarrier_init(&barriers.full_v[i], 1);
      ptx::mbarrier_init(&barriers.empty_k[i], kHopperReaders * blocks);
      ptx::mbarrier_init(&barriers.empty_v[i], (kHopperReaders + 1) * blocks);
    }
    for (int i = 0; i < HopperShared<kDim>::kJobs; ++i) {
      ptx::mbarrier_init(&barriers.posted[i], 1);
      ptx::mbarrier_init(&barriers.taken[i], kHopperReaders + 1);
    }
    ptx::mbarrier_init(&barriers.seen_ready, 1);
    ptx::mbarrier_init(&barriers.seen_read, kHopperReaders);
    ptx::fence_mbarrier_init();
    hopper::prefetch_map(c.k);
    hopper::prefetch_map(c.v);
  }
  hopper::cluster_barrier();
  const int rank = c.cluster == 1 ? 0 : hopper::cluster_rank();
  // The warp is the same for all of its threads, and the compiler knows it.
  const int warp = __shfl_sync(kAllLanes, int(threadIdx.x) / 32, 0);
  if (warp < 4) {
    hopper::give_registers_up_to<kHopperProducerRegisters>();
    if (warp == 0) copy_tiles<T, kDim>(c, shared, rank);
    if (warp == 1) prepare_masks<T, kDim>(c, shared);
  } else {
    hopper::take_registers_up_to<kHopperConsumerRegisters>();
    HopperConsumer<T, kDim, kChunk>(c, shared, rank, warp / 4 - 1).run();
  }
  ptx::let_successors_begin();
  hopper::cluster_barrier();
}

// Launches the kernel for head dimensions above kDim - 64 up to kDim.
template <typename T, int kDim, int kChunk>
cudaError_t launch_hopper_attention(const AttentionCall& call, int cluster, cudaStream_t stream) {
  using Shape = HopperShape<kDim>;
  HopperCall c{call, {}, {}, cluster};
  const int64_t sizes[4] = {call.head_dim, call.capacity, call.num_kv_heads, call.batch};
  const auto map = [&](hopper::TensorMap* to, const void* data, int64_t stride_s, int64_t stride_h,
                       int64_t stride_b) {
    const auto bytes = [](int64_t size, int64_t stride) {  // any, where nobody steps over it
      return size > 1 ? stride * int64_t(sizeof(T)) : 16;
    };
    return hopper::make_map(
        to, data, sizes,
        {bytes(sizes[1], stride_s), bytes(sizes[2], stride_h), bytes(sizes[3], stride_b)},
        Shape::kKeys / cluster);
  };
  cudaError_t error = map(&c.k, call.k, call.k_stride_s, call.k_stride_h, call.k_stride_b);
  if (error != cudaSuccess) return error;
  error = map(&c.v, call.v, call.v_stride_s, call.v_stride_h, call.v_stride_b);
  if (error != cudaSuccess) return error;
  return launch_clusters(unsigned(cluster), tree_attention_sm90_kernel<T, kDim, kChunk>,
                         unsigned(call.cut.grid * cluster), kHopperThreads, Shape::kSharedBytes,
                         stream, c);
}

}  // namespace specextend
