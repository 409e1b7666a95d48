#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/expand_tree.cuh"

template cudaError_t specextend::launch_expand_tree<float>(const ExpandTreeParams&,
                                                           const ExpandTreeScratch&, cudaStream_t);
