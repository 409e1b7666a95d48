#pragma once

// Matrix units (AMX): products of tiles of bf16 pairs.
//
// A tile is 16 rows of 64 bytes. C[m, n] += A[m, k] B[k, n], where a word of A or B is two bf16
// that are multiplied with the two of the other. The processor sums the earlier elements of the
// words of a row over k, and the later ones apart; adds both; and adds that to C, each step rounded
// to the nearest even, with denormals as 0 whatever MXCSR says. Nothing here relies on that order,
// but on this: an element of C depends on what it was, on its row of A and on its column of B. So a
// key must always lie at the same k for a row's bits to depend on its line alone.
//
// Intrinsics name tiles by literals, and do not tell the compiler that loads read memory.

#include "cpu/isa/attention/math_bf16.h"
#include "cpu/isa/attention/prefetch.h"

namespace specextend::cpu {
namespace {
namespace attention {

constexpr int kTile = 16;  // rows of a tile, and words of a row

// Configures all eight tiles of this thread as 16 rows of 64 bytes. They are zero then.
inline void configure_tiles() {
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static const Config kConfig = {1,
                                 0,
                                 {},
                                 {64, 64, 64, 64, 64, 64, 64, 64},
                                 {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile}};
  _tile_loadconfig(&kConfig);
}

// Puts what was stored so far in front of the loads that follow.
SPECEXTEND_ALWAYS_INLINE void before_tile_loads() { asm volatile("" ::: "memory"); }

// Computes 2 tiles of keys by Q tiles of queries: scores[key, query]. Keys are A as they lie in the
// cache, `key_bytes` from one to the next; a tile of queries is [words, kTile]. kOnce: these keys
// are read no more. Fetches as many cache lines as are read of the keys.
template <int Q, bool kOnce>
__attribute__((noinline)) void multiply_key_tiles(const void* keys, int64_t key_bytes, int words,
                                                  const float* queries, float* scores,
                                                  int64_t score_bytes, Prefetcher* prefetch) {
  Prefetcher ahead = *prefetch;
  const char* a = static_cast<const char*>(keys);
  const char* const b = reinterpret_cast<const char*>(queries);
  const int64_t tile_bytes = int64_t(words) * kTile * 4;
  before_tile_loads();
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (Q == 2) {
    _tile_zero(1);
    _tile_zero(3);
  }
  for (int64_t at = 0; at < tile_bytes; at += kTile * kTile * 4, a += kTile * 4) {
    _tile_loadd(6, b + at, kTile * 4);
    if constexpr (kOnce) {
      _tile_stream_loadd(4, a, key_bytes);
      _tile_stream_loadd(5, a + kTile * key_bytes, key_bytes);
    } else {
      _tile_loadd(4, a, key_bytes);
      _tile_loadd(5, a + kTile * key_bytes, key_bytes);
    }
    _tile_dpbf16ps(0, 4, 6);
    ahead.steps(kTile);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (Q == 2) {
      _tile_loadd(7, b + tile_bytes + at, kTile * 4);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    ahead.steps(kTile);
  }
  *prefetch = ahead;
  char* const c = reinterpret_cast<char*>(scores);
  _tile_stored(0, c, score_bytes);
  _tile_stored(2, c + kTile * score_bytes, score_bytes);
  if constexpr (Q == 2) {
    _tile_stored(1, c + kTile * 4, score_bytes);
    _tile_stored(3, c + kTile * score_bytes + kTile * 4, score_bytes);
  }
}

// Adds to R tiles of rows by N tiles of columns of the output: weights [row, pair of keys], in
// `steps` tiles, by values [pair of keys, column]. Values and output have `dim` columns. Fetches
// half as many cache lines as the values had in the cache: the other half is fetched when they are
// packed.
template <int R, int N>
__attribute__((noinline)) void multiply_value_tiles(const float* weights, int64_t weight_bytes,
                                                    int steps, const float* values, int dim,
                                                    float* out, Prefetcher* prefetch) {
  Prefetcher ahead = *prefetch;
  const char* a = reinterpret_cast<const char*>(weights);
  const char* b = reinterpret_cast<const char*>(values);
  const int64_t row_bytes = int64_t(dim) * 4;
  char *const c = reinterpret_cast<char*>(out), *const lower = c + kTile * row_bytes;
  before_tile_loads();
  _tile_loadd(0, c, row_bytes);
  if constexpr (N == 2) _tile_loadd(1, c + kTile * 4, row_bytes);
  if constexpr (R == 2) _tile_loadd(2, lower, row_bytes);
  if constexpr (R == 2 && N == 2) _tile_loadd(3, lower + kTile * 4, row_bytes);
  for (int s = 0; s < steps; ++s, a += kTile * 4, b += kTile * row_bytes) {
    _tile_loadd(4, a, weight_bytes);
    _tile_loadd(6, b, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N == 2) {
      _tile_loadd(7, b + kTile * 4, row_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, a + kTile * weight_bytes, weight_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (R == 2 && N == 2) _tile_dpbf16ps(3, 5, 7);
    ahead.steps(kTile);
  }
  *prefetch = ahead;
  _tile_stored(0, c, row_bytes);
  if constexpr (N == 2) _tile_stored(1, c + kTile * 4, row_bytes);
  if constexpr (R == 2) _tile_stored(2, lower, row_bytes);
  if constexpr (R == 2 && N == 2) _tile_stored(3, lower + kTile * 4, row_bytes);
}

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
