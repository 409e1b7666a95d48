#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/sample_nodes.cuh"

template cudaError_t specextend::launch_sample_nodes<__nv_bfloat16>(const SampleNodesParams&,
                                                                    const SampleNodesScratch&,
                                                                    cudaStream_t);
