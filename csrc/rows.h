#pragma once

// Where a row lies in a tensor with any strides. Host and device code share this.

#include <cstdint>

#include "host_device.h"
#include "params.h"

namespace specextend {

static_assert(kRowDims == 3, "row_begin takes a row's index apart into three");

template <typename T>
SPECEXTEND_HOST_DEVICE const T* row_begin(const RowShape& shape, const Rows& rows, int64_t row) {
  const int64_t inner = row % shape.sizes[2], outer = row / shape.sizes[2];
  const int64_t offset = outer / shape.sizes[1] * rows.strides[0] +
                         outer % shape.sizes[1] * rows.strides[1] + inner * rows.strides[2];
  return static_cast<const T*>(rows.data) + offset;
}

}  // namespace specextend
