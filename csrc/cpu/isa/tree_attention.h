#pragma once

// Tree attention on one work item, compiled once per instruction set by table.h.
//
// The rows of a KV head (tree rows x group) are packed together. For a row, the keys that it may see
// lie on a line: prefix key j at j, and the tree keys of its mask, in the order of their slots, at P,
// P + 1, ... The line is cut at fixed places into blocks of kAttentionBlock positions, between which
// the running maximum is updated, and into segments of kAttentionSegment, which are summed apart and
// folded from left to right. All sums over the keys of a block take the keys one after the other, a
// key that a row does not see adding exactly 0. So the bits of a row depend on its line alone: not on
// the other rows, the number of splits, or on where in the tree its ancestors stand.
//
// A 32-bit word is one float, or two bf16 that are multiplied and added by one instruction. Both
// products (logits, values) are one routine: words of A broadcast, B in panels of kPanel registers.

#include "cpu/isa.h"
#include "cpu/isa/simd.h"

namespace specextend::cpu {
namespace {
namespace attention {

using namespace simd;

constexpr int kBlock = kAttentionBlock;
constexpr int kTileRows = 6;
constexpr int kPart = 64;  // keys
#if defined(__AVX512F__)
constexpr int kPanel = 4;   // 6 x 4 sums, 4 of B and one of A: 29 of 32 registers
constexpr int kFetches = 8;  // cache lines fetched ahead in kUnroll steps of a product
#else
constexpr int kPanel = 2;  // 6 x 2 sums, 2 of B and one of A: 15 of 16
constexpr int kFetches = 2;
#endif
constexpr int kUnroll = 4;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

SPECEXTEND_ALWAYS_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
SPECEXTEND_ALWAYS_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
SPECEXTEND_ALWAYS_INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }

// How keys, values and probabilities are multiplied.
struct Float32Math {
  static constexpr int kPerWord = 1;
  SPECEXTEND_ALWAYS_INLINE static Floats multiply_add(Floats sum, Floats a, Floats b) {
    return fma(a, b, sum);
  }
  template <typename T>
  SPECEXTEND_ALWAYS_INLINE static Tile load(const T* p, int /*words*/) {
    return load_tile(p);  // a head dimension is a multiple of 8: there are always enough
  }
  template <typename T>
  SPECEXTEND_ALWAYS_INLINE static void copy_words(const T* from, float* to, int words) {
    for (int i = 0; i < words; ++i) to[i] = to_float(from[i]);
  }
  // Probabilities of n keys, a multiple of kLanes.
  SPECEXTEND_ALWAYS_INLINE static void store_weights(const float* p, float* words, int n) {
    for (int i = 0; i < n; i += kLanes) store(words + i, simd::load(p + i));
  }
#if defined(__AVX512F__)
  template <typename T>
  SPECEXTEND_ALWAYS_INLINE static Floats load_words(const T* p) {
    return load_floats(p);
  }
  // 2 x kLanes words of the row v.
  template <typename T>
  SPECEXTEND_ALWAYS_INLINE static void load_value_words(const T* v, int64_t /*stride*/, Floats x[2]) {
    x[0] = load_floats(v);
    x[1] = load_floats(v + kLanes);
  }
#endif
  // Elements [begin, begin + width) of the row from[0] of `dim`; 0 past its end, or if it is null.
  template <typename T>
  SPECEXTEND_ALWAYS_INLINE static void pack_value_row(const T* const from[1], int begin,
                                                      [[maybe_unused]] int dim,
                                                      int width, float* to) {
    for (int d = 0; d < width; d += kLanes) {
      const T* p = from[0] + begin + d;
#if defined(__AVX512F__)
      const Tile high = from[0] && dim - begin - d > 8 ? load_tile(p + 8) : Tile{};
      store(to + d, join(from[0] ? load_tile(p) : Tile{}, high));
#else
      store(to + d, from[0] ? load_tile(p) : Tile{});
#endif
    }
  }
};

#if defined(__AVX512BF16__)
// vdpbf16ps adds the product of the high halves first, then that of the low ones, each rounded: with
// the earlier key in the high half, keys are summed one after the other.
struct BFloat16Math {
  static constexpr int kPerWord = 2;
  SPECEXTEND_ALWAYS_INLINE static Floats multiply_add(Floats sum, Floats a, Floats b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  SPECEXTEND_ALWAYS_INLINE static Tile load(const BFloat16* p, int words) {
    return words >= 8 ? _mm256_loadu_ps(reinterpret_cast<const float*>(p))
                      : _mm256_maskz_loadu_ps(__mmask8((1u << words) - 1), p);
  }
  SPECEXTEND_ALWAYS_INLINE static void copy_words(const BFloat16* from, float* to, int words) {
    memcpy(to, from, size_t(words) * 4);
  }
  // Probabilities of n keys, a multiple of kLanes, behind which one more vector may be read.
  SPECEXTEND_ALWAYS_INLINE static void store_weights(const float* p, float* words, int n) {
    for (int i = 0; i < n; i += 2 * kLanes) {
      const __m512bh pairs = _mm512_cvtne2ps_pbh(simd::load(p + i + kLanes), simd::load(p + i));
      store(words + i / 2, reinterpret_cast<Floats>(_mm512_rol_epi32(reinterpret_cast<__m512i>(pairs), 16)));
    }
  }
  SPECEXTEND_ALWAYS_INLINE static Floats load_words(const BFloat16* p) { return simd::load(p); }
  // Two rows as words, the first one's elements in the high halves.
  SPECEXTEND_ALWAYS_INLINE static void interleave(__m512i a, __m512i b, Floats x[2]) {
    const __m512i low = _mm512_set_epi16(15, 47, 14, 46, 13, 45, 12, 44, 11, 43, 10, 42, 9, 41, 8, 40, 7,
                                         39, 6, 38, 5, 37, 4, 36, 3, 35, 2, 34, 1, 33, 0, 32);
    const __m512i high = _mm512_set_epi16(31, 63, 30, 62, 29, 61, 28, 60, 27, 59, 26, 58, 25, 57, 24, 56,
                                          23, 55, 22, 54, 21, 53, 20, 52, 19, 51, 18, 50, 17, 49, 16, 48);
    x[0] = reinterpret_cast<Floats>(_mm512_permutex2var_epi16(a, low, b));
    x[1] = reinterpret_cast<Floats>(_mm512_permutex2var_epi16(a, high, b));
  }
  SPECEXTEND_ALWAYS_INLINE static void load_value_words(const BFloat16* v, int64_t stride, Floats x[2]) {
    interleave(_mm512_loadu_si512(v), _mm512_loadu_si512(v + stride), x);
  }
  SPECEXTEND_ALWAYS_INLINE static void pack_value_row(const BFloat16* const from[2], int begin, int dim,
                                                      int width, float* to) {
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
#endif

// Cache rows that are needed soon, fetched a line at a time between arithmetic: of prefetches that follow
// upon each other some are dropped.
struct Prefetcher {
  struct Rows {
    const char* first;
    int64_t stride;
    int count;
  };
  Rows now;       // from the row under way on
  int at, bytes;  // where in this row; of a row
  Rows then;

  // Rows to fetch behind those there are; there is room for two lots, and a third is left out.
  void append(const Rows& rows) {
    if (now.count <= 0) now = rows;
    else if (then.count <= 0) then = rows;
  }

  SPECEXTEND_ALWAYS_INLINE void step() {
    if (now.count <= 0) return;
    __builtin_prefetch(now.first + at, 0, 2);
    at += 64;
    if (at < bytes) return;
    at = 0;
    now.first += now.stride;
    if (--now.count > 0) return;
    now = then, then.count = 0;
  }
  SPECEXTEND_ALWAYS_INLINE void steps(int n) {
    for (int i = 0; i < n; ++i) step();
  }
};

// C [R, P * NV registers] = scale * A B, or C * row_scale + A B. A: R rows of `steps` words. B: P
// panels of [steps, NV registers].
template <typename Math, int R, int NV, int P>
SPECEXTEND_ALWAYS_INLINE void multiply_tile(const float* a, int64_t lda, const float* b, int steps,
                                            float* c, int64_t ldc, float scale,
                                            const float* row_scale, bool overwrite,
                                            Prefetcher* soon) {
  constexpr int kWidth = NV * kLanes;
  Prefetcher ahead = *soon;
  Floats sum[R][P * NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < P * NV; ++v)
      sum[r][v] = overwrite ? Floats{} : load(c + r * ldc + v * kLanes) * row_scale[r];
  const int64_t panel = int64_t(steps) * kWidth;
  const auto step = [&](const float* upper, const float* lower, const float* words) {
    Floats x[P * NV];
#pragma GCC unroll 8
    for (int v = 0; v < P * NV; ++v) x[v] = load(words + v / NV * panel + v % NV * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Floats w = broadcast(r < 3 ? upper[r * lda] : lower[(r - 3) * lda]);
#pragma GCC unroll 8
      for (int v = 0; v < P * NV; ++v) sum[r][v] = Math::multiply_add(sum[r][v], w, x[v]);
    }
  };
  const float *upper = a, *lower = a + 3 * lda;  // rows by two pointers: integer registers are few
  int s = 0;
  for (; s + kUnroll <= steps; s += kUnroll) {
#pragma GCC unroll 8
    for (int i = 0; i < kUnroll; ++i) step(upper + i, lower + i, b + i * kWidth);
    upper += kUnroll, lower += kUnroll, b += kUnroll * kWidth;
    ahead.steps(P * kFetches);
  }
  for (; s < steps; ++s, b += kWidth) step(upper++, lower++, b);
  *soon = ahead;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < P * NV; ++v)
      store(c + r * ldc + v * kLanes, row_scale ? sum[r][v] : sum[r][v] * scale);
}

template <typename Math, int R>
__attribute__((noinline)) void multiply_rows(const float* a, int64_t lda, const float* b, int steps,
                                             int columns, float* c, int64_t ldc, float scale,
                                             const float* row_scale, bool overwrite,
                                             Prefetcher* soon) {
  constexpr int kWidth = kPanel * kLanes;
  int col = 0;
  if (R <= 2)  // else too few sums are under way to hide the latency of one
    for (; col + 2 * kWidth <= columns; col += 2 * kWidth)
      multiply_tile<Math, R <= 2 ? R : 1, kPanel, 2>(a, lda, b + int64_t(col) * steps, steps, c + col,
                                                     ldc, scale, row_scale, overwrite, soon);
  for (; col + kWidth <= columns; col += kWidth)
    multiply_tile<Math, R, kPanel, 1>(a, lda, b + int64_t(col) * steps, steps, c + col, ldc, scale,
                                      row_scale, overwrite, soon);
  b += int64_t(col) * steps;
  c += col;
  switch ((columns - col) / kLanes) {
    case 1: return multiply_tile<Math, R, 1, 1>(a, lda, b, steps, c, ldc, scale, row_scale, overwrite, soon);
#if defined(__AVX512F__)
    case 2: return multiply_tile<Math, R, 2, 1>(a, lda, b, steps, c, ldc, scale, row_scale, overwrite, soon);
    case 3: return multiply_tile<Math, R, 3, 1>(a, lda, b, steps, c, ldc, scale, row_scale, overwrite, soon);
#endif
    default: return;
  }
}

template <typename Math>
SPECEXTEND_ALWAYS_INLINE void multiply(int rows, const float* a, int64_t lda, const float* b, int steps,
                                       int columns, float* c, int64_t ldc, float scale,
                                       const float* row_scale, bool overwrite,
                                             Prefetcher* soon) {
  switch (rows) {
    case 1: return multiply_rows<Math, 1>(a, lda, b, steps, columns, c, ldc, scale, row_scale, overwrite, soon);
    case 2: return multiply_rows<Math, 2>(a, lda, b, steps, columns, c, ldc, scale, row_scale, overwrite, soon);
    case 3: return multiply_rows<Math, 3>(a, lda, b, steps, columns, c, ldc, scale, row_scale, overwrite, soon);
    case 4: return multiply_rows<Math, 4>(a, lda, b, steps, columns, c, ldc, scale, row_scale, overwrite, soon);
    case 5: return multiply_rows<Math, 5>(a, lda, b, steps, columns, c, ldc, scale, row_scale, overwrite, soon);
    default: return multiply_rows<Math, 6>(a, lda, b, steps, columns, c, ldc, scale, row_scale, overwrite, soon);
  }
}

// kTileWords words of the keys k, k + stride, ... of which there are n <= kLanes, transposed.
template <typename Math, typename T>
SPECEXTEND_ALWAYS_INLINE void load_transposed(const T* k, int64_t stride, int n, int words,
                                              Floats rows[kTileWords]) {
#pragma GCC unroll 8
  for (int i = 0; i < kTileWords; ++i) {
    const Tile x = i < n ? Math::load(k + i * stride, words) : Tile{};
#if defined(__AVX512F__)
    rows[i] = join(x, i + 8 < n ? Math::load(k + (i + 8) * stride, words) : Tile{});
#else
    rows[i] = x;
#endif
  }
  transpose(rows);
}

// Panels of B for the logits: B[word, key]. `columns` = keys rounded up to kLanes, those behind are
// 0.
template <typename Math, typename T>
__attribute__((noinline)) void pack_keys(const T* k, int64_t stride, int keys, int columns, int words,
                                         float* packed, Prefetcher* soon) {
  constexpr int kWidth = kPanel * kLanes;
  for (int col = 0; col < columns; col += kLanes) {
    const int panel = col / kWidth * kWidth, width = int(min_of(kWidth, columns - panel));
    float* to = packed + int64_t(panel) * words + (col - panel);
    const T* from = k + col * stride;
    const int n = int(min_of(kLanes, keys - col));
    int w = 0;
    if (n == kLanes)
      for (; w + kTileWords <= words; w += kTileWords) {
        Floats rows[kTileWords];
        load_transposed<Math>(from + w * Math::kPerWord, stride, kLanes, kTileWords, rows);
#pragma GCC unroll 8
        for (int i = 0; i < kTileWords; ++i) store(to + int64_t(w + i) * width, rows[i]);
        soon->steps(kLanes / 4);
      }
    for (; w < words; w += kTileWords) {
      Floats rows[kTileWords];
      load_transposed<Math>(from + w * Math::kPerWord, stride, n, words - w, rows);
      for (int i = 0; i < kTileWords && w + i < words; ++i) store(to + int64_t(w + i) * width, rows[i]);
    }
  }
}

// Panels of B for the output: B[key (pair), d]. Tree keys that no row sees (a clear bit of `live`,
// which begins at key `tree_begin`) may hold anything and become 0.
template <typename Math, typename T>
__attribute__((noinline)) void pack_values(const T* v, int64_t stride, int keys, int dim, int tree_begin,
                                           const uint64_t* live, float* packed, Prefetcher* soon) {
  constexpr int kWidth = kPanel * kLanes;
  const int steps = (keys + Math::kPerWord - 1) / Math::kPerWord, columns = round_up(dim, kLanes);
  for (int s = 0; s < steps; ++s) {
    const T* from[Math::kPerWord];
    for (int i = 0; i < Math::kPerWord; ++i) {
      const int key = s * Math::kPerWord + i, t = key - tree_begin;
      const bool seen = key < keys && (!live || t < 0 || (live[t >> 6] >> (t & 63) & 1));
      from[i] = seen ? v + key * stride : nullptr;
    }
    soon->steps(3);
    for (int panel = 0; panel < columns; panel += kWidth) {
      const int width = int(min_of(kWidth, columns - panel));
      Math::pack_value_row(from, panel, dim, width, packed + int64_t(panel) * steps + int64_t(s) * width);
    }
  }
}

#if defined(__AVX512F__)
// Few rows read a full block once, so it is not worth packing: the same sums from registers.
constexpr int kDirectRows = 8, kDirectDim = 4 * kLanes;

template <typename Math, int R, typename T>
__attribute__((noinline)) void direct_logits(const float* q, int words, const T* k, int64_t stride,
                                             float* out, int64_t ldo, float scale, Prefetcher* soon) {
  constexpr int kGroups = R <= 2 ? 4 : 2;  // of kLanes keys
  Prefetcher ahead = *soon;
  for (int col = 0; col < kBlock; col += kGroups * kLanes) {
    Floats sum[R][kGroups] = {};
    for (int w0 = 0; w0 < words; w0 += 2 * kTileWords) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 1
        for (int w = w0; w < w0 + 2 * kTileWords; w += kTileWords) {  // a cache line of each key
          Floats rows[kTileWords];
          load_transposed<Math>(k + (col + g * kLanes) * stride + w * Math::kPerWord, stride, kLanes,
                                kTileWords, rows);
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
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) store(out + r * ldo + col + g * kLanes, sum[r][g] * scale);
  }
  *soon = ahead;
}

template <typename Math, int R, int N, typename T>
__attribute__((noinline)) void direct_values(const float* weights, int64_t ldw, const T* v, int64_t stride,
                                             int dim, float* out, const float* row_scale, bool overwrite,
                                             Prefetcher* soon) {
  Prefetcher ahead = *soon;
  for (int d = 0; d < dim; d += N * kLanes) {
    Floats sum[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i)
        sum[r][i] = overwrite ? Floats{} : load(out + r * dim + d + i * kLanes) * row_scale[r];
    for (int s = 0; s < kBlock / Math::kPerWord; ++s) {
      Floats x[N];
#pragma GCC unroll 4
      for (int i = 0; i < N; i += 2)
        Math::load_value_words(v + int64_t(s) * Math::kPerWord * stride + d + i * kLanes, stride, x + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Floats w = broadcast(weights[r * ldw + s]);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) sum[r][i] = Math::multiply_add(sum[r][i], w, x[i]);
        ahead.steps((r + 1) * N / R - r * N / R);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) store(out + r * dim + d + i * kLanes, sum[r][i]);
  }
  *soon = ahead;
}

template <typename Math, int R, typename T>
void direct_values_of(const float* weights, int64_t ldw, const T* v, int64_t stride, int dim, float* out,
                      const float* row_scale, bool overwrite, Prefetcher* soon) {
  if (R <= 2 && dim % (8 * kLanes) == 0)
    return direct_values<Math, R <= 2 ? R : 1, 8>(weights, ldw, v, stride, dim, out, row_scale, overwrite, soon);
  return direct_values<Math, R, R <= 6 ? 4 : 2>(weights, ldw, v, stride, dim, out, row_scale, overwrite, soon);
}
#elif defined(__AVX2__)
// A full block is not worth packing for few rows: its values go from memory into the sums. With 16
// registers its keys are packed still, but so few at a time that they stay in the L1 cache.
constexpr int kDirectRows = 4 * kTileRows, kDirectDim = 2 * kLanes;
constexpr int kDirectKeys = 32;

// A word of kLanes keys as their elements in it.
SPECEXTEND_ALWAYS_INLINE void split_words(Floats words, const float*, Floats* elements) {
  elements[0] = words;
}
SPECEXTEND_ALWAYS_INLINE void split_words(Floats words, const BFloat16*, Floats* elements) {
  elements[0] = as_floats(as_ints(words) << 16);
  elements[1] = as_floats(as_ints(words) & int32_t(0xffff0000));
}

// 32 bytes of kLanes keys, transposed: register i holds element i of the keys. bf16 is transposed
// in pairs and converted then, which takes half the shuffles. `stride` in bytes.
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

// pack_keys for kDirectKeys keys, in whole panels, with `lines` fetched for 32 bytes of kLanes keys.
template <typename T>
__attribute__((noinline)) void pack_few_keys(const T* k, int64_t stride, int dim, float* packed,
                                             int lines, Prefetcher* soon) {
  constexpr int kElements = 32 / sizeof(T), kWidth = kPanel * kLanes;
  Prefetcher ahead = *soon;
  stride *= sizeof(T);
  for (int col = 0; col < kDirectKeys; col += kLanes) {
    const char* from = reinterpret_cast<const char*>(k) + col * stride;
    float* to = packed + col / kWidth * kWidth * dim + col % kWidth;
    for (int d = 0; d < dim; d += kElements, from += 32, to += kElements * kWidth) {
      Floats elements[kElements];
      load_elements(from, stride, k, elements);
#pragma GCC unroll 16
      for (int i = 0; i < kElements; ++i) store(to + i * kWidth, elements[i]);
      ahead.steps(lines);
    }
  }
  *soon = ahead;
}

// Columns [d, d + N * kLanes) of R rows.
template <int R, int N, typename T>
SPECEXTEND_ALWAYS_INLINE void direct_values_at(int d, const float* weights, int64_t ldw, const T* v,
                                               int64_t stride, int dim, float* out,
                                               const float* row_scale, bool overwrite,
                                               Prefetcher* soon) {
  Prefetcher ahead = *soon;
  Floats sum[R][N];
  v += d, out += d;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i)
      sum[r][i] = overwrite ? Floats{} : load(out + r * dim + i * kLanes) * row_scale[r];
  const float *upper = weights, *lower = weights + 3 * ldw;
#pragma GCC unroll 4
  for (int s = 0; s < kBlock; ++s, v += stride) {
#pragma GCC unroll 8
    for (int i = 0; i < N; i += 2) {
      const Floats x = load_tile(v + i * kLanes), y = load_tile(v + (i + 1) * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Floats w = broadcast(r < 3 ? upper[r * ldw + s] : lower[(r - 3) * ldw + s]);
        sum[r][i] = fma(w, x, sum[r][i]);
        sum[r][i + 1] = fma(w, y, sum[r][i + 1]);
      }
    }
    if (s % 4 == 3) ahead.steps(N * int(sizeof(T)) / 4);
  }
  *soon = ahead;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) store(out + r * dim + i * kLanes, sum[r][i]);
}

template <int R, typename T>
__attribute__((noinline)) void direct_values(const float* weights, int64_t ldw, const T* v,
                                             int64_t stride, int dim, float* out,
                                             const float* row_scale, bool overwrite,
                                             Prefetcher* soon) {
  constexpr int kMost = R == 1 ? 8 : R <= 3 ? 4 : 2;  // enough sums to hide the latency of one
  int d = 0;
  for (; d + kMost * kLanes <= dim; d += kMost * kLanes)
    direct_values_at<R, kMost>(d, weights, ldw, v, stride, dim, out, row_scale, overwrite, soon);
  for (; d < dim; d += 2 * kLanes)
    direct_values_at<R, 2>(d, weights, ldw, v, stride, dim, out, row_scale, overwrite, soon);
}
#else
constexpr int kDirectRows = 0;
#endif

// Of a packed row.
struct RowState {
  int64_t begin, end;  // positions that it sees of the line; past the prefix a mask decides, if any
  int tree_row;        // m, from the first of the item on
  float max;           // of the logits of this segment so far, base 2
  float* chunks;       // its row of pieces, or of chunk_lse
};

// Where things lie in an item's scratch memory, in floats.
struct Layout {
  int rows, tree_rows, words, dim, keys;  // keys: of the widest block, and one vector
  int64_t q, keys_packed, values_packed, logits, weights, line, out, total, sum, state, slots, live, size;

