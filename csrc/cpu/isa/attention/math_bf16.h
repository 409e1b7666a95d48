#pragma once

// Words of two bf16, as AVX-512-BF16 multiplies them.

#include "cpu/isa/attention/math.h"

namespace specextend::cpu {
namespace {
namespace attention {

// vdpbf16ps adds the product of the high halves first, then that of the low ones, each rounded. The
// earlier of two keys is in the high half, so that keys are summed one after the other.
struct BFloat16Math {
  static constexpr int kPerWord = 2;

  SPECEXTEND_ALWAYS_INLINE static Floats multiply_add(Floats sum, Floats a, Floats b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  // Returns kTileWords words at p: 0 past the first `words`.
  SPECEXTEND_ALWAYS_INLINE static Tile load(const BFloat16* p, int words) {
    return words >= 8 ? _mm256_loadu_ps(reinterpret_cast<const float*>(p))
                      : _mm256_maskz_loadu_ps(__mmask8((1u << words) - 1), p);
  }

  SPECEXTEND_ALWAYS_INLINE static void copy_words(const BFloat16* from, float* to, int words) {
    memcpy(to, from, size_t(words) * 4);
  }

  // Makes words of the weights of n keys, a multiple of kLanes; one more vector may be read.
  SPECEXTEND_ALWAYS_INLINE static void store_weights(const float* p, float* words, int n) {
    for (int i = 0; i < n; i += 2 * kLanes) {
      const __m512bh pairs = _mm512_cvtne2ps_pbh(simd::load(p + i + kLanes), simd::load(p + i));
      const __m512i swapped = _mm512_rol_epi32(reinterpret_cast<__m512i>(pairs), 16);
      store(words + i / 2, reinterpret_cast<Floats>(swapped));
    }
  }

  // Makes words of two rows, with the first one's elements in the high halves.
  SPECEXTEND_ALWAYS_INLINE static void interleave(__m512i a, __m512i b, Floats x[2]) {
    const __m512i low =
        _mm512_set_epi16(15, 47, 14, 46, 13, 45, 12, 44, 11, 43, 10, 42, 9, 41, 8, 40, 7, 39, 6, 38,
                         5, 37, 4, 36, 3, 35, 2, 34, 1, 33, 0, 32);
    const __m512i high =
        _mm512_set_epi16(31, 63, 30, 62, 29, 61, 28, 60, 27, 59, 26, 58, 25, 57, 24, 56, 23, 55, 22,
                         54, 21, 53, 20, 52, 19, 51, 18, 50, 17, 49, 16, 48);
    x[0] = reinterpret_cast<Floats>(_mm512_permutex2var_epi16(a, low, b));
    x[1] = reinterpret_cast<Floats>(_mm512_permutex2var_epi16(a, high, b));
  }

  // Writes words [begin, begin + width) of two rows of `dim` elements: 0 past their end, or for one
  // that is null.
  SPECEXTEND_ALWAYS_INLINE static void pack_value_row(const BFloat16* const from[2], int begin,
                                                      int dim, int width, float* to) {
    for (int d = 0; d < width; d += 2 * kLanes) {
      const int some = dim - begin - d;
      const __mmask32 mask = some >= 32 ? ~0u : (1u << some) - 1;
      const __m512i a = _mm512_maskz_loadu_epi16(from[0] ? mask : 0, from[0] + begin + d);
      const __m512i b = _mm512_maskz_loadu_epi16(from[1] ? mask : 0, from[1] + begin + d);
      Floats x[2];
      interleave(a, b, x);
      store(to + d, x[0]);
      if (d + kLanes < width) store(to + d + kLanes, x[1]);
    }
  }
};

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
