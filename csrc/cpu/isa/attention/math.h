#pragma once

// How the words of attention's products are read, multiplied and packed. A 32-bit word is one
// float, or two bf16 that one instruction multiplies and adds (math_bf16.h).

#include "cpu/isa.h"
#include "cpu/isa/simd.h"

namespace specextend::cpu {
namespace {
namespace attention {

using namespace simd;

constexpr int kBlock = kAttentionBlock;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

SPECEXTEND_ALWAYS_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
SPECEXTEND_ALWAYS_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
SPECEXTEND_ALWAYS_INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f with n, which is 1 to kMost, as a constant.
template <int kMost, typename F>
SPECEXTEND_ALWAYS_INLINE void with_constant(int n, const F& f) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_constant<kMost - 1>(n, f);
  }
  f(Constant<kMost>{});
}

struct Float32Math {
  static constexpr int kPerWord = 1;

  SPECEXTEND_ALWAYS_INLINE static Floats multiply_add(Floats sum, Floats a, Floats b) {
    return fma(a, b, sum);
  }

  // Returns kTileWords words at p. A head dimension is a multiple of 8, so there are always enough.
  template <typename T>
  SPECEXTEND_ALWAYS_INLINE static Tile load(const T* p, int /*words*/) {
    return load_tile(p);
  }

  template <typename T>
  SPECEXTEND_ALWAYS_INLINE static void copy_words(const T* from, float* to, int words) {
    for (int i = 0; i < words; ++i) to[i] = to_float(from[i]);
  }

  // Makes words of the weights of n keys, a multiple of kLanes.
  SPECEXTEND_ALWAYS_INLINE static void store_weights(const float* p, float* words, int n) {
    for (int i = 0; i < n; i += kLanes) store(words + i, simd::load(p + i));
  }

  // Writes elements [begin, begin + width) of the row from[0] of `dim`: 0 past its end, or if it is
  // null.
  template <typename T>
  SPECEXTEND_ALWAYS_INLINE static void pack_value_row(const T* const from[1], int begin, int dim,
                                                      int width, float* to) {
    for (int d = 0; d < width; d += kLanes) {
      const Floats x = join_tiles([&](int i) {
        const bool some = from[0] && (i == 0 || dim - begin - d > i * kTileWords);
        return some ? load_tile(from[0] + begin + d + i * kTileWords) : Tile{};
      });
      store(to + d, x);
    }
  }
};

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
