#include "kernels/select_chunks.cuh"
#include "launch.h"

cudaError_t specextend::launch_select_chunks(const SelectChunksParams& p, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  return launch(select_chunks_kernel, unsigned(p.batch), kSelectThreads, sizeof(SelectShared),
                stream, p);
}
