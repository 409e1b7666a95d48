#pragma once

// Stands in for csrc/kernels/hopper.cuh: the same functions, for the block that runs on the host.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels/ptx.cuh"
#include "kernels/tensor_map.cuh"

namespace specextend::hopper {

// --- products ---

template <int kKeys, int kDim, typename T>
void multiply_queries(float (&s)[kKeys / 2], const T* q, const T* k, SPECEXTEND_SITE) {
  emulation::multiply_queries(s, q, k, kKeys, kDim, std::is_same_v<T, __nv_bfloat16>, file, line);
}

template <int kKeys, int kDim, typename T>
void multiply_values(float (&o)[kDim / 2], uint32_t (&p)[kKeys / 4], const T* v, SPECEXTEND_SITE) {
  emulation::multiply_values(o, p, v, kKeys, kDim, std::is_same_v<T, __nv_bfloat16>, file, line);
}

template <int kPending>
void wait_products(SPECEXTEND_SITE) {
  emulation::wait_products(kPending, file, line);
}

template <int kN>
void fence_registers(float (&)[kN]) {}

using emulation::publish_shared;

// --- registers ---

template <int kCount>
void give_registers_up_to() {}

template <int kCount>
void take_registers_up_to() {}

// --- clusters ---

using emulation::cluster_rank;

inline void cluster_barrier(SPECEXTEND_SITE) {
  emulation::cluster_barrier("cluster barrier", file, line);
}

inline void arrive_in_cluster(uint64_t* barrier, int rank) {
  ptx::mbarrier_arrive(static_cast<uint64_t*>(emulation::in_cluster(barrier, rank)));
}

// --- tensor copies ---

enum class Keep : uint64_t { kNormal, kFirstToGo };

inline void prefetch_map(const TensorMap&) {}

template <typename T>
void copy_box(T* shared, const TensorMap& map, uint64_t* barrier, Keep, int column, int row,
              int head, int batch) {
  emulation::copy_box(shared, map, barrier, {column, row, head, batch});
}

template <typename T>
void copy_box_to_both(T* shared, const TensorMap& map, uint64_t* barrier, Keep keep, int column,
                      int row, int head, int batch) {
  for (int rank = 0; rank < 2; ++rank) {
    copy_box(static_cast<T*>(emulation::in_cluster(shared, rank)), map,
             static_cast<uint64_t*>(emulation::in_cluster(barrier, rank)), keep, column, row, head,
             batch);
  }
}

}  // namespace specextend::hopper
