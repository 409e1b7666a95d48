#include "kernels/tree_attention.cuh"

template cudaError_t specextend::launch_attention<__half, 80, false>(const AttentionCall&,
                                                                     cudaStream_t);
