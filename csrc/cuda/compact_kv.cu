#include "kernels/compact_kv.cuh"
#include "launch.h"

cudaError_t specextend::launch_compact_kv(const CompactKvParams& p, cudaStream_t stream) {
  if (p.row_bytes == 0 || p.num_kv_heads == 0 || p.batch == 0) return cudaSuccess;
  switch (compact_alignment(p)) {
    case 16:
      return launch_compact_kv_vectors<uint4>(p, stream);
    case 8:
      return launch_compact_kv_vectors<uint2>(p, stream);
    case 4:
      return launch_compact_kv_vectors<uint32_t>(p, stream);
    case 2:
      return launch_compact_kv_vectors<uint16_t>(p, stream);
    default:
      return launch_compact_kv_vectors<uint8_t>(p, stream);
  }
}
