#pragma once

#ifdef __CUDACC__
#define SPECEXTEND_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SPECEXTEND_HOST_DEVICE inline
#endif

namespace specextend {

// Returns a * b, rounded: the product is not fused into the sum that it goes to.
SPECEXTEND_HOST_DEVICE float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

SPECEXTEND_HOST_DEVICE double rounded_product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

}  // namespace specextend
