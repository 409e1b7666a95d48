#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/grid.cuh"
#include "kernels/launch.cuh"
#include "kv_rows.h"
#include "params.h"

namespace specextend {

constexpr int kCompactThreads = 128;
constexpr int kCompactInFlight = 8;  // a thread has read so many rows and not yet written them

// A thread moves the same bytes of all rows of the path, in path order, some rows at a time, so
// that threads never meet: a row that is written lies before all rows still to be read, and nobody
// else touches these bytes of it. Grid: bytes of a row of all heads, caches, sequences.
template <typename Vector>
__global__ void __launch_bounds__(kCompactThreads)
    compact_kv_kernel(const __grid_constant__ CompactKvParams p) {
  const int64_t vectors = p.row_bytes / int64_t(sizeof(Vector));
  const int64_t column = int64_t(blockIdx.x) * kCompactThreads + threadIdx.x;
  if (column >= vectors * p.num_kv_heads) return;
  char* const cache = static_cast<char*>(p.caches[blockIdx.y]) + column / vectors * p.stride_h +
                      column % vectors * int64_t(sizeof(Vector));
  for (int b = int(blockIdx.z); b < p.batch; b += int(gridDim.z)) {
    char* const rows = cache + b * p.stride_b;
    const int64_t prefix = p.prefix_lens[b];
    const int count = compact_count(p, b);
    for (int first = 0; first < count; first += kCompactInFlight) {
      Vector values[kCompactInFlight];
      bool moves[kCompactInFlight];
#pragma unroll
      for (int i = 0; i < kCompactInFlight; ++i) {
        const int64_t source = first + i < count ? compact_source(p, b, first + i) : -1;
        moves[i] = source >= 0;
        if (moves[i]) values[i] = *reinterpret_cast<const Vector*>(rows + source * p.stride_s);
      }
#pragma unroll
      for (int i = 0; i < kCompactInFlight; ++i) {
        if (!moves[i]) continue;
        *reinterpret_cast<Vector*>(rows + (prefix + first + i) * p.stride_s) = values[i];
      }
    }
  }
}

template <typename Vector>
cudaError_t launch_compact_kv_vectors(const CompactKvParams& p, cudaStream_t stream) {
  const int64_t columns = p.row_bytes / int64_t(sizeof(Vector)) * p.num_kv_heads;
  const dim3 grid(unsigned((columns + kCompactThreads - 1) / kCompactThreads),
                  unsigned(p.num_caches), grid_z(p.batch));
  return launch(compact_kv_kernel<Vector>, grid, kCompactThreads, 0, stream, p);
}

}  // namespace specextend
