#pragma once

// Elements of a dtype as a register of floats, and back, rounded to nearest even. The bits are the
// same on every instruction set.

#include "cpu/isa/simd.h"

namespace specextend::cpu {
namespace {  // one copy per instruction set
namespace simd {

typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));

// Returns the words whose lower halves are the nearest bf16 numbers. NaN stays NaN if its lower
// half is zeros, as that of every NaN is that comes of bf16 numbers.
SPECEXTEND_ALWAYS_INLINE Words nearest_bfloat16(Floats x) {
  const Words bits = reinterpret_cast<Words>(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

SPECEXTEND_ALWAYS_INLINE Floats load_elements(const float* p) { return load(p); }
SPECEXTEND_ALWAYS_INLINE void store_elements(float* p, Floats x) { store(p, x); }

SPECEXTEND_ALWAYS_INLINE Floats load_elements(const BFloat16* p) {
  Shorts bits;
  memcpy(&bits, p, sizeof(bits));
  return reinterpret_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
}
SPECEXTEND_ALWAYS_INLINE void store_elements(BFloat16* p, Floats x) {
  const Shorts y = __builtin_convertvector(nearest_bfloat16(x), Shorts);
  memcpy(p, &y, sizeof(y));
}

SPECEXTEND_ALWAYS_INLINE Floats load_elements(const Half* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Floats x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}
SPECEXTEND_ALWAYS_INLINE void store_elements(Half* p, Floats x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) from_float(x[i], p + i);
#endif
}

// Returns x as it is after it has been stored as T.
template <typename T>
SPECEXTEND_ALWAYS_INLINE Floats rounded(Floats x) {
  T elements[kLanes];
  store_elements(elements, x);
  return load_elements(elements);
}
template <>
SPECEXTEND_ALWAYS_INLINE Floats rounded<float>(Floats x) {
  return x;
}
template <>
SPECEXTEND_ALWAYS_INLINE Floats rounded<BFloat16>(Floats x) {
  return reinterpret_cast<Floats>(nearest_bfloat16(x) << 16);
}

// Loads or stores the first `count` elements, of at most a register; 0 is loaded behind them.
template <typename T>
SPECEXTEND_ALWAYS_INLINE Floats load_elements(const T* p, int64_t count) {
  if (count >= kLanes) return load_elements(p);
  T elements[kLanes] = {};
  memcpy(elements, p, size_t(count) * sizeof(T));
  return load_elements(elements);
}
template <typename T>
SPECEXTEND_ALWAYS_INLINE void store_elements(T* p, Floats x, int64_t count) {
  if (count >= kLanes) return store_elements(p, x);
  T elements[kLanes];
  store_elements(elements, x);
  memcpy(p, elements, size_t(count) * sizeof(T));
}

// Calls f(i, count) for elements [i, i + count) of `length`, a register at a time.
template <typename F>
SPECEXTEND_ALWAYS_INLINE void for_elements(int64_t length, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) f(i, kLanes);
  if (i < length) f(i, length - i);
}

}  // namespace simd
}  // namespace
}  // namespace specextend::cpu
