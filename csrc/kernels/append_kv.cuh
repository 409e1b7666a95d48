#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/grid.cuh"
#include "kernels/launch.cuh"
#include "kv_rows.h"
#include "params.h"

namespace specextend {

constexpr int kAppendThreads = 128;
constexpr int kAppendInFlight = 4;  // a thread has read so many vectors and not yet written them

// A block copies some of the new rows, of all heads. Grid: groups of rows; keys and values;
// sequences.
template <typename Vector>
__global__ void __launch_bounds__(kAppendThreads)
    append_kv_kernel(const __grid_constant__ AppendKvParams p, int rows_per_block) {
  const KvRows& cache = p.caches[blockIdx.y];
  const KvRows& source = p.rows[blockIdx.y];
  const unsigned vectors = unsigned(p.row_bytes[blockIdx.y] / int64_t(sizeof(Vector)));
  const unsigned per_row = vectors * unsigned(p.num_kv_heads);
  const int64_t first = int64_t(blockIdx.x) * rows_per_block;
  for (int b = int(blockIdx.z); b < p.batch; b += int(gridDim.z)) {
    const int64_t rows = min(append_count(p, b) - first, int64_t(rows_per_block));
    const unsigned count = rows > 0 ? unsigned(rows) * per_row : 0;
    const int64_t target = p.lens[b] + first;
    for (unsigned done = 0; done < count; done += kAppendThreads * kAppendInFlight) {
      Vector values[kAppendInFlight];
      char* to[kAppendInFlight];
#pragma unroll
      for (int i = 0; i < kAppendInFlight; ++i) {
        const unsigned n = done + i * kAppendThreads + threadIdx.x;
        to[i] = nullptr;
        if (n >= count) continue;
        const unsigned row = n / per_row, head = n % per_row / vectors;
        const int64_t offset = int64_t(n % vectors) * int64_t(sizeof(Vector));
        to[i] = kv_row(cache, b, target + row, head) + offset;
        values[i] = *reinterpret_cast<const Vector*>(kv_row(source, b, first + row, head) + offset);
      }
#pragma unroll
      for (int i = 0; i < kAppendInFlight; ++i) {
        if (to[i] != nullptr) *reinterpret_cast<Vector*>(to[i]) = values[i];
      }
    }
  }
}

template <typename Vector>
cudaError_t launch_append_kv_vectors(const AppendKvParams& p, cudaStream_t stream) {
  const int64_t per_row =
      std::max(p.row_bytes[0], p.row_bytes[1]) / int64_t(sizeof(Vector)) * p.num_kv_heads;
  const int rows_per_block =
      int(std::max<int64_t>(1, int64_t(kAppendThreads) * kAppendInFlight / per_row));
  const dim3 grid(unsigned((p.num_rows - 1) / rows_per_block + 1), 2, grid_z(p.batch));
  return launch(append_kv_kernel<Vector>, grid, kAppendThreads, 0, stream, p, rows_per_block);
}

}  // namespace specextend
