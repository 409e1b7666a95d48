#include "kernels/compact_kv_sm90.cuh"
#include "kernels/grid.cuh"
#include "kernels/launch.cuh"
#include "launch.h"

cudaError_t specextend::launch_compact_kv_sm90(const CompactKvParams& p, cudaStream_t stream) {
  if (p.row_bytes == 0 || p.num_kv_heads == 0 || p.batch == 0) return cudaSuccess;
  const int64_t segments = (p.row_bytes + kCompactSm90SegmentBytes - 1) / kCompactSm90SegmentBytes;
  const dim3 grid(unsigned(segments * p.num_kv_heads), unsigned(p.num_caches), grid_z(p.batch));
  return launch(compact_kv_sm90_kernel, grid, 32, kCompactSm90Shared, stream, p);
}