  Layout(const TreeAttentionParams& p, int rows_, int per_word) {
    rows = rows_;
    tree_rows = int(min_of(rows, p.num_rows));
    words = p.head_dim / per_word;
    dim = p.out ? round_up(p.head_dim, kLanes) : 0;
    keys = round_up(kBlock + p.num_tree_keys, 2 * kLanes) + 2 * kLanes;
    int64_t at = 0;
    const auto take = [&](int64_t n) {
      const int64_t begin = at;
      at += (n + 15) / 16 * 16;
      return begin;
    };
    q = take(int64_t(rows) * words);
    keys_packed = take(int64_t(keys) * words);
    values_packed = take(int64_t(keys) * dim / per_word + dim);
    const int64_t at_once = max_of(8, min_of(rows, kDirectRows));
    logits = take(at_once * keys);
    weights = take(at_once * keys);
    line = take(3 * keys);
    out = take(int64_t(rows) * dim);
    total = take(int64_t(rows) * dim);
    sum = take(int64_t(rows) * kLanes);
    state = take(int64_t(rows) * int64_t(sizeof(RowState) / 4 + 3));
    slots = take(int64_t(tree_rows + 1) * (kBlock + 1));
    live = take((p.num_tree_keys + 63) / 64 * 2);
    size = at;
  }
};

// acc (max, sum, out) += part, over disjoint keys. A part without keys has sum 0.
SPECEXTEND_ALWAYS_INLINE void fold(float* max, float* sum, float* out, float part_max, float part_sum,
                                   const float* part, int dim) {
  if (part_sum == 0.f) return;
  if (*sum == 0.f) {
    *max = part_max, *sum = part_sum;
    memcpy(out, part, size_t(dim) * 4);
    return;
  }
  const float top = part_max > *max ? part_max : *max;
  const float a = simd::exp2(*max - top), b = simd::exp2(part_max - top);
  for (int d = 0; d < dim; d += kLanes)
    store(out + d, fma(load(part + d), broadcast(b), load(out + d) * a));
  *sum = *sum * a + part_sum * b;
  *max = top;
}

template <typename T>
void finish_row(const TreeAttentionParams& p, int64_t row, float max, float sum, const float* out) {
  const float lse = sum == 0.f ? -INFINITY : (max + log2f(sum)) * kLn2;
  p.lse[row] = lse;
  if (!p.out) return;
  T* to = static_cast<T*>(p.out) + row * p.head_dim;
  float factor = sum == 0.f ? 0.f : 1.f / sum;
  if (p.sinks && sum != 0.f) factor /= 1.f + expf(p.sinks[row % p.num_heads] - lse);
  for (int d = 0; d < p.head_dim; ++d) from_float(sum == 0.f ? 0.f : out[d] * factor, to + d);
}

template <typename Math, typename T>
class Item {
 public:
  explicit Item(const AttentionItem& item)
      : item_(item),
        p_(*item.params),
        layout_(p_, item.num_rows, Math::kPerWord),
        group_(p_.num_heads / p_.num_kv_heads),
        prefix_(max_of(0, min_of(p_.prefix_lens[item.b], p_.capacity - p_.num_tree_keys))),
        masked_(p_.num_tree_keys > 0 && (p_.mask || (p_.window && p_.k_depths))) {
    float* base = static_cast<float*>(item.scratch);
    q_ = base + layout_.q;
    keys_ = base + layout_.keys_packed;
    values_ = base + layout_.values_packed;
    logits_ = base + layout_.logits;
    weights_ = base + layout_.weights;
    line_ = base + layout_.line;
    out_ = base + layout_.out;
    total_ = base + layout_.total;
    sum_ = base + layout_.sum;
    state_ = reinterpret_cast<RowState*>(base + layout_.state);
    total_max_ = base + layout_.state + int64_t(layout_.rows) * int64_t(sizeof(RowState) / 4);
    total_sum_ = total_max_ + layout_.rows;
    row_scale_ = total_sum_ + layout_.rows;
    slots_ = reinterpret_cast<int32_t*>(base + layout_.slots);
    live_ = reinterpret_cast<uint64_t*>(base + layout_.live);
    first_tree_row_ = item.row_begin / group_;
    k_ = static_cast<const T*>(p_.k) + item.b * p_.k_stride_b + item.kv_head * p_.k_stride_h;
    v_ = !p_.out ? nullptr
               : static_cast<const T*>(p_.v) + item.b * p_.v_stride_b + item.kv_head * p_.v_stride_h;
    logit_scale_ = p_.softcap > 0 ? p_.scale / p_.softcap : p_.scale * kLog2E;
  }

