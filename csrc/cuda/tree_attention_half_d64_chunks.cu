#include "kernels/tree_attention.cuh"

template cudaError_t specextend::launch_attention<__half, 64, true>(const AttentionCall&,
                                                                    cudaStream_t);
