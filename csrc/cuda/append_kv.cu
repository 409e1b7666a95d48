#include "kernels/append_kv.cuh"
#include "launch.h"

cudaError_t specextend::launch_append_kv(const AppendKvParams& p, cudaStream_t stream) {
  const int64_t bytes = (p.row_bytes[0] + p.row_bytes[1]) * p.num_kv_heads;
  if (bytes == 0 || p.num_rows == 0 || p.batch == 0) return cudaSuccess;
  switch (append_alignment(p)) {
    case 16:
      return launch_append_kv_vectors<uint4>(p, stream);
    case 8:
      return launch_append_kv_vectors<uint2>(p, stream);
    case 4:
      return launch_append_kv_vectors<uint32_t>(p, stream);
    case 2:
      return launch_append_kv_vectors<uint16_t>(p, stream);
    default:
      return launch_append_kv_vectors<uint8_t>(p, stream);
  }
}