  void run() {
    prepare_rows();
    clear_chunks();
    for (int i = 0; i < item_.num_rows; ++i) total_max_[i] = -INFINITY, total_sum_[i] = 0.f;
    for (int segment = item_.segment_begin; segment < item_.segment_end; ++segment) {
      run_segment(segment);
      for (int i = 0; i < item_.num_rows; ++i) {
        const float sum = empty_ ? 0.f : reduce_add(load(sum_ + int64_t(i) * kLanes));
        const float* out = out_ + int64_t(i) * layout_.dim;
        if (item_.partials) {
          float* partial = item_.partials + (int64_t(segment) * item_.num_rows + i) * (layout_.dim + 2);
          partial[0] = state_[i].max, partial[1] = sum;
          if (!empty_) memcpy(partial + 2, out, size_t(layout_.dim) * 4);
        } else {
          fold(total_max_ + i, total_sum_ + i, total_ + int64_t(i) * layout_.dim, state_[i].max, sum, out,
               layout_.dim);
        }
      }
    }
    if (num_parts_) finish_parts();
    if (item_.partials) return;
    for (int i = 0; i < item_.num_rows; ++i) {
      finish_row<T>(p_, output_row(i), total_max_[i], total_sum_[i], total_ + int64_t(i) * layout_.dim);
      merge_pieces(i);
    }
  }

