#pragma once

// Total orders of floats with their indices, as unsigned integers: every selection sorts by them.
// Host and device code share this.

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace specextend {

// Returns bits that are smaller for larger values; 0 and -0 are equal, NaN comes after -inf.
SPECEXTEND_HOST_DEVICE uint32_t descending_bits(float x) {
  if (x != x) return 0xffffffffu;
  x += 0.f;  // -0 becomes 0
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits ^ (bits >> 31 ? 0u : 0x7fffffffu);
}

// Returns a key that is smaller for larger values, then for lower indices.
SPECEXTEND_HOST_DEVICE uint64_t rank_key(float x, uint32_t index) {
  return uint64_t(descending_bits(x)) << 32 | index;
}

SPECEXTEND_HOST_DEVICE uint32_t rank_index(uint64_t key) { return uint32_t(key); }

// Returns the value of a key, 0 for -0.
SPECEXTEND_HOST_DEVICE float rank_value(uint64_t key) {
  uint32_t bits = uint32_t(key >> 32);
  bits ^= bits >> 31 ? 0u : 0x7fffffffu;
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

}  // namespace specextend
