#include "kernels/tree_attention_sm90.cuh"

namespace specextend {

template cudaError_t launch_hopper_attention<__half, 256, 0>(const AttentionCall&, int,
                                                             cudaStream_t);
template cudaError_t launch_hopper_attention<__nv_bfloat16, 256, 0>(const AttentionCall&, int,
                                                                    cudaStream_t);

}  // namespace specextend
