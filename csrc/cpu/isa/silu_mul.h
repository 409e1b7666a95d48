#pragma once

// silu(gate) * up of 16-bit numbers, compiled once per instruction set by table.h. Every silu is
// the nearest to torch's; nothing is fused, so the bits are the same on every instruction set.

#include "cpu/isa.h"
#include "cpu/isa/elements.h"
#include "cpu/isa/vocab.h"
#include "rows.h"

namespace specextend::cpu {
namespace {  // one copy per instruction set
namespace rows {

SPECEXTEND_ALWAYS_INLINE simd::Floats silu(simd::Floats x) {
  constexpr float kMost = 88.7f;  // exponentials of more are infinite
  const simd::Floats e = -x > kMost ? simd::broadcast(INFINITY) : vocab::exp(-x);
  return x / (e + 1.f);
}

template <typename T>
void silu_mul(const SiluMulParams& p, int64_t begin, int64_t end) {
  const int64_t length = p.shape.length;
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = row_begin<T>(p.shape, p.gate, row);
    const T* up = row_begin<T>(p.shape, p.up, row);
    T* out = static_cast<T*>(p.out) + row * length;
    for (int64_t i = 0; i < length; i += simd::kLanes) {
      const int64_t count = length - i;
      const simd::Floats y = simd::rounded<T>(silu(simd::load_elements(gate + i, count)));
      simd::store_elements(out + i, y * simd::load_elements(up + i, count), count);
    }
  }
}

}  // namespace rows
}  // namespace
}  // namespace specextend::cpu
