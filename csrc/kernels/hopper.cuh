#pragma once

// What Hopper alone has (sm_90a), by CUTLASS's CuTe, as functions of plain pointers and arrays:
// products of a warpgroup, tensor copies, clusters, registers on demand. tests/emulation has a
// header of the same name and functions that stands in for this one on the host.
//
// A tile of rows of kDim elements lies in shared memory as kDim / 64 panels of [rows, 64], each
// with the 128-byte swizzle (shared_index in hopper_tiles.h), at a multiple of 1024 bytes.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/tensor.hpp>
#include <type_traits>

#include "kernels/tensor_map.cuh"

namespace specextend::hopper {

template <typename T>
using Element = std::conditional_t<std::is_same_v<T, __half>, cute::half_t, cute::bfloat16_t>;

// --- products of a warpgroup: asynchronous, each a group of its own ---

// Waits until at most kPending of the warpgroup's newest products are under way.
template <int kPending>
__device__ __forceinline__ void wait_products() {
  cute::warpgroup_wait<kPending>();
}

// Tells the compiler that a product under way has changed, or will change, these registers.
template <int kN>
__device__ __forceinline__ void fence_registers(float (&x)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) cute::warpgroup_fence_operand(x[i]);
}

// Begins s [64, kKeys] = q [64, kDim] * k [kKeys, kDim]^T, both in shared memory.
template <int kKeys, int kDim, typename T>
__device__ __forceinline__ void multiply_queries(float (&s)[kKeys / 2], const T* q, const T* k) {
  using namespace cute;
  using E = Element<T>;
  using Rows = Layout<Shape<_64, Int<kDim>>>;
  auto mma = make_tiled_mma(GMMA::ss_op_selector<E, E, float, Shape<_64, Int<kKeys>, Int<kDim>>>());
  auto panels = [](const T* tile, auto rows) {
    return make_tensor(
        make_smem_ptr(reinterpret_cast<const E*>(tile)),
        tile_to_shape(GMMA::Layout_K_SW128_Atom<E>{}, make_shape(rows, Int<kDim>{})));
  };
  auto thread = mma.get_thread_slice(0);  // descriptors are the same for all threads
  auto a = thread.partition_fragment_A(panels(q, _64{}));
  auto b = thread.partition_fragment_B(panels(k, Int<kKeys>{}));
  auto c = make_tensor(make_rmem_ptr(&s[0]), partition_shape_C(mma, Shape<_64, Int<kKeys>>{}));
  warpgroup_fence_operand(c);
  warpgroup_arrive();
  mma.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
  for (int i = 0; i < size<2>(a); ++i) {
    gemm(mma, a(_, _, i), b(_, _, i), c);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
}

// Begins o [64, kDim] += p [64, kKeys] * v [kKeys, kDim], p in registers, v in shared memory.
template <int kKeys, int kDim, typename T>
__device__ __forceinline__ void multiply_values(float (&o)[kDim / 2], uint32_t (&p)[kKeys / 4],
                                                const T* v) {
  using namespace cute;
  using E = Element<T>;
  auto mma = make_tiled_mma(GMMA::rs_op_selector<E, E, float, Shape<_64, Int<kDim>, Int<kKeys>>,
                                                 GMMA::Major::K, GMMA::Major::MN>());
  auto values = make_tensor(make_smem_ptr(reinterpret_cast<const E*>(v)),
                            tile_to_shape(GMMA::Layout_MN_SW128_Atom<E>{},
                                          Shape<Int<kDim>, Int<kKeys>>{}, Step<_2, _1>{}));
  auto b = mma.get_thread_slice(0).partition_fragment_B(values);
  auto a = make_tensor(make_rmem_ptr(reinterpret_cast<E*>(&p[0])),
                       partition_shape_A(mma, Shape<_64, Int<kKeys>>{}));
  auto c = make_tensor(make_rmem_ptr(&o[0]), partition_shape_C(mma, Shape<_64, Int<kDim>>{}));
  warpgroup_fence_operand(a);
  warpgroup_fence_operand(c);
  warpgroup_arrive();
#pragma unroll
  for (int i = 0; i < size<2>(a); ++i) gemm(mma, a(_, _, i), b(_, _, i), c);
  warpgroup_commit_batch();
}

// Makes what the thread has written to shared memory visible to products and tensor copies.
__device__ __forceinline__ void publish_shared() { cutlass::arch::fence_view_async_shared(); }

// --- registers: a whole warpgroup calls it; kCount is a multiple of 8 ---

template <int kCount>
__device__ __forceinline__ void give_registers_up_to() {
  cutlass::arch::warpgroup_reg_dealloc<kCount>();
}

template <int kCount>
__device__ __forceinline__ void take_registers_up_to() {
  cutlass::arch::warpgroup_reg_alloc<kCount>();
}

// --- clusters ---

__device__ __forceinline__ int cluster_rank() { return int(cute::block_rank_in_cluster()); }

// All threads of all blocks of the cluster meet; what they wrote to shared memory is then visible.
__device__ __forceinline__ void cluster_barrier() {
  cute::cluster_arrive();
  cute::cluster_wait();
}

// Arrives at the barrier that lies where this one lies, in block `rank` of the cluster.
__device__ __forceinline__ void arrive_in_cluster(uint64_t* barrier, int rank) {
  cutlass::arch::ClusterBarrier::arrive(barrier, uint32_t(rank), 1u);
}

// --- tensor copies ---

enum class Keep : uint64_t {  // in the L2 cache
  kNormal = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL),
  kFirstToGo = uint64_t(cute::TMA::CacheHintSm90::EVICT_FIRST),
};

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  cute::prefetch_tma_descriptor(&map);
}

// Copies the box at [batch, row, head, column] of the mapped tensor to shared memory; outside of
// the tensor are zeros. Its bytes, all of them, count towards the current phase of `barrier`.
template <typename T>
__device__ __forceinline__ void copy_box(T* shared, const TensorMap& map, uint64_t* barrier,
                                         Keep keep, int column, int row, int head, int batch) {
  cute::SM90_TMA_LOAD_4D::copy(&map, barrier, uint64_t(keep), shared, column, row, head, batch);
}

// Copies likewise to the same place in both blocks of a cluster of two; the bytes count in each.
template <typename T>
__device__ __forceinline__ void copy_box_to_both(T* shared, const TensorMap& map, uint64_t* barrier,
                                                 Keep keep, int column, int row, int head,
                                                 int batch) {
  cute::SM90_TMA_LOAD_MULTICAST_4D::copy(&map, barrier, 3, uint64_t(keep), shared, column, row,
                                         head, batch);
}

}  // namespace specextend::hopper
