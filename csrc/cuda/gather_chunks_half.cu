#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/gather_chunks.cuh"

template cudaError_t specextend::launch_gather_chunks<__half>(const GatherChunksParams&,
                                                              cudaStream_t);