  // The last step where segments were computed apart: folds their results.
  void combine() {
    for (int i = 0; i < item_.num_rows; ++i) {
      float max = -INFINITY, sum = 0.f;
      for (int segment = item_.segment_begin; segment < item_.segment_end; ++segment) {
        const float* partial =
            item_.partials + (int64_t(segment) * item_.num_rows + i) * (layout_.dim + 2);
        fold(&max, &sum, total_, partial[0], partial[1], partial + 2, layout_.dim);
      }
      finish_row<T>(p_, output_row(i), max, sum, total_);
      merge_pieces(i);
    }
  }

 private:
  int64_t output_row(int i) const {
    const int row = item_.row_begin + i;
    return (int64_t(item_.b) * p_.num_rows + row / group_) * p_.num_heads + item_.kv_head * group_ +
           row % group_;
  }

  void prepare_rows() {
    const int n = p_.num_tree_keys;
    first_begin_ = prefix_ + n, last_end_ = 0;
    for (int i = 0; i < item_.num_rows; ++i) {
      const int row = item_.row_begin + i, m = row / group_;
      const T* q = static_cast<const T*>(p_.q) + item_.b * p_.q_stride_b + m * p_.q_stride_m +
                   (item_.kv_head * group_ + row % group_) * p_.q_stride_h;
      Math::copy_words(q, q_ + int64_t(i) * layout_.words, layout_.words);
      RowState& s = state_[i];
      s.tree_row = m - first_tree_row_;
      s.begin = p_.window ? max_of(0, position(m) - p_.window + 1) : 0;
      s.end = masked_ ? prefix_ : max_of(prefix_, prefix_ + m + n - p_.num_rows + 1);
      first_begin_ = min_of(first_begin_, s.begin);
      last_end_ = max_of(last_end_, s.end);
    }
    num_tree_rows_ = state_[item_.num_rows - 1].tree_row + 1;
    if (!masked_) return;
    last_end_ = prefix_ + n;
    memset(live_, 0, size_t((n + 63) / 64) * 8);
    for (int m = 0; m < num_tree_rows_; ++m)
      for (int w = 0; w < (n + 63) / 64; ++w) live_[w] |= mask_word(first_tree_row_ + m, w);
  }

