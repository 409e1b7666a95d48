#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/merge_states.cuh"

namespace specextend {

template cudaError_t launch_merge_states<float>(const MergeStatesParams&, cudaStream_t);
template cudaError_t launch_merge_states<__half>(const MergeStatesParams&, cudaStream_t);
template cudaError_t launch_merge_states<__nv_bfloat16>(const MergeStatesParams&, cudaStream_t);

}  // namespace specextend
