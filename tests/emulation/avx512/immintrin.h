#pragma once

// Stands in for the compiler's header of this name: the AVX-512 instructions that csrc/cpu/isa/
// uses, for a processor that has AVX2: by AVX2 on halves where that has the same instruction, else
// lane by lane as Intel's Software Developer's Manual defines it.

#include_next <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1

namespace specextend::emulation::avx512 {

// An instruction is a call: inlined and unrolled, the kernels' loops would compile for minutes.
#define SPECEXTEND_CALLED static __attribute__((noinline))
#define SPECEXTEND_LANEWISE static inline __attribute__((always_inline))

template <typename To, typename From>
SPECEXTEND_LANEWISE To cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same register");
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

// Puts f(i) into lane i.
template <typename V, typename F>
SPECEXTEND_LANEWISE V lanes(F f) {
  V x;
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = f(i);
  return x;
}

template <typename Half>
struct Halves {
  Half low, high;
};

SPECEXTEND_LANEWISE Halves<__m256> halves(__m512 x) { return cast<Halves<__m256>>(x); }

// --- Arithmetic ---

SPECEXTEND_CALLED __m512 max_ps(__m512 a, __m512 b) {
  const Halves<__m256> x = halves(a), y = halves(b);
  return cast<__m512>(Halves<__m256>{_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high)});
}

SPECEXTEND_CALLED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const Halves<__m256> x = halves(a), y = halves(b), z = halves(c);
  return cast<__m512>(Halves<__m256>{_mm256_fmadd_ps(x.low, y.low, z.low),
                                     _mm256_fmadd_ps(x.high, y.high, z.high)});
}

// Gives a 2^floor(b), rounded once, for |b| <= 1000 and NaN.
SPECEXTEND_CALLED __m512 scalef_ps(__m512 a, __m512 b) {
  return lanes<__m512>([&](unsigned i) {
    const float power = floorf(b[i]);
    if (power != power) return power;
    const uint64_t bits = uint64_t(int64_t(power) + 1023) << 52;
    return float(double(a[i]) * cast<double>(bits));
  });
}

template <int kRounding>
SPECEXTEND_CALLED __m512 roundscale_ps(__m512 x) {
  static_assert(kRounding >> 4 == 0, "to integers");
  const Halves<__m256> y = halves(x);
  return cast<__m512>(
      Halves<__m256>{_mm256_round_ps(y.low, kRounding), _mm256_round_ps(y.high, kRounding)});
}

template <int kRelation>
SPECEXTEND_CALLED __mmask16 cmp_ps_mask(__m512 a, __m512 b) {
  const Halves<__m256> x = halves(a), y = halves(b);
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.low, y.low, kRelation));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(x.high, y.high, kRelation));
  return __mmask16(low | high << 8);
}

// Compilers fold halves onto each other.
template <typename F>
SPECEXTEND_LANEWISE float fold(__m512 x, F f) {
  for (unsigned n = 8; n > 0; n /= 2)
    for (unsigned i = 0; i < n; ++i) x[i] = f(x[i + n], x[i]);
  return x[0];
}
SPECEXTEND_CALLED float reduce_add_ps(__m512 x) {
  return fold(x, [](float a, float b) { return a + b; });
}
SPECEXTEND_CALLED float reduce_max_ps(__m512 x) {
  return fold(x, [](float a, float b) { return a > b ? a : b; });
}

template <int kBits>
SPECEXTEND_LANEWISE __m512i rol_epi32(__m512i x) {
  typedef uint32_t Words __attribute__((vector_size(64)));
  const Words words = cast<Words>(x);
  return cast<__m512i>(words << kBits | words >> (32 - kBits));
}

// --- Conversions ---

SPECEXTEND_CALLED __m512 cvtph_ps(__m256i x) {
  const auto y = cast<Halves<__m128i>>(x);
  return cast<__m512>(Halves<__m256>{_mm256_cvtph_ps(y.low), _mm256_cvtph_ps(y.high)});
}

template <int kRounding>
SPECEXTEND_CALLED __m256i cvtps_ph(__m512 x) {
  const Halves<__m256> y = halves(x);
  return cast<__m256i>(
      Halves<__m128i>{_mm256_cvtps_ph(y.low, kRounding), _mm256_cvtps_ph(y.high, kRounding)});
}

SPECEXTEND_CALLED __m512d cvtps_pd(__m256 x) {
  const auto y = cast<Halves<__m128>>(x);
  return cast<__m512d>(Halves<__m256d>{_mm256_cvtps_pd(y.low), _mm256_cvtps_pd(y.high)});
}

// --- bf16, whatever MXCSR says: to the nearest, ties to even; denormal numbers are 0 ---

SPECEXTEND_LANEWISE uint32_t flush(uint32_t x) { return x & 0x7f800000 ? x : x & 0x80000000; }

