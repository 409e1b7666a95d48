#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/silu_mul.cuh"

namespace specextend {

template cudaError_t launch_silu_mul<float>(const SiluMulParams&, cudaStream_t);
template cudaError_t launch_silu_mul<__half>(const SiluMulParams&, cudaStream_t);
template cudaError_t launch_silu_mul<__nv_bfloat16>(const SiluMulParams&, cudaStream_t);

}  // namespace specextend
