#pragma once

#include <cstdint>
#include <cstring>

#include "kv_rows.h"

namespace specextend::cpu {

// Less than this is not worth waking a thread for.
constexpr int64_t kCopyGrainBytes = 1 << 18;

// Copies `rows` rows of all heads of sequence b. What lies side by side on both sides, the heads of
// a row or the rows of a head, moves as one.
inline void copy_rows(const KvRows& to, int64_t to_row, const KvRows& from, int64_t from_row,
                      int64_t b, int64_t rows, int64_t heads, int64_t bytes) {
  auto is_packed = [bytes](int64_t to_stride, int64_t from_stride) {
    return to_stride == bytes && from_stride == bytes;
  };
  if (is_packed(to.stride_h, from.stride_h)) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(kv_row(to, b, to_row + i, 0), kv_row(from, b, from_row + i, 0),
                  size_t(heads * bytes));
    }
    return;
  }
  if (is_packed(to.stride_s, from.stride_s)) {
    bytes *= rows;
    rows = 1;
  }
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(kv_row(to, b, to_row + i, h), kv_row(from, b, from_row + i, h), size_t(bytes));
    }
  }
}

}  // namespace specextend::cpu
