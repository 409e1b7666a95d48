#pragma once

// The checks of the ops that move rows of KV caches.

#include "check.h"
#include "params.h"

namespace specextend {

inline void check_kv(const char* op, const char* name, const Tensor& t, const char* letters) {
  check_dim(op, name, t, 4, letters);
  check_unit_last_stride(op, name, t);
}

// Checks a tensor that is written: no element may be seen under two indices.
inline void check_not_expanded(const char* op, const char* name, const Tensor& t) {
  for (int64_t i = 0; i < t.dim(); ++i) {
    STD_TORCH_CHECK(t.size(i) <= 1 || t.stride(i) != 0, op, ": ", name,
                    " is written to and must not be expanded, got stride 0 in dimension ", i);
  }
}

// Checks the size of a row: what a kernel counts within a row of all heads has 32 bits.
inline void check_row_size(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.size(3) == 0 || t.size(2) <= INT32_MAX / int64_t(t.element_size()) / t.size(3),
                  op, ": ", name, " must have rows of at most 2^31 - 1 bytes over all heads, got ",
                  t.size(2), " heads of ", t.size(3), " elements");
}

// Checks one int32 per sequence, or one row of them.
inline void check_ints(const char* op, const char* name, const Tensor& t,
                       std::initializer_list<int64_t> shape, const char* device_of,
                       const Tensor& other) {
  check_shape(op, name, t, shape);
  check_dtype(op, name, t, ScalarType::Int);
  check_contiguous(op, name, t);
  check_same_device(op, name, t, device_of, other);
}

// Returns a stride; where there is nothing to step to, it is 0, whatever the tensor says.
inline KvRows kv_rows(const Tensor& t) {
  const auto stride = [&t](int64_t i) {
    return t.size(i) > 1 ? t.stride(i) * int64_t(t.element_size()) : 0;
  };
  return {const_cast<void*>(t.const_data_ptr()), stride(0), stride(1), stride(2)};
}

inline int64_t kv_row_bytes(const Tensor& t) { return t.size(3) * int64_t(t.element_size()); }

}  // namespace specextend
