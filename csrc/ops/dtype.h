#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "params.h"

namespace specextend {

// For dtypes that check_float let pass.
inline DType to_dtype(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  return type == ScalarType::Float  ? DType::kFloat32
         : type == ScalarType::Half ? DType::kFloat16
                                    : DType::kBFloat16;
}

}  // namespace specextend