  int64_t position(int m) const {
    return prefix_ + (p_.q_depths ? p_.q_depths[int64_t(item_.b) * p_.num_rows + m]
                                  : m + p_.num_tree_keys - p_.num_rows);
  }

  // 64 tree keys of row m; bits past the last key are 0.
  uint64_t mask_word(int m, int w) const {
    const int left = p_.num_tree_keys - w * 64;
    uint64_t word;
    if (p_.mask) {
      word = p_.mask[(int64_t(item_.b) * p_.num_rows + m) * ((p_.num_tree_keys + 63) / 64) + w];
    } else {
      const int seen = m + p_.num_tree_keys - p_.num_rows + 1 - w * 64;
      word = seen <= 0 ? 0 : seen >= 64 ? ~uint64_t(0) : (uint64_t(1) << seen) - 1;
    }
    return left >= 64 ? word : word & ((uint64_t(1) << left) - 1);
  }

  // The tree keys that stand at positions [line_begin, line_begin + kBlock) of each row's line.
  // Returns false if there are none; else their slots lie in [slot_begin_, slot_end_).
  bool find_slots(int64_t line_begin) {
    const int64_t rank_begin = line_begin - prefix_, rank_end = rank_begin + kBlock;
    slot_begin_ = p_.num_tree_keys, slot_end_ = 0;
    for (int m = 0; m < num_tree_rows_; ++m) {
      int32_t* slots = slots_ + int64_t(m) * (kBlock + 1);
      int count = 0;
      int64_t rank = 0;
      for (int w = 0; w * 64 < p_.num_tree_keys && rank < rank_end; ++w) {
        uint64_t word = mask_word(first_tree_row_ + m, w);
        const int ones = __builtin_popcountll(word);
        if (rank + ones > rank_begin)
          for (int64_t r = rank; word && r < rank_end; word &= word - 1, ++r)
            if (r >= rank_begin) slots[1 + count++] = w * 64 + __builtin_ctzll(word);
        rank += ones;
      }
      slots[0] = count;
      if (count) {
        slot_begin_ = int(min_of(slot_begin_, slots[1]));
        slot_end_ = int(max_of(slot_end_, slots[count] + 1));
      }
    }
    return slot_end_ > slot_begin_;
  }