SPECEXTEND_LANEWISE uint16_t to_bf16(float x) {
  const uint32_t bits = flush(cast<uint32_t>(x));
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

typedef uint16_t Shorts __attribute__((vector_size(64)));

// The second operand's elements come first.
SPECEXTEND_CALLED __m512bh cvtne2ps_pbh(__m512 a, __m512 b) {
  return cast<__m512bh>(
      lanes<Shorts>([&](unsigned i) { return to_bf16(i < 16 ? b[i] : a[i - 16]); }));
}

SPECEXTEND_LANEWISE __m256 flush(__m256 x) {
  const __m256i exponent = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7f800000));
  const __m256i small = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
  const __m256i magnitude = _mm256_and_si256(small, _mm256_set1_epi32(0x7fffffff));
  return _mm256_andnot_ps(_mm256_castsi256_ps(magnitude), x);
}

// Gives sum + a b of the odd elements, then of the even ones.
SPECEXTEND_LANEWISE __m256 add_products(__m256 sum, __m256i a, __m256i b) {
  const __m256i odd = _mm256_set1_epi32(int(0xffff0000));
  const auto add = [&](__m256i x, __m256i y) __attribute__((always_inline)) {
    sum = flush(_mm256_fmadd_ps(flush(_mm256_castsi256_ps(x)), flush(_mm256_castsi256_ps(y)), sum));
  };
  sum = flush(sum);
  add(_mm256_and_si256(a, odd), _mm256_and_si256(b, odd));
  add(_mm256_slli_epi32(a, 16), _mm256_slli_epi32(b, 16));
  return sum;
}

SPECEXTEND_CALLED __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const Halves<__m256> s = halves(sum);
  const auto x = cast<Halves<__m256i>>(a), y = cast<Halves<__m256i>>(b);
  return cast<__m512>(
      Halves<__m256>{add_products(s.low, x.low, y.low), add_products(s.high, x.high, y.high)});
}

// --- Loads. What a mask leaves out is not touched ---

SPECEXTEND_LANEWISE __m512i loadu_si512(const void* p) {
  __m512i x;
  memcpy(&x, p, sizeof(x));
  return x;
}

SPECEXTEND_CALLED __m512i maskz_loadu_epi16(__mmask32 mask, const void* p) {
  const auto* from = static_cast<const uint16_t*>(p);
  Shorts x{};
  for (unsigned i = 0; i < 32; ++i)
    if (mask >> i & 1) memcpy(reinterpret_cast<uint16_t*>(&x) + i, from + i, 2);
  return cast<__m512i>(x);
}

SPECEXTEND_CALLED __m256 maskz_loadu_ps(__mmask8 mask, const void* p) {
  __m256 x{};
  for (unsigned i = 0; i < 8; ++i)
    if (mask >> i & 1)
      memcpy(reinterpret_cast<float*>(&x) + i, static_cast<const float*>(p) + i, 4);
  return x;
}

// --- Movements ---

SPECEXTEND_CALLED __m512 set1_ps(float x) {
  return lanes<__m512>([&](unsigned) { return x; });
}

// The last argument is lane 0.
template <typename V, typename Lane, typename... More>
SPECEXTEND_CALLED __m512i set(More... values) {
  const Lane reversed[] = {Lane(values)...};
  constexpr unsigned kLanes = sizeof...(More);
  return cast<__m512i>(lanes<V>([&](unsigned i) { return reversed[kLanes - 1 - i]; }));
}

// The quarters are two of a, then two of b.
template <int kWhich>
SPECEXTEND_CALLED __m512 shuffle_f32x4(__m512 a, __m512 b) {
  return lanes<__m512>([&](unsigned i) {
    const unsigned quarter = unsigned(kWhich) >> i / 4 * 2 & 3;
    return (i < 8 ? a : b)[quarter * 4 + i % 4];
  });
}

// Every quarter has two of a, then two of b.
template <int kWhich>
SPECEXTEND_CALLED __m512 shuffle_ps(__m512 a, __m512 b) {
  return lanes<__m512>([&](unsigned i) {
    const unsigned lane = unsigned(kWhich) >> i % 4 * 2 & 3;
    return (i % 4 < 2 ? a : b)[i / 4 * 4 + lane];
  });
}

// Every quarter has those of the low (high) half of a and of b, in turn.
template <typename V, unsigned kHigh>
SPECEXTEND_CALLED V unpack(V a, V b) {
  constexpr unsigned kInQuarter = 16 / sizeof(a[0]);
  return lanes<V>([&](unsigned i) {
    const unsigned at = i % kInQuarter;
    return (at % 2 ? b : a)[i - at + at / 2 + kHigh * kInQuarter / 2];
  });
}

// Lane i has, of a and b one behind the other, the one with the index in lane i of `which`.
template <typename V, typename Indices>
SPECEXTEND_CALLED V permutex2var(V a, __m512i which, V b) {
  constexpr unsigned kLanes = sizeof(V) / sizeof(a[0]);
  const Indices indices = cast<Indices>(which);
  return lanes<V>([&](unsigned i) {
    const unsigned lane = unsigned(indices[i]);
    return (lane & kLanes ? b : a)[lane % kLanes];
  });
}

