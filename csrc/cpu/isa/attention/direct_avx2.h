#pragma once

// Blocks without packing on AVX2 (the contract is in direct.h): values go from memory into the
// sums. Keys are packed still, there being 16 registers, but so few at a time that they stay in the
// L1 cache.

#include "cpu/isa/attention/pack.h"

namespace specextend::cpu {
namespace {
namespace attention {

// Splits one word of kLanes keys into the elements in it.
SPECEXTEND_ALWAYS_INLINE void split_words(Floats words, const float*, Floats* elements) {
  elements[0] = words;
}
SPECEXTEND_ALWAYS_INLINE void split_words(Floats words, const BFloat16*, Floats* elements) {
  elements[0] = as_floats(as_ints(words) << 16);
  elements[1] = as_floats(as_ints(words) & int32_t(0xffff0000));
}

// Loads 32 bytes of kLanes keys, transposed: register i holds element i of the keys. bf16 is
// transposed in pairs and converted then, which takes half the shuffles. `stride` is in bytes.
template <typename T>
SPECEXTEND_ALWAYS_INLINE void load_elements(const char* k, int64_t stride, const T* type,
                                            Floats* elements) {
  constexpr int kPerWord = 4 / sizeof(T);
  const auto load_two = [&](int key, int at) {  // with key + 4
    const auto part = [&](int i) {
      return _mm_loadu_ps(reinterpret_cast<const float*>(k + i * stride + at));
    };
    return _mm256_insertf128_ps(_mm256_castps128_ps256(part(key)), part(key + 4), 1);
  };
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const Floats x = load_two(0, 4 * i), y = load_two(1, 4 * i);
    const Floats z = load_two(2, 4 * i), w = load_two(3, 4 * i);
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(x, y));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(x, y));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(z, w));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(z, w));
    Floats* to = elements + i * kPerWord;
    split_words(_mm256_castpd_ps(_mm256_unpacklo_pd(a, c)), type, to);
    split_words(_mm256_castpd_ps(_mm256_unpackhi_pd(a, c)), type, to + kPerWord);
    split_words(_mm256_castpd_ps(_mm256_unpacklo_pd(b, d)), type, to + 2 * kPerWord);
    split_words(_mm256_castpd_ps(_mm256_unpackhi_pd(b, d)), type, to + 3 * kPerWord);
  }
}
SPECEXTEND_ALWAYS_INLINE void load_elements(const char* k, int64_t stride, const Half*,
                                            Floats* elements) {
  const Half* from = reinterpret_cast<const Half*>(k);
  for (int i = 0; i < 16; i += 8)
    load_transposed<Float32Math>(from + i, stride / 2, kLanes, kTileWords, elements + i);
}

template <typename Math, typename T>
struct Direct {
  static constexpr int kRows = 4 * kTileRows;

  static bool takes(int rows, int dim) { return rows <= kRows && dim % (2 * kLanes) == 0; }

  static void logits(const Product& p, const CacheRows<T>& k, float* room, Prefetcher* prefetch) {
    // Several tiles fetch enough with their products.
    const int lines = int(sizeof(T)) / (num_tiles(p.rows) > 1 ? 2 : 1);
    for (int j = 0; j < kBlock; j += kPackedKeys) {
      pack_few_keys(k.from(j), p.steps, room, lines, prefetch);
      Product part = p;
      part.columns = kPackedKeys;
      part.c += j;
      for_each_tile(p.rows, [&](int first, int count) {
        multiply<Math>(part.of_rows(first, count), room, prefetch);
      });
    }
  }

  static void values(const Product& p, const CacheRows<T>& v, Prefetcher* prefetch) {
    for_each_tile(p.rows, [&](int first, int count) {
      const Product part = p.of_rows(first, count);
      with_constant<kTileRows>(count, [&](auto rows) { values_of<rows.value>(part, v, prefetch); });
    });
  }

 private:
  static constexpr int kPackedKeys = 32;

  // Packs kPackedKeys keys as pack_keys does, in whole panels, with `lines` fetched for 32 bytes of
  // kLanes keys.
  __attribute__((noinline)) static void pack_few_keys(const CacheRows<T>& k, int dim, float* packed,
                                                      int lines, Prefetcher* prefetch) {
    constexpr int kElements = 32 / sizeof(T), kWidth = kPanel * kLanes;
    Prefetcher ahead = *prefetch;
    const T* const first = k.first;
    const int64_t stride = k.stride * int64_t(sizeof(T));
    for (int col = 0; col < kPackedKeys; col += kLanes) {
      const char* from = reinterpret_cast<const char*>(first) + col * stride;
      float* to = packed + col / kWidth * kWidth * dim + col % kWidth;
      for (int d = 0; d < dim; d += kElements, from += 32, to += kElements * kWidth) {
        Floats elements[kElements];
        load_elements(from, stride, first, elements);
#pragma GCC unroll 16
        for (int i = 0; i < kElements; ++i) store(to + i * kWidth, elements[i]);
        ahead.steps(lines);
      }
    }
    *prefetch = ahead;
  }

  // Computes R rows of the output.
  template <int R>
  __attribute__((noinline)) static void values_of(const Product& p, const CacheRows<T>& v,
                                                  Prefetcher* prefetch) {
    constexpr int kMost = R == 1 ? 8 : R <= 3 ? 4 : 2;  // enough sums to hide the latency of one
    const int dim = p.columns;
    int d = 0;
    for (; d + kMost * kLanes <= dim; d += kMost * kLanes) values_at<R, kMost>(d, p, v, prefetch);
    for (; d < dim; d += 2 * kLanes) values_at<R, 2>(d, p, v, prefetch);
  }

  // Computes columns [d, d + N * kLanes) of R rows.
  template <int R, int N>
  SPECEXTEND_ALWAYS_INLINE static void values_at(int d, const Product& p, const CacheRows<T>& rows,
                                                 Prefetcher* prefetch) {
    Prefetcher ahead = *prefetch;
    const int64_t a_stride = p.a_stride, stride = rows.stride;
    const float* const rescale = p.rescale;
    const int dim = p.columns;
    const T* v = rows.first + d;
    float* const c = p.c + d;
    Floats sum[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i)
        sum[r][i] = rescale ? load(c + r * dim + i * kLanes) * rescale[r] : Floats{};
    const float *upper = p.a, *lower = p.a + 3 * a_stride;
#pragma GCC unroll 4
    for (int s = 0; s < kBlock; ++s, v += stride) {
#pragma GCC unroll 8
      for (int i = 0; i < N; i += 2) {
        const Floats x = load_tile(v + i * kLanes), y = load_tile(v + (i + 1) * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Floats w =
              broadcast(r < 3 ? upper[r * a_stride + s] : lower[(r - 3) * a_stride + s]);
          sum[r][i] = fma(w, x, sum[r][i]);
          sum[r][i + 1] = fma(w, y, sum[r][i + 1]);
        }
      }
      if (s % 4 == 3) ahead.steps(N * int(sizeof(T)) / 4);
    }
    *prefetch = ahead;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) store(c + r * dim + i * kLanes, sum[r][i]);
  }
};

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