  void run_segment(int segment) {
    empty_ = true;
    for (int i = 0; i < item_.num_rows; ++i) state_[i].max = -INFINITY;
    memset(sum_, 0, size_t(item_.num_rows) * kLanes * 4);
    const int64_t begin = int64_t(segment) * kAttentionSegment;
    const int64_t end = min_of(begin + kAttentionSegment, prefix_ + p_.num_tree_keys);
    for (int64_t at = begin; at < end; at += kBlock) run_block(at);
  }

  // Positions [at, at + kBlock) of the line.
  void run_block(int64_t at) {
    // Cache rows [row_begin, row_end) hold its keys, and perhaps keys of other blocks.
    int64_t row_begin = at, row_end = min_of(at + kBlock, last_end_);
    const bool gathered = masked_ && at + kBlock > prefix_;
    if (gathered) {
      const bool some = find_slots(at);
      row_begin = at < prefix_ ? at : prefix_ + slot_begin_;
      row_end = some ? prefix_ + slot_end_ : prefix_;
    }
    if (row_begin >= row_end || (!gathered && row_end <= first_begin_)) return;
    const int keys = int(row_end - row_begin), columns = round_up(keys, kLanes);
    const int prefix_keys = int(max_of(0, min_of(prefix_ - at, kBlock)));
    if (p_.chunk_lse) first_chunk_ = at / p_.chunk_size, first_place_ = chunk_place(at);
    const T* k = k_ + row_begin * p_.k_stride_s;
    const T* v = v_ ? v_ + row_begin * p_.v_stride_s : nullptr;
    const int rows = item_.num_rows;
    const int tree_begin = int(prefix_ - row_begin);
    soon_ = {{}, 0, p_.head_dim * int(sizeof(T)), {}};
    const Prefetcher::Rows next_keys = block_behind(k_, p_.k_stride_s, row_begin);
#if defined(__AVX2__)
    if (rows <= kDirectRows && !gathered && keys == kBlock && p_.head_dim % kDirectDim == 0) {
      direct_block(at, k, v, next_keys, prefix_keys);
      empty_ = false;
      return;
    }
#endif
    soon_.append(next_keys);
    if (v_) soon_.append(block_behind(v_, p_.v_stride_s, row_begin));
    const uint64_t* live = gathered ? live_ : nullptr;
    // Rows of one tile pass over what is packed once: in parts that stay in the L1 cache. Else all is
    // packed for the tiles to share. The order of the sums is the same.
    const int tiles = (rows + kTileRows - 1) / kTileRows;
    const int part = tiles == 1 ? kPart : columns;
    for (int tile = 0; tile < tiles; ++tile) {
      const int i0 = int(int64_t(tile) * rows / tiles), n_rows = int(int64_t(tile + 1) * rows / tiles) - i0;
      const float* q = q_ + int64_t(i0) * layout_.words;
      for (int j = 0; j < keys; j += part) {
        const int n = int(min_of(part, keys - j)), n_columns = int(min_of(part, columns - j));
        if (tile == 0)
          pack_keys<Math>(k + j * p_.k_stride_s, p_.k_stride_s, n, n_columns, layout_.words, keys_, &soon_);
        multiply<Math>(n_rows, q, layout_.words, keys_, layout_.words, n_columns, logits_ + j, layout_.keys,
                       logit_scale_, nullptr, true, &soon_);
      }
      for (int r = 0; r < n_rows; ++r)
        soften_row(i0 + r, r, at, columns, prefix_keys, tree_begin, gathered);
      for (int j = 0; v_ && j < keys; j += part) {
        const int n = int(min_of(part, keys - j));
        if (tile == 0)
          pack_values<Math>(v + j * p_.v_stride_s, p_.v_stride_s, n, p_.head_dim, tree_begin - j, live,
                            values_, &soon_);
        constexpr float kOnes[kTileRows] = {1.f, 1.f, 1.f, 1.f, 1.f, 1.f};
        multiply<Math>(n_rows, weights_ + j / Math::kPerWord, layout_.keys, values_,
                       (n + Math::kPerWord - 1) / Math::kPerWord, layout_.dim,
                       out_ + int64_t(i0) * layout_.dim, layout_.dim, 1.f, j == 0 ? row_scale_ + i0 : kOnes,
                       empty_ && j == 0, &soon_);
      }
    }
    empty_ = false;
  }

