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

// Checks the arguments of an op that appends, and returns its parameters.
inline AppendKvParams append_params(const char* op, const Tensor& k_cache, const Tensor& v_cache,
                                    const Tensor& k, const Tensor& v, const Tensor& lens) {
  check_kv(op, "k_cache", k_cache, "[B, S, Hkv, D]");
  check_kv(op, "v_cache", v_cache, "[B, S, Hkv, D]");
  check_kv(op, "k", k, "[B, M, Hkv, D]");
  check_kv(op, "v", v, "[B, M, Hkv, D]");
  const int64_t batch = k_cache.size(0), capacity = k_cache.size(1), heads = k_cache.size(2);
  const int64_t rows = k.size(1);
  check_shape(op, "v_cache", v_cache, {batch, capacity, heads, v_cache.size(3)});
  check_range(op, "the number of rows M", rows, 0, INT32_MAX);
  check_shape(op, "k", k, {batch, rows, heads, k_cache.size(3)});
  check_shape(op, "v", v, {batch, rows, heads, v_cache.size(3)});
  check_dtype(op, "k", k, k_cache.scalar_type());
  check_dtype(op, "v", v, v_cache.scalar_type());
  check_row_size(op, "k_cache", k_cache);
  check_row_size(op, "v_cache", v_cache);
  check_not_expanded(op, "k_cache", k_cache);
  check_not_expanded(op, "v_cache", v_cache);
  check_same_device(op, "v_cache", v_cache, "k_cache", k_cache);
  check_same_device(op, "k", k, "k_cache", k_cache);
  check_same_device(op, "v", v, "k_cache", k_cache);
  check_ints(op, "lens", lens, {batch}, "k_cache", k_cache);

  return {{kv_rows(k_cache), kv_rows(v_cache)},
          {kv_rows(k), kv_rows(v)},
          {kv_row_bytes(k), kv_row_bytes(v)},
          lens.const_data_ptr<int32_t>(),
          capacity,
          int(batch),
          int(rows),
          int(heads)};
}

}  // namespace specextend
