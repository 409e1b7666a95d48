#pragma once

// silu(gate) * up of 16-bit numbers, compiled once per instruction set by table.h. Exponentials
// have the last bits of their instruction set; rounded to 16 bits, silu has none: it is torch's.

#include "cpu/isa.h"
#include "cpu/isa/elements.h"
#include "rows.h"
#include "vocab.h"

namespace specextend::cpu {
namespace {  // one copy per instruction set
namespace rows {

// Returns exp(x) by the reduction and the polynomial of exp_nonpositive (csrc/vocab.h), products
// fused into sums where the instruction set does that; infinity above 88.7, 0 below -87.
SPECEXTEND_ALWAYS_INLINE simd::Floats exp(simd::Floats x) {
  using simd::broadcast, simd::fma, simd::Floats;
  const Floats shifted = fma(x, broadcast(Exp32::kLog2E), broadcast(Exp32::kRound));
  const Floats n = shifted - Exp32::kRound;
  const Floats r = fma(n, broadcast(-Exp32::kLn2Low), fma(n, broadcast(-Exp32::kLn2High), x));
  Floats p = fma(r, broadcast(Exp32::kP4), broadcast(Exp32::kP3));
  p = fma(p, r, broadcast(Exp32::kP2));
  p = fma(p, r, broadcast(Exp32::kP1));
  p = fma(p, r, broadcast(Exp32::kP0));
  p = fma(p, r * r, r) + 1.f;
  p = simd::as_floats(simd::as_ints(p) + (simd::as_ints(shifted) << 23));
  p = x < Exp32::kLeast ? broadcast(0.f) : p;
  return x > 88.7f ? broadcast(INFINITY) : p;
}

template <typename T>
void silu_mul(const SiluMulParams& p, int64_t begin, int64_t end) {
  const int64_t length = p.shape.length;
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = row_begin<T>(p.shape, p.gate, row);
    const T* up = row_begin<T>(p.shape, p.up, row);
    T* out = static_cast<T*>(p.out) + row * length;
    simd::for_elements(length, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      const simd::Floats x = simd::load_elements(gate + i, count);
      const simd::Floats silu = simd::rounded<T>(x / (exp(-x) + 1.f));
      simd::store_elements(out + i, silu * simd::load_elements(up + i, count), count);
    });
  }
}

}  // namespace rows
}  // namespace
}  // namespace specextend::cpu
