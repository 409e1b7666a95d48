#pragma once

// Heads of a row rotated by given cosines and sines, compiled once per instruction set by table.h.
// Each product and the sum are rounded to the dtype, as the models of transformers do.

#include "cpu/isa.h"
#include "cpu/isa/elements.h"

namespace specextend::cpu {
namespace {  // one copy per instruction set
namespace rotary {

using simd::Floats;

template <typename T>
SPECEXTEND_ALWAYS_INLINE Floats turned(Floats x, Floats cos, Floats other, Floats sin) {
  return simd::rounded<T>(x * cos) + simd::rounded<T>(other * sin);
}

template <typename T>
void rotate_row(const RotateRowItem& item) {
  const int64_t pairs = item.rotary_dim / 2;
  const T *cos = static_cast<const T*>(item.cos), *sin = static_cast<const T*>(item.sin);
  for (int64_t head = 0; head < item.num_heads; ++head) {
    const T* x =
        reinterpret_cast<const T*>(static_cast<const char*>(item.x) + head * item.x_stride);
    T* y = reinterpret_cast<T*>(static_cast<char*>(item.y) + head * item.y_stride);
    simd::for_elements(pairs, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      const int64_t j = pairs + i;
      const Floats a = simd::load_elements(x + i, count), b = simd::load_elements(x + j, count);
      const auto at = [&](const T* p, int64_t k) __attribute__((always_inline)) {
        return simd::load_elements(p + k, count);
      };
      simd::store_elements(y + i, turned<T>(a, at(cos, i), -b, at(sin, i)), count);
      simd::store_elements(y + j, turned<T>(b, at(cos, j), a, at(sin, j)), count);
    });
    memcpy(y + 2 * pairs, x + 2 * pairs, size_t(item.row_bytes) - size_t(2 * pairs) * sizeof(T));
  }
}

}  // namespace rotary
}  // namespace
}  // namespace specextend::cpu
