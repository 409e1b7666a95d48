#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "params.h"
#ifdef SPECEXTEND_HAS_CUDA
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace specextend {

// Returns the kernels' name of a dtype that check_float let pass.
inline DType to_dtype(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  return type == ScalarType::Float  ? DType::kFloat32
         : type == ScalarType::Half ? DType::kFloat16
                                    : DType::kBFloat16;
}

#ifdef SPECEXTEND_HAS_CUDA
// Calls launch(T{}) with the type that device code has for `dtype`.
template <typename Launch>
auto by_device_type(DType dtype, Launch launch) {
  if (dtype == DType::kFloat32) return launch(float{});
  return dtype == DType::kFloat16 ? launch(__half{}) : launch(__nv_bfloat16{});
}
#endif

}  // namespace specextend
