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

namespace detail {

struct Ldmatrix {
  const void* row;
  uint32_t* r;  // [4]
};

template <bool kTransposed>
void ldmatrix(void* const* operands, unsigned) {
  for (int t = 0; t < emulation::kWarp; ++t) {
    for (int i = 0; i < 4; ++i) {
      uint16_t pair[2];
      for (int j = 0; j < 2; ++j) {
        const int row = kTransposed ? 2 * (t % 4) + j : t / 4;
        const int column = kTransposed ? t / 4 : 2 * (t % 4) + j;
        pair[j] = static_cast<const uint16_t*>(
            static_cast<const Ldmatrix*>(operands[8 * i + row])->row)[column];
      }
      static_cast<Ldmatrix*>(operands[t])->r[i] = pair[0] | uint32_t(pair[1]) << 16;
    }
  }
}

struct Mma {
  float* d;           // [4]
  const uint32_t* a;  // [4]
  uint32_t b[2];
};

template <typename T>
float element(uint32_t pair, int which) {
  return float(specextend_bits<T>(uint16_t(pair >> 16 * which)));
}

template <typename T>
void mma(void* const* operands, unsigned) {
  float a[16][16], b[16][8];  // [m][k], [k][n]
  for (int t = 0; t < emulation::kWarp; ++t) {
    const Mma& own = *static_cast<const Mma*>(operands[t]);
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 2; ++j) {
        a[t / 4 + 8 * (i % 2)][2 * (t % 4) + 8 * (i / 2) + j] = element<T>(own.a[i], j);
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) b[2 * (t % 4) + 8 * i + j][t / 4] = element<T>(own.b[i], j);
    }
  }
  float d[16][8] = {};
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int t = 0; t < emulation::kWarp; ++t) {
    float* own = static_cast<const Mma*>(operands[t])->d;
    for (int i = 0; i < 4; ++i) own[i] += d[t / 4 + 8 * (i / 2)][2 * (t % 4) + i % 2];
  }
}

}  // namespace detail

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, SPECEXTEND_SITE) {
  emulation::check_shared("ldmatrix", row, 16);
  detail::Ldmatrix own{row, r};
  emulation::warp_call("ldmatrix", file, line, 0xffffffffu, &own, detail::ldmatrix<false>);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, SPECEXTEND_SITE) {
  emulation::check_shared("ldmatrix.trans", row, 16);
  detail::Ldmatrix own{row, r};
  emulation::warp_call("ldmatrix.trans", file, line, 0xffffffffu, &own, detail::ldmatrix<true>);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  SPECEXTEND_SITE) {
  detail::Mma own{d, a, {b0, b1}};
  emulation::warp_call("mma", file, line, 0xffffffffu, &own, detail::mma<T>);
}

inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;
}

inline void named_barrier(int id, int threads, SPECEXTEND_SITE) {
  emulation::barrier("named barrier", file, line, id, threads, false, 0);
}

// Launches follow one another here, so that there is nothing to wait for.
inline void wait_for_predecessors() {}
inline void let_successors_begin() {}

using emulation::mbarrier_arrive_expect_tx;
using emulation::mbarrier_init;
using emulation::mbarrier_try_wait_parity;
inline void fence_mbarrier_init() {}

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
