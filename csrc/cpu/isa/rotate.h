#pragma once

// Rotation of one key by other positions, compiled once per instruction set by table.h. Nothing is
// fused, so a key gives the same bits on every instruction set.

#include "cpu/isa/simd.h"

namespace specextend::cpu {
namespace {  // one copy per instruction set
namespace rotary {

using simd::Floats;
using simd::kLanes;
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));

SPECEXTEND_ALWAYS_INLINE Floats load_key(const float* p) { return simd::load(p); }
SPECEXTEND_ALWAYS_INLINE void store_key(float* p, Floats x) { simd::store(p, x); }

SPECEXTEND_ALWAYS_INLINE Floats load_key(const simd::BFloat16* p) {
  Shorts bits;
  memcpy(&bits, p, sizeof(bits));
  return reinterpret_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
}
SPECEXTEND_ALWAYS_INLINE void store_key(simd::BFloat16* p, Floats x) {
  const Words bits = reinterpret_cast<Words>(x);
  const Words nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Shorts y = __builtin_convertvector(x != x ? bits >> 16 | 0x40 : nearest, Shorts);
  memcpy(p, &y, sizeof(y));
}

SPECEXTEND_ALWAYS_INLINE Floats load_key(const simd::Half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Floats x;
  for (int i = 0; i < kLanes; ++i) x[i] = simd::to_float(p[i]);
  return x;
#endif
}
SPECEXTEND_ALWAYS_INLINE void store_key(simd::Half* p, Floats x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) simd::from_float(x[i], p + i);
#endif
}

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
    const Floats x = load_key(a + i), y = load_key(b + i);
    const Floats c = simd::load(cos + i), s = simd::load(sin + i);
    store_key(to_a + i, x * c - y * s);
    store_key(to_b + i, y * c + x * s);
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
