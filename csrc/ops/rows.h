#pragma once

// What the ops on rows [.., N] share: checks, parameters, allocation.

#include "check.h"
#include "ops/allocate.h"
#include "params.h"

namespace specextend {

inline void check_rows(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(1 <= t.dim() && t.dim() <= kRowDims + 1, op, ": ", name,
                  " must be [.., N] of 1 to ", kRowDims + 1, " dimensions, got ", shape_string(t));
  check_unit_last_stride(op, name, t);
}

// Checks rows that go with those of `other`, element by element.
inline void check_rows_like(const char* op, const char* name, const Tensor& t,
                            const char* other_name, const Tensor& other) {
  bool same = t.dim() == other.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == other.size(i);
  STD_TORCH_CHECK(same, op, ": ", name, " must have the shape of ", other_name, " ",
                  shape_string(other), ", got ", shape_string(t));
  check_dtype(op, name, t, other.scalar_type());
  check_unit_last_stride(op, name, t);
  check_same_device(op, name, t, other_name, other);
}

inline RowShape row_shape(const Tensor& t) {
  RowShape shape{{1, 1, 1}, 1, t.size(t.dim() - 1)};
  for (int64_t i = 0; i + 1 < t.dim(); ++i) {
    shape.sizes[kRowDims + 1 - t.dim() + i] = t.size(i);
    shape.num_rows *= t.size(i);
  }
  return shape;
}

inline Rows rows_of(const Tensor& t) {
  Rows rows{t.const_data_ptr(), {}};
  for (int64_t i = 0; i + 1 < t.dim(); ++i) {
    rows.strides[kRowDims + 1 - t.dim() + i] = t.stride(i);
  }
  return rows;
}

// Returns uninitialised rows of the shape and the dtype of `like`, contiguous.
inline Tensor allocate_rows(const Tensor& like) {
  int64_t sizes[kRowDims + 1];
  for (int64_t i = 0; i < like.dim(); ++i) sizes[i] = like.size(i);
  return allocate(like, sizes, like.dim(), like.scalar_type());
}

}  // namespace specextend