  // From row r of the logits to row r of the weights, for row i of the item.
  void soften_row(int i, int r, int64_t at, int columns, int prefix_keys, int tree_begin, bool gathered) {
    const float* logits = logits_ + int64_t(r) * layout_.keys;
    if (gathered) {
      soften_gathered(i, at, logits, prefix_keys, tree_begin, columns);
    } else {
      const RowState& s = state_[i];
      soften(i, at, logits, int(max_of(0, s.begin - at)), int(min_of(columns, s.end - at)), columns,
             prefix_keys, p_.softcap > 0);
    }
    Math::store_weights(line_, weights_ + int64_t(r) * layout_.keys, columns);
  }

#if defined(__AVX512F__)
  template <int R>
  void direct_logits_rows(const T* k) {
    direct_logits<Math, R>(q_, layout_.words, k, p_.k_stride_s, logits_, layout_.keys, logit_scale_, &soon_);
  }
  template <int R>
  void direct_values_rows(const T* v) {
    attention::direct_values_of<Math, R>(weights_, layout_.keys, v, p_.v_stride_s, layout_.dim, out_,
                                         row_scale_, empty_, &soon_);
  }
  void direct_logits_of(int rows, const T* k) {
    switch (rows) {
      case 1: return direct_logits_rows<1>(k);
      case 2: return direct_logits_rows<2>(k);
      case 3: return direct_logits_rows<3>(k);
      case 4: return direct_logits_rows<4>(k);
      case 5: return direct_logits_rows<5>(k);
      case 6: return direct_logits_rows<6>(k);
      case 7: return direct_logits_rows<7>(k);
      default: return direct_logits_rows<8>(k);
    }
  }
  void direct_values_of(int rows, const T* v) {
    switch (rows) {
      case 1: return direct_values_rows<1>(v);
      case 2: return direct_values_rows<2>(v);
      case 3: return direct_values_rows<3>(v);
      case 4: return direct_values_rows<4>(v);
      case 5: return direct_values_rows<5>(v);
      case 6: return direct_values_rows<6>(v);
      case 7: return direct_values_rows<7>(v);
      default: return direct_values_rows<8>(v);
    }
  }
#elif defined(__AVX2__)
  void direct_logits_of(int rows, const T* k) {
    const int tiles = (rows + kTileRows - 1) / kTileRows;
    for (int j = 0; j < kBlock; j += kDirectKeys) {
      // Several tiles fetch enough with their products.
      pack_few_keys(k + j * p_.k_stride_s, p_.k_stride_s, layout_.words, keys_,
                    int(sizeof(T)) / (tiles > 1 ? 2 : 1), &soon_);
      for (int tile = 0; tile < tiles; ++tile) {
        const int i0 = tile * rows / tiles, n = (tile + 1) * rows / tiles - i0;
        multiply<Math>(n, q_ + int64_t(i0) * layout_.words, layout_.words, keys_, layout_.words,
                       kDirectKeys, logits_ + int64_t(i0) * layout_.keys + j, layout_.keys,
                       logit_scale_, nullptr, true, &soon_);
      }
    }
  }
  void direct_values_of(int rows, const T* v) {
    const int tiles = (rows + kTileRows - 1) / kTileRows;
    for (int tile = 0; tile < tiles; ++tile) {
      const int i0 = tile * rows / tiles, n = (tile + 1) * rows / tiles - i0;
      direct_values_of_tile(n, i0, v);
    }
  }
  void direct_values_of_tile(int n, int i0, const T* v) {
    switch (n) {
      case 1: return direct_values_rows<1>(i0, v);
      case 2: return direct_values_rows<2>(i0, v);
      case 3: return direct_values_rows<3>(i0, v);
      case 4: return direct_values_rows<4>(i0, v);
      case 5: return direct_values_rows<5>(i0, v);
      default: return direct_values_rows<6>(i0, v);
    }
  }
  template <int R>
  void direct_values_rows(int i0, const T* v) {
    direct_values<R>(weights_ + int64_t(i0) * layout_.keys, layout_.keys, v, p_.v_stride_s,
                     layout_.dim, out_ + int64_t(i0) * layout_.dim, row_scale_ + i0, empty_,
                     &soon_);
  }
#endif
#if defined(__AVX2__)
  // A full block for few rows. What it reads is fetched half a block ahead: not more, since what comes
  // before the lead in an item is not fetched at all; not less, since values are read panel by panel of
  // columns, and the first panel runs through the rows faster than whole rows are fetched.
  void direct_block(int64_t at, const T* k, const T* v, const Prefetcher::Rows& next_keys, int prefix_keys) {
    constexpr int kLead = kBlock / 2;
    const auto own = [](const T* rows, int64_t stride, int skipped) {
      return Prefetcher::Rows{reinterpret_cast<const char*>(rows + skipped * stride),
                              stride * int64_t(sizeof(T)), kBlock - skipped};
    };
    soon_.append(own(k, p_.k_stride_s, kLead));
    if (v) soon_.append(own(v, p_.v_stride_s, 0));
    direct_logits_of(item_.num_rows, k);
    for (int i = 0; i < item_.num_rows; ++i) soften_row(i, i, at, kBlock, prefix_keys, 0, false);
    soon_.append({next_keys.first, next_keys.stride, int(min_of(kLead, next_keys.count))});
    if (v) direct_values_of(item_.num_rows, v);
  }
#endif

  // The rows of a cache in the block after that of the rows from `row` on, as far as this item reads
  // it.
  Prefetcher::Rows block_behind(const T* cache, int64_t stride, int64_t row) const {
    const int64_t begin = row + kBlock, end = int64_t(item_.segment_end) * kAttentionSegment;
    const int64_t rows = min_of(kBlock, min_of(end, prefix_ + p_.num_tree_keys) - begin);
    return {reinterpret_cast<const char*>(cache + begin * stride), stride * int64_t(sizeof(T)),
            int(max_of(0, rows))};
  }

  // A block where masks hide tree keys: its logits, given by slot, are put in line, and the weights
  // of the line back to their slots. Leaves `columns` weights in line_.
  void soften_gathered(int i, int64_t at, const float* logits, int prefix_keys, int tree_begin,
                       int columns) {
    const RowState& s = state_[i];
    const int32_t* slots = slots_ + int64_t(s.tree_row) * (kBlock + 1);
    const int tree_keys = slots[0], keys = prefix_keys + tree_keys;
    ++slots;
    float *in_line = line_ + 2 * layout_.keys, *by_slot = in_line;
    memcpy(in_line, logits, size_t(prefix_keys) * 4);
    for (int j = 0; j < tree_keys; ++j) in_line[prefix_keys + j] = logits[tree_begin + slots[j]];
    if (p_.softcap > 0)
      for (int j = 0; j < keys; j += kLanes) store(in_line + j, softcapped(load(in_line + j)));
    for (int j = 0; j < prefix_keys && at + j < s.begin; ++j) in_line[j] = -INFINITY;
    for (int j = 0; p_.window && j < tree_keys; ++j) {
      const int slot = slots[j];
      const int depth = p_.k_depths ? p_.k_depths[int64_t(item_.b) * p_.num_tree_keys + slot] : slot;
      if (prefix_ + depth < s.begin) in_line[prefix_keys + j] = -INFINITY;
    }
    soften(i, at, in_line, 0, keys, round_up(keys, kLanes), prefix_keys, false);
    memset(by_slot, 0, size_t(columns) * 4);
    memcpy(by_slot, line_, size_t(prefix_keys) * 4);
    for (int j = 0; j < tree_keys; ++j) by_slot[tree_begin + slots[j]] = line_[prefix_keys + j];
    memcpy(line_, by_slot, size_t(columns) * 4);
  }

  Floats softcapped(Floats logits) const { return simd::tanh(logits) * (p_.softcap * kLog2E); }

  // The softmax of one row over a block of its line, of which it sees [begin, end). Leaves the
  // weights in line_, and the factor for what was summed before in row_scale_.
  void soften(int i, int64_t at, const float* logits, int begin, int end, int columns, int prefix_keys,
              bool softcap) {
    RowState& s = state_[i];
    const float* x = logits;
    if (begin > 0 || end < columns || softcap) {
      float* adjusted = line_ + layout_.keys;
      for (int j = 0; j < columns; j += kLanes) {
        Floats y = load(logits + j);
        if (softcap) y = softcapped(y);
        store(adjusted + j, keep_lanes(y, begin - j, end - j, -INFINITY));
      }
      x = adjusted;
    }
    Floats top = broadcast(-INFINITY);
    for (int j = 0; j < columns; j += kLanes) top = simd::max(top, load(x + j));
    const float block_max = reduce_max(top), max = block_max > s.max ? block_max : s.max;
    const float shift = max == -INFINITY ? 0.f : max;
    const float rescale = max == s.max ? 1.f : simd::exp2(s.max - max);
    Floats sum = load(sum_ + int64_t(i) * kLanes) * rescale;
    for (int j = 0; j < columns; j += kLanes) {
      const Floats weight = simd::exp2(load(x + j) - shift);
      store(line_ + j, weight);
      sum += weight;
    }
    store(sum_ + int64_t(i) * kLanes, sum);
    s.max = max;
    row_scale_[i] = rescale;
    if (p_.chunk_lse && prefix_keys > 0) sum_chunks(i, at, x, shift, prefix_keys);
  }

