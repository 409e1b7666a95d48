#pragma once

// This is one register of floats, of the width that the including translation unit is compiled for,
// and the elementary functions on it. Everything has internal linkage: one copy per instruction
// set.

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace specextend::cpu {
namespace {
namespace simd {

#define SPECEXTEND_ALWAYS_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

SPECEXTEND_ALWAYS_INLINE Floats load(const void* p) {
  Floats x;
  memcpy(&x, p, sizeof(x));
  return x;
}
SPECEXTEND_ALWAYS_INLINE void store(void* p, Floats x) { memcpy(p, &x, sizeof(x)); }
SPECEXTEND_ALWAYS_INLINE Floats broadcast(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#else
  return Floats{} + x;
#endif
}
SPECEXTEND_ALWAYS_INLINE Floats as_floats(Ints x) { return reinterpret_cast<Floats>(x); }
SPECEXTEND_ALWAYS_INLINE Ints as_ints(Floats x) { return reinterpret_cast<Ints>(x); }

SPECEXTEND_ALWAYS_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// Returns a > b ? a : b, which is b where either is NaN.
SPECEXTEND_ALWAYS_INLINE Floats max(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

SPECEXTEND_ALWAYS_INLINE float reduce_max(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float most = x[0];
  for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
#endif
}

SPECEXTEND_ALWAYS_INLINE float reduce_add(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float lanes[kLanes];
  store(lanes, x);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
#endif
}

// Returns in lane i the sum of the vector at p + i * kLanes.
SPECEXTEND_ALWAYS_INLINE Floats reduce_add_each(const float* p) {
#if defined(__AVX512F__)
  // Halves, quarters, pairs and words are folded; the order of loading makes the lanes come out
  // right.
  constexpr int kOrder[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
  Floats v[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[kOrder[i]] = load(p + i * kLanes);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    v[i] = _mm512_shuffle_f32x4(v[i], v[i + 8], 0x44) + _mm512_shuffle_f32x4(v[i], v[i + 8], 0xee);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    v[i] = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88) + _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512d a = _mm512_castps_pd(v[i]), b = _mm512_castps_pd(v[i + 2]);
    v[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  return _mm512_shuffle_ps(v[0], v[1], 0x88) + _mm512_shuffle_ps(v[0], v[1], 0xdd);
#else
  Floats sums;
  for (int i = 0; i < kLanes; ++i) sums[i] = reduce_add(load(p + i * kLanes));
  return sums;
#endif
}

SPECEXTEND_ALWAYS_INLINE bool any_at_least(Floats x, float y) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(x, broadcast(y), _CMP_GE_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(x, broadcast(y), _CMP_GE_OQ)) != 0;
#else
  for (int i = 0; i < kLanes; ++i)
    if (x[i] >= y) return true;
  return false;
#endif
}

SPECEXTEND_ALWAYS_INLINE Ints lane_ids() {
  Ints ids{};
  for (int i = 0; i < kLanes; ++i) ids[i] = i;
  return ids;
}

// Returns x with `other` outside of lanes [begin, end).
SPECEXTEND_ALWAYS_INLINE Floats keep_lanes(Floats x, int begin, int end, float other) {
  const Ints ids = lane_ids();
  return (ids >= begin) & (ids < end) ? x : broadcast(other);
}

// Splits x into n + f, |f| <= 1/2, and returns 2^n (with AVX-512 n, for scalef) and 2^f - 1. 2^n is
// 0 below -127 (-200 with AVX-512).
SPECEXTEND_ALWAYS_INLINE void split_exp2(Floats x, Floats* power, Floats* rest) {
#if defined(__AVX512F__)
  x = _mm512_max_ps(broadcast(-200.f), x);
  const Floats n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  *power = n;  // an exponent, for scalef
#elif defined(__AVX2__)
  x = _mm256_max_ps(broadcast(-127.f), x);
  const Floats n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  *power = as_floats((reinterpret_cast<Ints>(_mm256_cvtps_epi32(n)) + 127) << 23);
#else
  x = broadcast(-127.f) > x ? broadcast(-127.f) : x;
  const Ints i = __builtin_convertvector(x - 0.5f, Ints);  // x <= 0: truncation rounds to nearest
  const Floats n = __builtin_convertvector(i, Floats);
  *power = as_floats((i + 127) << 23);
#endif
  const Floats f = x - n;
  // This is the minimax polynomial of (2^f - 1) / f, with a relative error of 2e-8.
  Floats q = broadcast(0x1.4308fap-13f);
  q = fma(q, f, broadcast(0x1.5f07b4p-10f));
  q = fma(q, f, broadcast(0x1.3b2ba0p-7f));
  q = fma(q, f, broadcast(0x1.c6af6ep-5f));
  q = fma(q, f, broadcast(0x1.ebfbdep-3f));
  q = fma(q, f, broadcast(0x1.62e430p-1f));
  *rest = q * f;
}

// Returns 2^x for x <= 0: exactly 1 at 0, exactly 0 at -inf.
SPECEXTEND_ALWAYS_INLINE Floats exp2(Floats x) {
  Floats power, rest;
  split_exp2(x, &power, &rest);
#if defined(__AVX512F__)
  return _mm512_scalef_ps(rest + 1.f, power);
#else
  return (rest + 1.f) * power;
#endif
}

SPECEXTEND_ALWAYS_INLINE float exp2(float x) { return exp2(broadcast(x))[0]; }

SPECEXTEND_ALWAYS_INLINE Floats tanh(Floats x) {
  const Ints sign = as_ints(x) & int32_t(0x80000000);
  const Floats y = as_floats(as_ints(x) ^ sign) * -2.885390081777927f;  // -2 |x| log2(e)
  Floats power, rest;
  split_exp2(y, &power, &rest);
#if defined(__AVX512F__)
  power = _mm512_scalef_ps(broadcast(1.f), power);
#endif
  const Floats e = fma(power, rest, power - 1.f);  // exp(-2 |x|) - 1 without cancellation
  return as_floats(as_ints(-e / (e + 2.f)) | sign);
}

// Returns log2(x) for normal x > 0.
SPECEXTEND_ALWAYS_INLINE Floats log2(Floats x) {
  const Ints exponent = (as_ints(x) - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  const Floats t = as_floats(as_ints(x) - (exponent << 23)) - 1.f;
  // The series is that of log(1 + t) = 2 atanh(t / (t + 2)), |s| < 0.1716.
  const Floats s = t / (t + 2.f), z = s * s;
  Floats q = broadcast(1.f / 9);
  q = fma(q, z, broadcast(1.f / 7));
  q = fma(q, z, broadcast(1.f / 5));
  q = fma(q, z, broadcast(1.f / 3));
  q = fma(q, z, broadcast(1.f));
  return fma(q, s * 2.885390081777927f, __builtin_convertvector(exponent, Floats));
}

// These convert element by element, for edges and for machines without the instructions.
SPECEXTEND_ALWAYS_INLINE float to_float(float x) { return x; }
SPECEXTEND_ALWAYS_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
SPECEXTEND_ALWAYS_INLINE float to_float(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // The exponent is re-biased by a product, which also makes subnormals right.
  const uint32_t shifted = uint32_t(x.bits & 0x7fff) << 13, special = (x.bits & 0x7c00) == 0x7c00;
  float y;
  memcpy(&y, &shifted, 4);
  y *= 0x1p112f;
  uint32_t bits;
  memcpy(&bits, &y, 4);
  bits = (special ? shifted | 0x7f800000u : bits) | uint32_t(x.bits & 0x8000) << 16;
  memcpy(&y, &bits, 4);
  return y;
#endif
}

SPECEXTEND_ALWAYS_INLINE void from_float(float x, float* y) { *y = x; }
SPECEXTEND_ALWAYS_INLINE void from_float(float x, BFloat16* y) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  y->bits = uint16_t(x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
SPECEXTEND_ALWAYS_INLINE void from_float(float x, Half* y) {
#if defined(__F16C__)
  y->bits = uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) {
    bits = 0x7e00;
  } else if (bits >= 0x47800000) {  // 2^16 and more
    bits = 0x7c00;
  } else if (bits < 0x38800000) {  // subnormal: adding 1/2 leaves its bits at the bottom
    float small;
    memcpy(&small, &bits, 4);
    small += 0.5f;
    memcpy(&bits, &small, 4);
    bits -= 0x3f000000;
  } else {
    bits = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  y->bits = uint16_t(bits | sign);
#endif
}

constexpr int kTileWords = kLanes < 8 ? kLanes : 8;

// A tile is kTileWords floats: half a register with AVX-512, else one.
#if defined(__AVX2__)
typedef __m256 Tile;
SPECEXTEND_ALWAYS_INLINE Tile load_tile(const float* p) { return _mm256_loadu_ps(p); }
SPECEXTEND_ALWAYS_INLINE Tile load_tile(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SPECEXTEND_ALWAYS_INLINE Tile load_tile(const BFloat16* p) {
  // The elements go to the upper halves of words, above zeros: one instruction beside the load.
  const __m256i spread =
      _mm256_set_epi8(15, 14, -1, -1, 13, 12, -1, -1, 11, 10, -1, -1, 9, 8, -1, -1, 7, 6, -1, -1, 5,
                      4, -1, -1, 3, 2, -1, -1, 1, 0, -1, -1);
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(x), spread));
}
#else
typedef Floats Tile;
template <typename T>
SPECEXTEND_ALWAYS_INLINE Tile load_tile(const T* p) {
  Floats x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
  return x;
}
#endif
// Returns a register of tiles side by side: tile(0), and with AVX-512 tile(1) behind it.
template <typename F>
SPECEXTEND_ALWAYS_INLINE Floats join_tiles(const F& tile) {
#if defined(__AVX512F__)
  return _mm512_insertf32x8(_mm512_castps256_ps512(tile(0)), tile(1), 1);
#else
  return tile(0);
#endif
}

#if defined(__AVX512F__)
SPECEXTEND_ALWAYS_INLINE Floats load_floats(const float* p) { return load(p); }
template <typename T>
SPECEXTEND_ALWAYS_INLINE Floats load_floats(const T* p) {
  return join_tiles([&](int i) { return load_tile(p + i * kTileWords); });
}
#endif

// Transposes a tile of keys x words. As loaded, register i holds kTileWords words of key i (with
// AVX-512, of keys i and i + 8); transposed, it holds word i of kLanes keys.
SPECEXTEND_ALWAYS_INLINE void transpose(Floats rows[kTileWords]) {
#if defined(__AVX512F__)
  __m512d u[8];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i], rows[i + 1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i], rows[i + 1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i + 2], rows[i + 3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i + 2], rows[i + 3]));
    u[i] = _mm512_unpacklo_pd(a, c);
    u[i + 1] = _mm512_unpackhi_pd(a, c);
    u[i + 2] = _mm512_unpacklo_pd(b, d);
    u[i + 3] = _mm512_unpackhi_pd(b, d);
  }
  // The quarters of u[i] are word i of keys 0-3, word i + 4 of the same, word i of keys 8-11, word
  // i + 4 of the same; those of u[i + 4] belong to keys 4-7 and 12-15.
  const __m512i low = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0);
  const __m512i high = _mm512_set_epi64(15, 14, 7, 6, 11, 10, 3, 2);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_castpd_ps(_mm512_permutex2var_pd(u[i], low, u[i + 4]));
    rows[i + 4] = _mm512_castpd_ps(_mm512_permutex2var_pd(u[i], high, u[i + 4]));
  }
#elif defined(__AVX2__)
  Floats t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    rows[j] = _mm256_permute2f128_ps(u[j], u[j + 4], 0x20);
    rows[j + 4] = _mm256_permute2f128_ps(u[j], u[j + 4], 0x31);
  }
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const float x = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = x;
    }
#endif
}

}  // namespace simd
}  // namespace
}  // namespace specextend::cpu
