#include "kernels/tree_attention.cuh"

template cudaError_t specextend::launch_attention<__half, 128, true>(const AttentionCall&,
                                                                     cudaStream_t);