  // The log-sum-exp of each chunk's part in a block: the chunk itself if chunks divide blocks, else
  // one piece of it. `x` are the logits (base 2), line_ holds 2^(x - shift).
  void sum_chunks(int i, int64_t at, const float* x, float shift, int keys) {
    const int64_t size = p_.chunk_size;
    float* to = state_[i].chunks + first_place_;
    int64_t chunk_begin = first_chunk_ * size - at;
    for (; chunk_begin < keys; chunk_begin += size, ++to) {
      const int begin = int(max_of(0, chunk_begin)), end = int(min_of(keys, chunk_begin + size));
      Floats sum{};
      int j = begin;
      for (; j + kLanes <= end; j += kLanes) sum += load(line_ + j);
      if (j < end) sum += keep_lanes(load(line_ + j), 0, end - j, 0.f);
      constexpr float kTooSmall = 0x1p-80f;  // terms of such a sum may have been flushed to 0
      if (!any_at_least(sum, kTooSmall)) {
        *to = exact_lse(x, begin, end);
        continue;
      }
      store(part_sums_ + num_parts_ * kLanes, sum);
      part_shifts_[num_parts_] = shift;
      parts_[num_parts_] = to;
      if (++num_parts_ == kLanes) finish_parts();
    }
  }

  // Parts of chunks are finished by the register.
  void finish_parts() {
    float lse[kLanes];
    for (int n = num_parts_; n < kLanes; ++n) {
      store(part_sums_ + n * kLanes, broadcast(1.f));
      part_shifts_[n] = 0.f;
    }
    store(lse, (log2(reduce_add_each(part_sums_)) + load(part_shifts_)) * kLn2);
    for (int n = 0; n < num_parts_; ++n) *parts_[n] = lse[n];
    num_parts_ = 0;
  }

  // Of logits in base 2, which may all be -inf.
  float exact_lse(const float* x, int begin, int end) const {
    Floats top = broadcast(-INFINITY), sum{};
    for (int j = begin; j < end; j += kLanes)
      top = simd::max(top, keep_lanes(load(x + j), 0, end - j, -INFINITY));
    const float max = reduce_max(top);
    if (max == -INFINITY) return max;
    for (int j = begin; j < end; j += kLanes)
      sum += simd::exp2(keep_lanes(load(x + j), 0, end - j, -INFINITY) - max);
    return (max + log2f(reduce_add(sum))) * kLn2;
  }

  // Where the parts of chunks in the block at `at` go in a row of chunks. With pieces, there is one
  // place per chunk and one more per block border.
  int64_t chunk_place(int64_t at) const {
    return at / p_.chunk_size + (item_.pieces ? at / kBlock : 0);
  }

  // Every part of a chunk in this item's segments: empty so far.
  void clear_chunks() {
    if (!p_.chunk_lse) return;
    const int64_t places = item_.pieces ? item_.num_pieces : p_.num_chunks;
    const int64_t begin = chunk_place(int64_t(item_.segment_begin) * kAttentionSegment);
    const int64_t end = item_.last ? places : chunk_place(int64_t(item_.segment_end) * kAttentionSegment);
    for (int i = 0; i < item_.num_rows; ++i) {
      state_[i].chunks = (item_.pieces ? item_.pieces : p_.chunk_lse) + output_row(i) * places;
      for (int64_t place = begin; place < end; ++place) state_[i].chunks[place] = -INFINITY;
    }
  }

  void merge_pieces(int i) {
    if (!item_.pieces) return;
    const float* pieces = item_.pieces + output_row(i) * item_.num_pieces;
    float* to = p_.chunk_lse + output_row(i) * p_.num_chunks;
    for (int64_t c = 0; c < p_.num_chunks; ++c) {
      const int64_t begin = c * p_.chunk_size, end = min_of(begin + p_.chunk_size, prefix_);
      if (begin >= end) {
        to[c] = -INFINITY;
        continue;
      }
      const int64_t first = c + begin / kBlock, last = c + (end - 1) / kBlock;
      float max = -INFINITY, sum = 0.f;
      for (int64_t j = first; j <= last; ++j) max = pieces[j] > max ? pieces[j] : max;
      for (int64_t j = first; j <= last && max != -INFINITY; ++j) sum += expf(pieces[j] - max);
      to[c] = sum == 0.f ? -INFINITY : max + logf(sum);
    }
  }

  const AttentionItem& item_;
  const TreeAttentionParams& p_;
  const Layout layout_;
  const int group_;
  const int64_t prefix_;
  const bool masked_;  // the tree keys of a row are not simply the first so many
  const T *k_, *v_;    // of this sequence and head; v_ is null if no values are wanted
  float logit_scale_;
  float *q_, *keys_, *values_, *logits_, *weights_, *line_, *out_, *total_, *sum_;
  float *total_max_, *total_sum_, *row_scale_;
  RowState* state_;
  int32_t* slots_;  // per tree row: their number, and the slots
  uint64_t* live_;  // tree keys that some row sees
  int first_tree_row_, num_tree_rows_;
  int slot_begin_, slot_end_;
  int64_t first_chunk_, first_place_;  // of the block under way
  int num_parts_ = 0;                  // parts of chunks that wait for finish_parts
  float part_sums_[kLanes * kLanes], part_shifts_[kLanes];
  float* parts_[kLanes];
  int64_t first_begin_, last_end_;  // of any row
  Prefetcher soon_;
  bool empty_;                      // no key of this segment was summed yet
};

template <typename Math, typename T>
constexpr AttentionKernels kernels_of() {
  return {[](const TreeAttentionParams& p, int rows) { return Layout(p, rows, Math::kPerWord).size; },
          [](const AttentionItem& item) { Item<Math, T>(item).run(); },
          [](const AttentionItem& item) { Item<Math, T>(item).combine(); }, kLanes};
}

template <typename T>
constexpr AttentionKernels kernels() {
  return kernels_of<Float32Math, T>();
}
#if defined(__AVX512BF16__)
template <>
constexpr AttentionKernels kernels<BFloat16>() {
  return kernels_of<BFloat16Math, BFloat16>();
}
#endif

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
