#pragma once

// Products of few rows, compiled once per instruction set by table.h: y[m, n] = x[m] . w[n].
//
// Each element of y is summed in one register, the sum of x[m, k] w[n, k] in a lane that k alone
// decides, k ascending in each, and the lanes are added in halves. So its bits depend on x[m], w[n]
// and K: not on the other rows and columns, on how they are cut into items, or on how w lies in
// memory. They may differ between instruction sets.

#include "cpu/isa.h"
#include "cpu/isa/simd.h"
#include "cpu/isa/vocab.h"

namespace specextend::cpu {
namespace {  // one copy per instruction set
namespace linear {

using simd::BFloat16;
using simd::Floats;
using simd::kLanes;

// Says how elements of type T are multiplied. A step is kStep elements of a row, which become
// kParts registers; `prepare` makes from a whole step of x what load_prepared reads, kParts
// registers as well.
template <typename T>
struct Math {
  static constexpr int kStep = kLanes, kParts = 1;

  SPECEXTEND_ALWAYS_INLINE static void load(const T* w, Floats to[kParts]) {
    to[0] = vocab::load_row(w);
  }
  SPECEXTEND_ALWAYS_INLINE static Floats multiply_add(Floats sum, Floats a, Floats b) {
    return simd::fma(a, b, sum);
  }
};

#if defined(__AVX512BF16__)
// Multiplies pairs of neighbours as they lie in memory.
template <>
struct Math<BFloat16> {
  static constexpr int kStep = 2 * kLanes, kParts = 1;

  SPECEXTEND_ALWAYS_INLINE static void load(const BFloat16* w, Floats to[kParts]) {
    to[0] = simd::load(w);
  }
  SPECEXTEND_ALWAYS_INLINE static Floats multiply_add(Floats sum, Floats a, Floats b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
#else
// Widens the even elements of a step and the odd ones apart, which takes an instruction each.
template <>
struct Math<BFloat16> {
  static constexpr int kStep = 2 * kLanes, kParts = 2;

  SPECEXTEND_ALWAYS_INLINE static void load(const BFloat16* w, Floats to[kParts]) {
    const simd::Ints pairs = simd::as_ints(simd::load(w));
    to[0] = simd::as_floats(pairs << 16);
    to[1] = simd::as_floats(pairs & int32_t(0xffff0000));
  }
  SPECEXTEND_ALWAYS_INLINE static Floats multiply_add(Floats sum, Floats a, Floats b) {
    return simd::fma(a, b, sum);
  }
};
#endif

template <typename T>
struct Product {
  using M = Math<T>;
  static constexpr int kStep = M::kStep, kParts = M::kParts;
  static constexpr int kStepFloats = kParts * kLanes;
  static constexpr int kSums = kLanes == 16 ? 16 : 8;  // what the registers hold
  static constexpr int kColumns = 4;                   // computed together
  static constexpr int kRows = kSums / kColumns;
  static constexpr int kPerWord = 4 / int(sizeof(T));  // elements

  static int64_t num_steps(int64_t depth) { return (depth + kStep - 1) / kStep; }
  static int64_t prepared_floats(int64_t depth) { return num_steps(depth) * kStepFloats; }

  // One more cache line in a row than it needs: else rows of powers of two displace each other.
  static int64_t panel_floats(int64_t depth) {
    return kLinearColumns * (prepared_floats(depth) + 16);
  }

  SPECEXTEND_ALWAYS_INLINE static void prepare_step(const T* x, float* to) {
    Floats parts[kParts];
    M::load(x, parts);
    for (int i = 0; i < kParts; ++i) simd::store(to + i * kLanes, parts[i]);
  }

  static void prepare(const void* row, int64_t depth, float* to) {
    const T* x = static_cast<const T*>(row);
    int64_t k = 0;
    for (; k + kStep <= depth; k += kStep, to += kStepFloats) prepare_step(x + k, to);
    if (k == depth) return;
    T rest[kStep] = {};
    memcpy(rest, x + k, size_t(depth - k) * sizeof(T));
    prepare_step(rest, to);
  }

  template <int kC, int kR>
  SPECEXTEND_ALWAYS_INLINE static void add_step(const T* w, int64_t w_stride, const float* x,
                                                int64_t x_stride, Floats (&sums)[kC][kR]) {
    Floats b[kR][kParts];
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r)
      for (int i = 0; i < kParts; ++i) b[r][i] = simd::load(x + r * x_stride + i * kLanes);
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) {
      Floats a[kParts];
      M::load(w + c * w_stride, a);
      for (int i = 0; i < kParts; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < kR; ++r) sums[c][r] = M::multiply_add(sums[c][r], a[i], b[r][i]);
    }
  }

  // Computes kC columns of kR rows, from row `row` of the item on.
  template <int kC, int kR>
  static void run_tile(const LinearItem& item, const T* w, int64_t w_stride, int64_t column,
                       int64_t row) {
    const InvariantLinearParams& p = *item.params;
    const int64_t x_stride = prepared_floats(p.depth), whole = p.depth / kStep;
    const float* x = item.x + row * x_stride;
    Floats sums[kC][kR] = {};
    for (int64_t s = 0; s < whole; ++s) {
      // The columns after these: what else is to be computed leaves no room to look ahead far.
      for (int c = 0; c < kC; ++c) __builtin_prefetch(w + (kC + c) * w_stride + s * kStep);
      add_step(w + s * kStep, w_stride, x + s * kStepFloats, x_stride, sums);
    }
    if (const int64_t left = p.depth - whole * kStep) {
      T rest[kC][kStep] = {};
      for (int c = 0; c < kC; ++c)
        memcpy(rest[c], w + c * w_stride + whole * kStep, size_t(left) * sizeof(T));
      add_step(rest[0], kStep, x + whole * kStepFloats, x_stride, sums);
    }
    alignas(64) float totals[kSums];
    add_lanes(sums, totals);
    const T* bias = static_cast<const T*>(p.bias);
    T* y = static_cast<T*>(p.y) + (item.b * p.num_rows + item.row_begin + row) * p.num_columns +
           column;
    for (int r = 0; r < kR; ++r, y += p.num_columns)
      for (int c = 0; c < kC; ++c) {
        const float sum = totals[c * kR + r];
        simd::from_float(bias ? sum + simd::to_float(bias[column + c]) : sum, y + c);
      }
  }

