#pragma once

// Passes over one row of logits, compiled once per instruction set by table.h.
//
// Sums are formed as csrc/vocab.h says, however wide the registers are. Nothing is fused or
// reordered, so a row gives the same bits on every instruction set.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/isa/simd.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace specextend::cpu {
namespace {  // one copy per instruction set
namespace vocab {

using simd::as_floats;
using simd::as_ints;
using simd::BFloat16;
using simd::broadcast;
using simd::Floats;
using simd::Half;
using simd::Ints;
using simd::load;
using simd::max;

constexpr int kWidth = simd::kLanes;
constexpr int kParts = kVocabLanes / kWidth;

typedef uint16_t Shorts __attribute__((vector_size(2 * kWidth)));
typedef double Doubles __attribute__((vector_size(4 * kWidth)));

// Returns bit i: a[i] >= b[i].
SPECEXTEND_ALWAYS_INLINE unsigned at_least(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
#elif defined(__AVX2__)
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
#elif defined(__SSE2__)
  return unsigned(_mm_movemask_ps(_mm_cmpge_ps(a, b)));
#else
  unsigned bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= unsigned(a[i] >= b[i]) << i;
  return bits;
#endif
}

SPECEXTEND_ALWAYS_INLINE bool any(Ints mask) {
  int32_t lanes[kWidth], all = 0;
  std::memcpy(lanes, &mask, sizeof(mask));
  for (int i = 0; i < kWidth; ++i) all |= lanes[i];
  return all != 0;
}

SPECEXTEND_ALWAYS_INLINE void widen(Floats x, Doubles& low, Doubles& high) {
#if defined(__AVX512F__)
  low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
#elif defined(__AVX2__)
  low = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
  high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
#elif defined(__SSE2__)
  low = _mm_cvtps_pd(x);
  high = _mm_cvtps_pd(_mm_movehl_ps(x, x));
#else
  for (int i = 0; i < kWidth / 2; ++i) low[i] = x[i], high[i] = x[kWidth / 2 + i];
#endif
}

SPECEXTEND_ALWAYS_INLINE Floats load_row(const float* x) { return load(x); }

SPECEXTEND_ALWAYS_INLINE Ints load_bits(const void* x) {
  Shorts bits;
  std::memcpy(&bits, x, sizeof(bits));
  return __builtin_convertvector(bits, Ints);
}

SPECEXTEND_ALWAYS_INLINE Floats load_row(const BFloat16* x) {
  return as_floats(load_bits(x) << 16);
}

SPECEXTEND_ALWAYS_INLINE Floats load_row(const Half* x) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  // The exponent is re-biased by a product, exact also for subnormals; infinity and NaN, whose
  // exponent stays all ones, are set apart.
  const Ints bits = load_bits(x);
  const Floats magnitude = as_floats((bits & 0x7fff) << 13) * 0x1p112f;
  const Ints special = ((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return as_floats(as_ints(magnitude) | special | ((bits & 0x8000) << 16));
#endif
}

struct Lanes {
  Floats part[kParts];
};

template <typename T>
SPECEXTEND_ALWAYS_INLINE Lanes load_lanes(const T* x) {
  Lanes v;
  for (int i = 0; i < kParts; ++i) v.part[i] = load_row(x + i * kWidth);
  return v;
}

SPECEXTEND_ALWAYS_INLINE float minus_infinity(const float*) { return -INFINITY; }
SPECEXTEND_ALWAYS_INLINE Half minus_infinity(const Half*) { return {0xfc00}; }
SPECEXTEND_ALWAYS_INLINE BFloat16 minus_infinity(const BFloat16*) { return {0xff80}; }

// Calls f(lanes, j) for x[j .. j + kVocabLanes); what is missing behind x[n) is -infinity.
template <typename T, typename F>
SPECEXTEND_ALWAYS_INLINE void for_lanes(const T* x, int n, const F& f) {
  int j = 0;
  for (; j + kVocabLanes <= n; j += kVocabLanes) f(load_lanes(x + j), j);
  if (j == n) return;
  T tail[kVocabLanes];
  for (int i = 0; i < kVocabLanes; ++i) tail[i] = j + i < n ? x[j + i] : minus_infinity(x);
  f(load_lanes(tail), j);
}

// Returns bit i: v[i] >= x.
SPECEXTEND_ALWAYS_INLINE unsigned at_least(const Lanes& v, float x) {
  unsigned bits = 0;
  const Floats bound = broadcast(x);
  for (int i = 0; i < kParts; ++i) bits |= at_least(v.part[i], bound) << (i * kWidth);
  return bits;
}

SPECEXTEND_ALWAYS_INLINE float highest(const Lanes& v) {
  float lanes[kVocabLanes];
  std::memcpy(lanes, v.part, sizeof(lanes));
  float best = lanes[0];
  for (int i = 1; i < kVocabLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// Returns the sum of all lanes: halves are added onto each other, down to one.
SPECEXTEND_ALWAYS_INLINE double add_lanes(const Doubles (&low)[kParts],
                                          const Doubles (&high)[kParts]) {
  double lanes[kVocabLanes];
  for (int i = 0; i < kParts; ++i) {
    std::memcpy(lanes + i * kWidth, &low[i], sizeof(low[i]));
    std::memcpy(lanes + i * kWidth + kWidth / 2, &high[i], sizeof(high[i]));
  }
  for (int w = kVocabLanes / 2; w > 0; w /= 2) {
    for (int i = 0; i < w; ++i) lanes[i] += lanes[i + w];
  }
  return lanes[0];
}

SPECEXTEND_ALWAYS_INLINE bool any_above(const Lanes& v, float x) {
  unsigned bits = 0;
  const Floats bound = broadcast(x);
  for (int i = 0; i < kParts; ++i) bits |= at_least(bound, v.part[i]) ^ ((1u << kWidth) - 1);
  return bits != 0;
}

// Computes exp_nonpositive(float) of csrc/vocab.h, lane by lane.
SPECEXTEND_ALWAYS_INLINE Floats exp(Floats x) {
  const Floats shifted = x * Exp32::kLog2E + Exp32::kRound;
  const Floats n = shifted - Exp32::kRound;
  const Floats r = (x - n * Exp32::kLn2High) - n * Exp32::kLn2Low;
  Floats p = r * Exp32::kP4 + Exp32::kP3;
  p = p * r + Exp32::kP2;
  p = p * r + Exp32::kP1;
  p = p * r + Exp32::kP0;
  p = p * (r * r) + r + 1.f;
  const Ints bits = as_ints(p) + (as_ints(shifted) << 23);
  return as_floats(bits & (x >= Exp32::kLeast));
}

template <typename T>
int64_t argmax(const void* row, int64_t n) {
  const T* x = static_cast<const T*>(row);
  float best = -INFINITY;
  int64_t best_block = -1;
  Ints nan{};
  for (int64_t begin = 0; begin < n; begin += kVocabBlock) {
    const int size = int(n - begin < kVocabBlock ? n - begin : kVocabBlock);
    Lanes m;
    for (Floats& part : m.part) part = broadcast(-INFINITY);
    for_lanes(x + begin, size, [&](const Lanes& v, int) __attribute__((always_inline)) {
      for (int i = 0; i < kParts; ++i) {
        m.part[i] = max(v.part[i], m.part[i]);
        nan |= v.part[i] != v.part[i];
      }
    });
    if (any_above(m, best)) {
      best = highest(m);
      best_block = begin;
    }
  }
  if (best_block < 0 || any(nan)) return -1;
  const int size = int(n - best_block < kVocabBlock ? n - best_block : kVocabBlock);
  int64_t index = -1;
  for_lanes(x + best_block, size, [&](const Lanes& v, int j) __attribute__((always_inline)) {
    const unsigned bits = at_least(v, best);
    if (bits && index < 0) index = best_block + j + __builtin_ctz(bits);
  });
  return index;
}

template <typename T>
RowStats row_stats(const void* row, int64_t n, float* block_refs, double* block_sums,
                   float* lane_max) {
  const T* x = static_cast<const T*>(row);
  float best = -INFINITY;
  Ints nan{};
  for (int64_t begin = 0, b = 0; begin < n; begin += kVocabBlock, ++b) {
    const int size = int(n - begin < kVocabBlock ? n - begin : kVocabBlock);
    Lanes m;
    for (Floats& part : m.part) part = broadcast(-INFINITY);
    for_lanes(x + begin, size, [&](const Lanes& v, int) __attribute__((always_inline)) {
      for (int i = 0; i < kParts; ++i) {
        m.part[i] = max(v.part[i], m.part[i]);
        nan |= v.part[i] != v.part[i];
      }
    });
    std::memcpy(lane_max + b * kVocabLanes, m.part, sizeof(m.part));
    const float ref = highest(m);
    best = ref > best ? ref : best;

    Doubles low[kParts] = {}, high[kParts] = {};
    const Floats bound = broadcast(ref);
    for_lanes(x + begin, size, [&](const Lanes& v, int) __attribute__((always_inline)) {
      for (int i = 0; i < kParts; ++i) {
        Doubles l, h;
        widen(exp(v.part[i] - bound), l, h);
        low[i] += l;
        high[i] += h;
      }
    });
    block_refs[b] = ref;
    block_sums[b] = add_lanes(low, high);
  }
  return {best, any(nan)};
}

template <typename T>
void exp_block(const void* row, int n, float ref, float* out) {
  const T* x = static_cast<const T*>(row);
  const Floats bound = broadcast(ref);
  for_lanes(x, n, [&](const Lanes& v, int j) __attribute__((always_inline)) {
    float e[kVocabLanes];
    for (int i = 0; i < kParts; ++i) {
      const Floats part = exp(v.part[i] - bound);
      std::memcpy(e + i * kWidth, &part, sizeof(part));
    }
    std::memcpy(out + j, e, sizeof(float) * size_t(n - j < kVocabLanes ? n - j : kVocabLanes));
  });
}

template <typename T>
int64_t collect(const void* row, int64_t n, const float* lane_max, float threshold,
                int64_t max_equal, float* values, int32_t* indices) {
  const T* x = static_cast<const T*>(row);
  const bool all = threshold == -INFINITY;
  int64_t count = 0;
  for (int64_t begin = 0, b = 0; begin < n; begin += kVocabBlock, ++b) {
    if (!at_least(load_lanes(lane_max + b * kVocabLanes), threshold)) continue;
    const int size = int(n - begin < kVocabBlock ? n - begin : kVocabBlock);
    for_lanes(x + begin, size, [&](const Lanes& v, int j) __attribute__((always_inline)) {
      const int left = size - j;
      unsigned bits = all ? 0xffff : at_least(v, threshold);
      if (left < kVocabLanes) bits &= (1u << left) - 1;
      if (!bits) return;
      float lanes[kVocabLanes];
      std::memcpy(lanes, v.part, sizeof(lanes));
      for (; bits; bits &= bits - 1) {
        const int i = __builtin_ctz(bits);
        const float value = lanes[i] == lanes[i] ? lanes[i] : -INFINITY;
        if (value == threshold && max_equal-- <= 0) continue;
        values[count] = value;
        indices[count++] = int32_t(begin + j + i);
      }
    });
  }
  return count;
}

template <typename T>
constexpr VocabKernels kernels() {
  return {argmax<T>, row_stats<T>, exp_block<T>, collect<T>};
}

}  // namespace vocab
}  // namespace
}  // namespace specextend::cpu
