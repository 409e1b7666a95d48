#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/grid.cuh"
#include "kernels/launch.cuh"
#include "kv_rows.h"
#include "params.h"

namespace specextend {

constexpr int kRotaryThreads = 128;

template <typename T, int kElements>
struct alignas(sizeof(T) * kElements) RotaryVector {
  T x[kElements];
};

// Returns x * cos + other * sin, each product and the sum rounded.
template <typename T>
__device__ __forceinline__ T rotated(float x, T cos, float other, T sin) {
  const T a = T(rounded_product(x, float(cos))), b = T(rounded_product(other, float(sin)));
  return T(float(a) + float(b));
}

// A row's items: of every head of q, then of k, the pairs of vectors that are rotated and the
// vectors behind them; then the vectors of v. A thread computes one. Grid: parts of rows, one row
// after the other; sequences.
template <typename T, int kElements>
__global__ void __launch_bounds__(kRotaryThreads)
    rotary_append_kernel(const __grid_constant__ RotaryAppendParams p, unsigned parts) {
  using Vector = RotaryVector<T, kElements>;
  constexpr int64_t kBytes = int64_t(sizeof(Vector));
  const AppendKvParams& a = p.append;
  const unsigned pairs = unsigned(p.rotary_dim) / 2 / kElements;
  const unsigned per_head = unsigned(a.row_bytes[0] / kBytes) - pairs;
  const unsigned per_value = unsigned(a.row_bytes[1] / kBytes);
  const unsigned num_rotated = unsigned(p.num_heads + a.num_kv_heads) * per_head;
  const int64_t row = blockIdx.x / parts;
  const unsigned n = blockIdx.x % parts * kRotaryThreads + threadIdx.x;
  if (n >= num_rotated + unsigned(a.num_kv_heads) * per_value) return;
  const auto read = [](const char* at) { return *reinterpret_cast<const Vector*>(at); };
  for (int b = int(blockIdx.z); b < a.batch; b += int(gridDim.z)) {
    const bool of_query = n < unsigned(p.num_heads) * per_head;
    if (!of_query && row >= append_count(a, b)) continue;
    const int64_t to_row = of_query ? row : a.lens[b] + row;
    if (n >= num_rotated) {
      const unsigned head = (n - num_rotated) / per_value, i = (n - num_rotated) % per_value;
      *reinterpret_cast<Vector*>(kv_row(a.caches[1], b, to_row, head) + i * kBytes) =
          read(kv_row(a.rows[1], b, row, head) + i * kBytes);
      continue;
    }
    const unsigned head = n / per_head - (of_query ? 0 : unsigned(p.num_heads));
    const unsigned i = n % per_head;
    const char* const from = kv_row(of_query ? p.q : a.rows[0], b, row, head);
    char* const to = kv_row(of_query ? p.out : a.caches[0], b, to_row, head);
    if (i >= pairs) {  // behind what is rotated
      const int64_t at = int64_t(pairs + i) * kBytes;
      *reinterpret_cast<Vector*>(to + at) = read(from + at);
      continue;
    }
    const int64_t low = int64_t(i) * kBytes, high = int64_t(pairs + i) * kBytes;
    const char *const cos = kv_row(p.cos, b, row, 0), *const sin = kv_row(p.sin, b, row, 0);
    Vector x = read(from + low), y = read(from + high);
    const Vector cos_low = read(cos + low), cos_high = read(cos + high);
    const Vector sin_low = read(sin + low), sin_high = read(sin + high);
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const float first = float(x.x[j]), second = float(y.x[j]);
      x.x[j] = rotated(first, cos_low.x[j], -second, sin_low.x[j]);
      y.x[j] = rotated(second, cos_high.x[j], first, sin_high.x[j]);
    }
    *reinterpret_cast<Vector*>(to + low) = x;
    *reinterpret_cast<Vector*>(to + high) = y;
  }
}

template <typename T, int kElements>
cudaError_t launch_rotary_append_vectors(const RotaryAppendParams& p, cudaStream_t stream) {
  const AppendKvParams& a = p.append;
  constexpr int64_t kBytes = int64_t(sizeof(T)) * kElements;
  const int64_t per_head = a.row_bytes[0] / kBytes - p.rotary_dim / 2 / kElements;
  const int64_t items =
      (p.num_heads + a.num_kv_heads) * per_head + a.num_kv_heads * (a.row_bytes[1] / kBytes);
  if (items == 0 || a.num_rows == 0 || a.batch == 0) return cudaSuccess;
  const unsigned parts = unsigned((items - 1) / kRotaryThreads + 1);
  const dim3 grid(unsigned(a.num_rows) * parts, 1, grid_z(a.batch));
  return launch(rotary_append_kernel<T, kElements>, grid, kRotaryThreads, 0, stream, p, parts);
}

template <typename T>
cudaError_t launch_rotary_append(const RotaryAppendParams& p, cudaStream_t stream) {
  return rotary_alignment(p, int64_t(sizeof(T))) == 16
             ? launch_rotary_append_vectors<T, 16 / int(sizeof(T))>(p, stream)
             : launch_rotary_append_vectors<T, 1>(p, stream);
}

}  // namespace specextend
