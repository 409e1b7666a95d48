#pragma once

// Stands in for csrc/kernels/ptx.cuh: the same functions, for the block that runs on the host.
// Those that a warp runs as one take the place of their call, which has to be the same for all.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace specextend::ptx {

inline unsigned char* shared_memory() { return emulation::shared_memory(); }

using emulation::cp_async_16;
using emulation::cp_async_commit;

template <int kPending>
void cp_async_wait() {
  emulation::cp_async_wait(kPending);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, SPECEXTEND_SITE) {
  emulation::ldmatrix(r, row, false, file, line);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, SPECEXTEND_SITE) {
  emulation::ldmatrix(r, row, true, file, line);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  SPECEXTEND_SITE) {
  emulation::mma(d, a, b0, b1, std::is_same_v<T, __nv_bfloat16>, file, line);
}

inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;
}

inline void named_barrier(int id, int threads, SPECEXTEND_SITE) {
  emulation::barrier("named barrier", file, line, id, threads, false, 0);
}

// Launches follow one another here; who does not wait is told so.
using emulation::wait_for_predecessors;
inline void let_successors_begin() {}

using emulation::mbarrier_arrive_expect_tx;
using emulation::mbarrier_init;
using emulation::mbarrier_try_wait_parity;
inline void mbarrier_arrive(uint64_t* barrier) { mbarrier_arrive_expect_tx(barrier, 0); }
using emulation::fence_mbarrier_init;

using emulation::bulk_commit_group;
using emulation::bulk_copy_to_global;
using emulation::bulk_copy_to_shared;

template <int kPending>
void bulk_wait_group_read() {
  emulation::bulk_wait_group(kPending, true);
}

template <int kPending>
void bulk_wait_group() {
  emulation::bulk_wait_group(kPending, false);
}

}  // namespace specextend::ptx
