#pragma once

// Blocks without packing on AVX-512 (the contract is in direct.h): keys are transposed in
// registers, values go from memory into the sums.

#include "cpu/isa/attention/pack.h"
#if defined(__AVX512BF16__)
#include "cpu/isa/attention/math_bf16.h"
#endif

namespace specextend::cpu {
namespace {
namespace attention {

// Loads 2 x kLanes words of the row v.
template <typename T>
SPECEXTEND_ALWAYS_INLINE void load_value_words(Float32Math, const T* v, int64_t /*stride*/,
                                               Floats x[2]) {
  x[0] = load_floats(v);
  x[1] = load_floats(v + kLanes);
}
#if defined(__AVX512BF16__)
// Loads 2 x kLanes words of the row v and the next.
SPECEXTEND_ALWAYS_INLINE void load_value_words(BFloat16Math, const BFloat16* v, int64_t stride,
                                               Floats x[2]) {
  BFloat16Math::interleave(_mm512_loadu_si512(v), _mm512_loadu_si512(v + stride), x);
}
#endif

template <typename Math, typename T>
struct Direct {
  static constexpr int kRows = 8;

  static bool takes(int rows, int dim) { return rows <= kRows && dim % (4 * kLanes) == 0; }

  static void logits(const Product& p, const CacheRows<T>& k, float* /*room*/,
                     Prefetcher* prefetch) {
    with_constant<kRows>(p.rows, [&](auto rows) { logits_of<rows.value>(p, k, prefetch); });
  }

  static void values(const Product& p, const CacheRows<T>& v, Prefetcher* prefetch) {
    with_constant<kRows>(p.rows, [&](auto rows) {
      constexpr int R = rows.value;
      if constexpr (R <= 2) {
        if (p.columns % (8 * kLanes) == 0) return values_of<R, 8>(p, v, prefetch);
      }
      values_of<R, R <= 6 ? 4 : 2>(p, v, prefetch);
    });
  }

 private:
  template <int R>
  __attribute__((noinline)) static void logits_of(const Product& p, const CacheRows<T>& k,
                                                  Prefetcher* prefetch) {
    constexpr int kGroups = R <= 2 ? 4 : 2;  // of kLanes keys
    Prefetcher ahead = *prefetch;
    const float* const q = p.a;
    const T* const first = k.first;
    const int64_t stride = k.stride;
    const int words = p.steps;
    for (int col = 0; col < kBlock; col += kGroups * kLanes) {
      Floats sum[R][kGroups] = {};
      for (int w0 = 0; w0 < words; w0 += 2 * kTileWords) {
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 1
          for (int w = w0; w < w0 + 2 * kTileWords; w += kTileWords) {  // a cache line of each key
            Floats rows[kTileWords];
            load_transposed<Math>(first + (col + g * kLanes) * stride + w * Math::kPerWord, stride,
                                  kLanes, kTileWords, rows);
#pragma GCC unroll 8
            for (int i = 0; i < kTileWords; ++i) {
#pragma GCC unroll 8
              for (int r = 0; r < R; ++r)
                sum[r][g] = Math::multiply_add(sum[r][g], broadcast(q[r * words + w + i]), rows[i]);
              ahead.step();
            }
          }
        }
      }
      float* const c = p.c + col;
      const int64_t c_stride = p.c_stride;
      const float scale = p.scale;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) store(c + r * c_stride + g * kLanes, sum[r][g] * scale);
    }
    *prefetch = ahead;
  }

  template <int R, int N>
  __attribute__((noinline)) static void values_of(const Product& p, const CacheRows<T>& rows,
                                                  Prefetcher* prefetch) {
    Prefetcher ahead = *prefetch;
    const float *const weights = p.a, *const rescale = p.rescale;
    const T* const v = rows.first;
    const int64_t a_stride = p.a_stride, stride = rows.stride;
    const int dim = p.columns;
    float* const c = p.c;
    for (int d = 0; d < dim; d += N * kLanes) {
      Floats sum[R][N];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i)
          sum[r][i] = rescale ? load(c + r * dim + d + i * kLanes) * rescale[r] : Floats{};
      for (int s = 0; s < kBlock / Math::kPerWord; ++s) {
        Floats x[N];
#pragma GCC unroll 4
        for (int i = 0; i < N; i += 2)
          load_value_words(Math{}, v + int64_t(s) * Math::kPerWord * stride + d + i * kLanes,
                           stride, x + i);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Floats w = broadcast(weights[r * a_stride + s]);
#pragma GCC unroll 8
          for (int i = 0; i < N; ++i) sum[r][i] = Math::multiply_add(sum[r][i], w, x[i]);
          ahead.steps((r + 1) * N / R - r * N / R);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) store(c + r * dim + d + i * kLanes, sum[r][i]);
    }
    *prefetch = ahead;
  }
};

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