template <int kHalf>
SPECEXTEND_LANEWISE __m512 insertf32x8(__m512 x, __m256 half) {
  Halves<__m256> y = halves(x);
  (kHalf ? y.high : y.low) = half;
  return cast<__m512>(y);
}

template <int kHalf>
SPECEXTEND_LANEWISE __m256 extractf32x8_ps(__m512 x) {
  const Halves<__m256> y = halves(x);
  return kHalf ? y.high : y.low;
}

typedef uint64_t Longs __attribute__((vector_size(64)));

}  // namespace specextend::emulation::avx512

#define SPECEXTEND_AVX512 specextend::emulation::avx512
#define _mm256_maskz_loadu_ps SPECEXTEND_AVX512::maskz_loadu_ps
#define _mm512_castpd_ps SPECEXTEND_AVX512::cast<__m512>
#define _mm512_castps_pd SPECEXTEND_AVX512::cast<__m512d>
#define _mm512_castps256_ps512(x) SPECEXTEND_AVX512::insertf32x8<0>(__m512{}, x)
#define _mm512_castps512_ps256 SPECEXTEND_AVX512::extractf32x8_ps<0>
#define _mm512_cmp_ps_mask(a, b, relation) SPECEXTEND_AVX512::cmp_ps_mask<relation>(a, b)
#define _mm512_cvtne2ps_pbh SPECEXTEND_AVX512::cvtne2ps_pbh
#define _mm512_cvtph_ps SPECEXTEND_AVX512::cvtph_ps
#define _mm512_cvtps_pd SPECEXTEND_AVX512::cvtps_pd
#define _mm512_cvtps_ph(x, rounding) SPECEXTEND_AVX512::cvtps_ph<rounding>(x)
#define _mm512_dpbf16_ps SPECEXTEND_AVX512::dpbf16_ps
#define _mm512_extractf32x8_ps(x, half) SPECEXTEND_AVX512::extractf32x8_ps<half>(x)
#define _mm512_fmadd_ps SPECEXTEND_AVX512::fmadd_ps
#define _mm512_insertf32x8(x, y, half) SPECEXTEND_AVX512::insertf32x8<half>(x, y)
#define _mm512_loadu_si512 SPECEXTEND_AVX512::loadu_si512
#define _mm512_maskz_loadu_epi16 SPECEXTEND_AVX512::maskz_loadu_epi16
#define _mm512_max_ps SPECEXTEND_AVX512::max_ps
#define _mm512_permutex2var_epi16(a, which, b)                                               \
  SPECEXTEND_AVX512::cast<__m512i>(                                                          \
      SPECEXTEND_AVX512::permutex2var<SPECEXTEND_AVX512::Shorts, SPECEXTEND_AVX512::Shorts>( \
          SPECEXTEND_AVX512::cast<SPECEXTEND_AVX512::Shorts>(a), which,                      \
          SPECEXTEND_AVX512::cast<SPECEXTEND_AVX512::Shorts>(b)))
#define _mm512_permutex2var_pd SPECEXTEND_AVX512::permutex2var<__m512d, SPECEXTEND_AVX512::Longs>
#define _mm512_reduce_add_ps SPECEXTEND_AVX512::reduce_add_ps
#define _mm512_reduce_max_ps SPECEXTEND_AVX512::reduce_max_ps
#define _mm512_rol_epi32(x, bits) SPECEXTEND_AVX512::rol_epi32<bits>(x)
#define _mm512_roundscale_ps(x, rounding) SPECEXTEND_AVX512::roundscale_ps<rounding>(x)
#define _mm512_scalef_ps SPECEXTEND_AVX512::scalef_ps
#define _mm512_set1_ps SPECEXTEND_AVX512::set1_ps
#define _mm512_set_epi16 SPECEXTEND_AVX512::set<SPECEXTEND_AVX512::Shorts, uint16_t>
#define _mm512_set_epi64 SPECEXTEND_AVX512::set<SPECEXTEND_AVX512::Longs, uint64_t>
#define _mm512_shuffle_f32x4(a, b, which) SPECEXTEND_AVX512::shuffle_f32x4<which>(a, b)
#define _mm512_shuffle_ps(a, b, which) SPECEXTEND_AVX512::shuffle_ps<which>(a, b)
#define _mm512_unpackhi_pd SPECEXTEND_AVX512::unpack<__m512d, 1>
#define _mm512_unpackhi_ps SPECEXTEND_AVX512::unpack<__m512, 1>
#define _mm512_unpacklo_pd SPECEXTEND_AVX512::unpack<__m512d, 0>
#define _mm512_unpacklo_ps SPECEXTEND_AVX512::unpack<__m512, 0>
