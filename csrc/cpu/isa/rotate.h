#pragma once

// Rotation of one key by other positions, compiled once per instruction set by table.h. Nothing is
// fused, so a key gives the same bits on every instruction set.

#include "cpu/isa/elements.h"

namespace specextend::cpu {
namespace {  // one copy per instruction set
namespace rotary {

using simd::Floats;
using simd::kLanes;

// Turns a pair (a, b) into (a cos - b sin, b cos + a sin).
template <typename T>
SPECEXTEND_ALWAYS_INLINE void rotate_pair(T a, T b, float cos, float sin, T* to_a, T* to_b) {
  const float x = simd::to_float(a), y = simd::to_float(b);
  simd::from_float(x * cos - y * sin, to_a);
  simd::from_float(y * cos + x * sin, to_b);
}

template <typename T>
void rotate_halves(const void* from, void* to, const float* cos, const float* sin, int pairs) {
  const T *a = static_cast<const T*>(from), *b = a + pairs;
  T *to_a = static_cast<T*>(to), *to_b = to_a + pairs;
  int i = 0;
  for (; i + kLanes <= pairs; i += kLanes) {
    const Floats x = simd::load_elements(a + i), y = simd::load_elements(b + i);
    const Floats c = simd::load(cos + i), s = simd::load(sin + i);
    simd::store_elements(to_a + i, x * c - y * s);
    simd::store_elements(to_b + i, y * c + x * s);
  }
  for (; i < pairs; ++i) rotate_pair(a[i], b[i], cos[i], sin[i], to_a + i, to_b + i);
}

template <typename T>
void rotate_neighbours(const void* from, void* to, const float* cos, const float* sin, int pairs) {
  const T* x = static_cast<const T*>(from);
  T* y = static_cast<T*>(to);
  for (int i = 0; i < pairs; ++i)
    rotate_pair(x[2 * i], x[2 * i + 1], cos[i], sin[i], y + 2 * i, y + 2 * i + 1);
}

template <typename T>
constexpr RotateKernels kernels() {
  return {rotate_halves<T>, rotate_neighbours<T>};
}

}  // namespace rotary
}  // namespace
}  // namespace specextend::cpu
