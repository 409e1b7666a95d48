#pragma once

// Products of words with B in packed panels. Queries by keys and weights by values are this one
// routine: words of A are broadcast, and B comes in panels of kPanel registers.

#include "cpu/isa/attention/prefetch.h"

namespace specextend::cpu {
namespace {
namespace attention {

// With 32 registers 6 x 4 sums, 4 of B and one of A take 29; with 16, 6 x 2 + 2 + 1 take 15.
constexpr int kTileRows = 6;
constexpr int kPanel = kLanes == 16 ? 4 : 2;
constexpr int kUnroll = 4;
constexpr int kFetches = kLanes == 16 ? 8 : 2;  // cache lines to prefetch in kUnroll steps

// C = scale * A B, or C = rescale * C + A B. Each sum takes the steps one after the other.
struct Product {
  int rows, steps, columns;
  const float* a;  // [rows, steps]
  int64_t a_stride;
  float* c;  // [rows, columns]
  int64_t c_stride;
  float scale;           // only where rescale is null
  const float* rescale;  // [rows], or null: what C holds is not read

  // Returns the part that is rows [first, first + count) of A and C.
  Product of_rows(int first, int count) const {
    Product part = *this;
    part.rows = count;
    part.a += first * a_stride;
    part.c += first * c_stride;
    if (rescale) part.rescale += first;
    return part;
  }
};

// Computes P * NV registers of columns of C for R rows, from P panels of [steps, NV registers].
template <typename Math, int R, int NV, int P>
SPECEXTEND_ALWAYS_INLINE void multiply_tile(const Product& p, const float* b, int column,
                                            Prefetcher* prefetch) {
  constexpr int kWidth = NV * kLanes;
  Prefetcher ahead = *prefetch;
  const int steps = p.steps;
  const int64_t a_stride = p.a_stride, c_stride = p.c_stride;
  const float* const rescale = p.rescale;
  float* const c = p.c + column;
  Floats sum[R][P * NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < P * NV; ++v)
      sum[r][v] = rescale ? load(c + r * c_stride + v * kLanes) * rescale[r] : Floats{};
  const int64_t panel = int64_t(steps) * kWidth;
  const auto step = [&](const float* upper, const float* lower, const float* words) {
    Floats x[P * NV];
#pragma GCC unroll 8
    for (int v = 0; v < P * NV; ++v) x[v] = load(words + v / NV * panel + v % NV * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Floats w = broadcast(r < 3 ? upper[r * a_stride] : lower[(r - 3) * a_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < P * NV; ++v) sum[r][v] = Math::multiply_add(sum[r][v], w, x[v]);
    }
  };
  // Two pointers serve the rows of A: integer registers are few.
  const float *upper = p.a, *lower = p.a + 3 * a_stride;
  int s = 0;
  for (; s + kUnroll <= steps; s += kUnroll) {
#pragma GCC unroll 8
    for (int i = 0; i < kUnroll; ++i) step(upper + i, lower + i, b + i * kWidth);
    upper += kUnroll, lower += kUnroll, b += kUnroll * kWidth;
    ahead.steps(P * kFetches);
  }
  for (; s < steps; ++s, b += kWidth) step(upper++, lower++, b);
  *prefetch = ahead;
  const float scale = p.scale;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < P * NV; ++v)
      store(c + r * c_stride + v * kLanes, rescale ? sum[r][v] : sum[r][v] * scale);
}

template <typename Math, int R>
__attribute__((noinline)) void multiply_rows(const Product& p, const float* panels,
                                             Prefetcher* prefetch) {
  constexpr int kWidth = kPanel * kLanes;
  const auto panel = [&](int column) { return panels + int64_t(column) * p.steps; };
  int column = 0;
  if constexpr (R <= 2) {  // else too few sums are under way to hide the latency of one
    for (; column + 2 * kWidth <= p.columns; column += 2 * kWidth)
      multiply_tile<Math, R, kPanel, 2>(p, panel(column), column, prefetch);
  }
  for (; column + kWidth <= p.columns; column += kWidth)
    multiply_tile<Math, R, kPanel, 1>(p, panel(column), column, prefetch);
  if (column == p.columns) return;
  with_constant<kPanel - 1>((p.columns - column) / kLanes, [&](auto registers) {
    multiply_tile<Math, R, registers.value, 1>(p, panel(column), column, prefetch);
  });
}

// Computes a product of at most kTileRows rows, whose columns are a multiple of kLanes. B is in
// panels of [steps, kPanel registers], the last one narrower where columns are left.
template <typename Math>
SPECEXTEND_ALWAYS_INLINE void multiply(const Product& p, const float* panels,
                                       Prefetcher* prefetch) {
  with_constant<kTileRows>(
      p.rows, [&](auto rows) { multiply_rows<Math, rows.value>(p, panels, prefetch); });
}

SPECEXTEND_ALWAYS_INLINE int num_tiles(int rows) { return (rows + kTileRows - 1) / kTileRows; }

// Calls f(first, count) for every tile of rows: as few as possible, of nearly equal size.
template <typename F>
SPECEXTEND_ALWAYS_INLINE void for_each_tile(int rows, const F& f) {
  const int tiles = num_tiles(rows);
  for (int tile = 0; tile < tiles; ++tile) {
    const int first = tile * rows / tiles;
    f(first, (tile + 1) * rows / tiles - first);
  }
}

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
