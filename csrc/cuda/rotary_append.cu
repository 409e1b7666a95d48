#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/rotary_append.cuh"

namespace specextend {

template cudaError_t launch_rotary_append<float>(const RotaryAppendParams&, cudaStream_t);
template cudaError_t launch_rotary_append<__half>(const RotaryAppendParams&, cudaStream_t);
template cudaError_t launch_rotary_append<__nv_bfloat16>(const RotaryAppendParams&, cudaStream_t);

}  // namespace specextend