  // Adds up the lanes of each sum. Many at a time take a third of the instructions.
  template <int kC, int kR>
  SPECEXTEND_ALWAYS_INLINE static void add_lanes(const Floats (&sums)[kC][kR], float* totals) {
    if constexpr (kLanes == 16 && 2 * kC * kR > kLanes) {
      alignas(64) float all[kLanes * kLanes];
      for (int i = 0; i < kC * kR; ++i) simd::store(all + i * kLanes, sums[i / kR][i % kR]);
      for (int i = kC * kR; i < kLanes; ++i) simd::store(all + i * kLanes, Floats{});
      simd::store(totals, simd::reduce_add_each(all));
    } else {
      for (int i = 0; i < kC * kR; ++i) totals[i] = simd::reduce_add(sums[i / kR][i % kR]);
    }
  }

  template <int kC>
  static void run_columns(const LinearItem& item, const T* w, int64_t w_stride, int64_t column) {
    int64_t row = 0;
    for (; row + kRows <= item.num_rows; row += kRows)
      run_tile<kC, kRows>(item, w, w_stride, column, row);
    const int64_t left = item.num_rows - row;  // together, too: a weight is loaded once
    if (left == 1) run_tile<kC, 1>(item, w, w_stride, column, row);
    if constexpr (kRows > 2) {
      if (left == 2) run_tile<kC, 2>(item, w, w_stride, column, row);
      if (left == 3) run_tile<kC, 3>(item, w, w_stride, column, row);
    }
  }

  static void run(const LinearItem& item) {
    const InvariantLinearParams& p = *item.params;
    const T* w = static_cast<const T*>(p.w) + item.b * p.w_stride_b;
    int64_t stride = p.w_stride;
    if (p.by_k) {
      stride = panel_floats(p.depth) / kLinearColumns * kPerWord;
      T* panel = reinterpret_cast<T*>(item.panel);
      pack(w + item.column_begin, p.w_stride, p.depth, item.num_columns, panel, stride);
      w = panel;
    } else {
      w += item.column_begin * stride;
    }
    int64_t c = 0;
    for (; c + kColumns <= item.num_columns; c += kColumns)
      run_columns<kColumns>(item, w + c * stride, stride, item.column_begin + c);
    for (; c < item.num_columns; ++c)
      run_columns<1>(item, w + c * stride, stride, item.column_begin + c);
  }

  // Loads kTileWords words: neighbouring columns, of one k, or of k and k + 1 in a word.
  SPECEXTEND_ALWAYS_INLINE static simd::Tile load_words(const T* w, int64_t stride) {
    if constexpr (kPerWord == 1) {
      return simd::load_tile(w);
    } else {
#if defined(__AVX2__)
      const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
      const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + stride));
      return _mm256_castsi256_ps(
          _mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b)));
#else
      constexpr int n = simd::kTileWords;
      T pairs[2 * n];
      for (int i = 0; i < n; ++i) pairs[2 * i] = w[i], pairs[2 * i + 1] = w[stride + i];
      return simd::load(pairs);
#endif
    }
  }

  // Makes rows of columns: w is [depth, n], the panel [n, depth].
  static void pack(const T* w, int64_t w_stride, int64_t depth, int64_t n, T* panel,
                   int64_t panel_stride) {
    constexpr int kTile = simd::kTileWords, kDeep = kLanes * kPerWord;
    constexpr int64_t kCacheLine = 64;
    const int64_t whole_n = n / kTile * kTile, whole_k = depth / kDeep * kDeep;
    for (int64_t k = 0; k < whole_k; k += kDeep) {
      // The rows lie far apart, where no processor fetches ahead by itself.
      const int64_t next = k + 2 * kDeep <= depth ? k + kDeep : k;
      for (int64_t i = 0; i < kDeep; ++i)
        for (int64_t c = 0; c < n; c += kCacheLine / int64_t(sizeof(T)))
          __builtin_prefetch(w + (next + i) * w_stride + c);
      for (int64_t c = 0; c < whole_n; c += kTile) {
        const T* from = w + k * w_stride + c;
        Floats rows[kTile];
#pragma GCC unroll 8
        for (int i = 0; i < kTile; ++i)
          rows[i] = simd::join_tiles([&](int half) __attribute__((always_inline)) {
            return load_words(from + (i + half * kTile) * kPerWord * w_stride, w_stride);
          });
        simd::transpose(rows);
        for (int i = 0; i < kTile; ++i) simd::store(panel + (c + i) * panel_stride + k, rows[i]);
      }
    }
    for (int64_t c = 0; c < n; ++c)
      for (int64_t k = c < whole_n ? whole_k : 0; k < depth; ++k)
        panel[c * panel_stride + k] = w[k * w_stride + c];
  }
};

template <typename T>
constexpr LinearKernels kernels() {
  return {Product<T>::prepared_floats, Product<T>::panel_floats, Product<T>::prepare,
          Product<T>::run};
}

}  // namespace linear
}  // namespace
}  // namespace specextend::cpu
