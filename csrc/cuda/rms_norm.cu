#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/rms_norm.cuh"

namespace specextend {

template cudaError_t launch_rms_norm<float>(const RmsNormParams&, cudaStream_t);
template cudaError_t launch_rms_norm<__half>(const RmsNormParams&, cudaStream_t);
template cudaError_t launch_rms_norm<__nv_bfloat16>(const RmsNormParams&, cudaStream_t);

}  // namespace specextend
