#pragma once

#include <cstdint>

namespace specextend::cpu {

// Returns how many rows of `length` elements are worth waking a thread for.
inline int64_t rows_grain(int64_t length) {
  constexpr int64_t kElements = 1 << 16;
  return 1 + kElements / (length + 1);
}

}  // namespace specextend::cpu
