#include "kernels/chunk_scores.cuh"
#include "launch.h"

namespace specextend {

int64_t chunk_scores_partials(const ChunkScoresParams& p) {
  return p.tree ? int64_t(p.batch) * score_tiles(p.num_chunks) * p.num_heads : 0;
}

cudaError_t launch_chunk_scores(const ChunkScoresParams& p, double* partials, cudaStream_t stream) {
  if (p.batch == 0 || p.num_chunks == 0) return cudaSuccess;
  return p.largest ? launch_chunk_scores_of<true>(p, partials, stream)
                   : launch_chunk_scores_of<false>(p, partials, stream);
}

cudaError_t launch_pick_rows(const TreeAttentionParams& p, DType dtype, const int32_t* rows,
                             void* picked, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  const dim3 grid(unsigned(p.num_heads), 1, grid_z(p.batch));
  constexpr unsigned kThreads = 128;
  if (dtype == DType::kFloat32) {
    return launch(pick_rows_kernel<uint32_t>, grid, kThreads, 0, stream, p, rows,
                  static_cast<uint32_t*>(picked));
  }
  return launch(pick_rows_kernel<uint16_t>, grid, kThreads, 0, stream, p, rows,
                static_cast<uint16_t*>(picked));
}

}  // namespace specextend
