#include "kernels/tree_attention.cuh"

template cudaError_t specextend::launch_attention<__nv_bfloat16, 256, false>(const AttentionCall&,
                                                                             cudaStream_t);
