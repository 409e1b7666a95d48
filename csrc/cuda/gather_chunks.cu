#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/gather_chunks.cuh"

namespace specextend {

template cudaError_t launch_gather_chunks<float>(const GatherChunksParams&, cudaStream_t);
template cudaError_t launch_gather_chunks<__half>(const GatherChunksParams&, cudaStream_t);
template cudaError_t launch_gather_chunks<__nv_bfloat16>(const GatherChunksParams&, cudaStream_t);

}  // namespace specextend
