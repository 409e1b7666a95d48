#pragma once

// How 16-bit floats lie in registers, and go to memory.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace specextend {

// Returns two values, rounded to the type of the first argument, in one register.
__device__ __forceinline__ uint32_t pack(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t pack(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Stores four elements to memory that is aligned to all of them.
template <typename T>
__device__ __forceinline__ void store4(T* to, float4 x) {
  *reinterpret_cast<uint2*>(to) = make_uint2(pack(T{}, x.x, x.y), pack(T{}, x.z, x.w));
}
__device__ __forceinline__ void store4(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }

}  // namespace specextend
