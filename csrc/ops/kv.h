#pragma once

// What the ops that move rows of KV caches ask of them.

#include "check.h"
#include "params.h"

namespace specextend {

inline void check_kv(const char* op, const char* name, const Tensor& t) {
  check_dim(op, name, t, 4, "[B, S, Hkv, D]");
  check_unit_last_stride(op, name, t);
}

// A tensor that is written: no element may be seen under two indices.
inline void check_not_expanded(const char* op, const char* name, const Tensor& t) {
  for (int64_t i = 0; i < t.dim(); ++i) {
    STD_TORCH_CHECK(t.size(i) <= 1 || t.stride(i) != 0, op, ": ", name,
                    " is written and must not be an expanded tensor, got stride 0 in dimension ", i);
  }
}

// [B] lengths of a batch of this size.
inline void check_lens(const char* op, const char* name, const Tensor& t, int64_t batch) {
  check_shape(op, name, t, {batch});
  check_dtype(op, name, t, ScalarType::Int);
  check_contiguous(op, name, t);
}

inline KvRows kv_rows(const Tensor& t) {
  const int64_t bytes = int64_t(t.element_size());
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0) * bytes, t.stride(1) * bytes,
          t.stride(2) * bytes};
}

inline int64_t kv_row_bytes(const Tensor& t) { return t.size(3) * int64_t(t.element_size()); }

}  // namespace specextend
