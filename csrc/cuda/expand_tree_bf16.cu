#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/expand_tree.cuh"

template cudaError_t specextend::launch_expand_tree<__nv_bfloat16>(const ExpandTreeParams&,
                                                                   const ExpandTreeScratch&,
                                                                   cudaStream_t);
