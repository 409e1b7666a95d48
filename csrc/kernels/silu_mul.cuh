#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/launch.cuh"
#include "kernels/row_chunks.cuh"
#include "rows.h"

namespace specextend {

constexpr int kSiluThreads = 128;

// A thread computes one chunk. Grid: parts of rows.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kSiluThreads)
    silu_mul_kernel(const __grid_constant__ SiluMulParams p, unsigned parts) {
  constexpr int kElements = RowChunk<T>::kElements;
  const int64_t row = blockIdx.x / parts, length = p.shape.length;
  const int64_t c = int64_t(blockIdx.x % parts) * kSiluThreads + threadIdx.x;
  if (c * kElements >= length) return;
  const RowChunk<T> gate = load_chunk<kWide>(row_begin<T>(p.shape, p.gate, row), c, length);
  const RowChunk<T> up = load_chunk<kWide>(row_begin<T>(p.shape, p.up, row), c, length);
  RowChunk<T> out;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const float x = float(gate.x[i]);
    const T silu = T(x / (1.f + expf(-x)));
    out.x[i] = T(float(silu) * float(up.x[i]));
  }
  store_chunk<kWide>(static_cast<T*>(p.out) + row * length, c, length, out);
}

template <typename T>
cudaError_t launch_silu_mul(const SiluMulParams& p, cudaStream_t stream) {
  if (p.shape.num_rows == 0 || p.shape.length == 0) return cudaSuccess;
  constexpr int64_t kSize = int64_t(sizeof(T));
  const uint64_t bits = address_bits(p.gate, kSize) | address_bits(p.up, kSize) |
                        reinterpret_cast<uintptr_t>(p.out) | uint64_t(p.shape.length * kSize);
  const unsigned parts = unsigned((num_row_chunks<T>(p.shape.length) - 1) / kSiluThreads + 1);
  const dim3 grid(unsigned(p.shape.num_rows) * parts);
  const auto kernel = bits % 16 == 0 ? silu_mul_kernel<T, true> : silu_mul_kernel<T, false>;
  return launch(kernel, grid, kSiluThreads, 0, stream, p, parts);
}

}  // namespace specextend
