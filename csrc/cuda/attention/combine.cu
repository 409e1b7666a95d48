#include "kernels/attention/combine.cuh"

namespace specextend {

template cudaError_t launch_attention_combine<float>(const AttentionCall&, bool, cudaStream_t);
template cudaError_t launch_attention_combine<__half>(const AttentionCall&, bool, cudaStream_t);
template cudaError_t launch_attention_combine<__nv_bfloat16>(const AttentionCall&, bool,
                                                             cudaStream_t);

}  // namespace specextend
