#pragma once

// Rows divided by the root of their mean square, compiled once per instruction set by table.h. The
// mean is torch's to the last bit, so a model whose own norm it stands in for computes the same;
// nothing is fused.

#include "cpu/isa.h"
#include "cpu/isa/elements.h"
#include "rows.h"

namespace specextend::cpu {
namespace {  // one copy per instruction set
namespace rows {

using simd::Floats;
using simd::kLanes;

// torch adds up a row (at::sum, of fp32 along contiguous memory) so: lanes of 8 elements, four
// groups of them side by side; 16 terms to a partial sum, 16 of those to one of the next level, and
// so on, as long as a row has less than 2^24 elements. What lacks to four groups goes to the first
// one; the groups are added in order, then the elements behind whole lanes, then the lanes.
constexpr int kSumLanes = 8, kSumGroups = 4, kSumLevels = 4, kSumPower = 4;
constexpr int kSumWidth = kSumLanes * kSumGroups;
constexpr int kSumRegisters = kSumWidth / kLanes;

struct SumRegisters {
  Floats x[kSumRegisters];

  SPECEXTEND_ALWAYS_INLINE void add(const SumRegisters& y) {
    for (int i = 0; i < kSumRegisters; ++i) x[i] += y.x[i];
  }
};

template <typename T>
SPECEXTEND_ALWAYS_INLINE SumRegisters squares(const T* x) {
  SumRegisters y;
  for (int i = 0; i < kSumRegisters; ++i) {
    const Floats a = simd::load_elements(x + i * kLanes);
    y.x[i] = a * a;
  }
  return y;
}

template <typename T>
SPECEXTEND_ALWAYS_INLINE float square(T x) {
  const float a = simd::to_float(x);
  return a * a;
}

// Adds up the whole groups of a row, by levels.
template <typename T>
SPECEXTEND_ALWAYS_INLINE SumRegisters sum_groups(const T* x, int64_t groups) {
  constexpr int64_t kStep = int64_t(1) << kSumPower;
  SumRegisters levels[kSumLevels] = {};
  int64_t done = 0;
  while (done + kStep <= groups) {
    SumRegisters sum = {};
    for (int64_t i = 0; i < kStep; ++i) sum.add(squares(x + (done + i) * kSumWidth));
    done += kStep;
    levels[1].add(sum);
    for (int level = 2; level < kSumLevels; ++level) {
      if ((done >> ((level - 1) * kSumPower) & (kStep - 1)) != 0) break;
      levels[level].add(levels[level - 1]);
      levels[level - 1] = {};
    }
  }
  for (; done < groups; ++done) levels[0].add(squares(x + done * kSumWidth));
  for (int level = 1; level < kSumLevels; ++level) levels[0].add(levels[level]);
  return levels[0];
}

template <typename T>
SPECEXTEND_ALWAYS_INLINE float sum_of_squares(const T* x, int64_t length) {
  if (length < kSumLanes) {  // the groups are four single elements
    float sum = length < kSumGroups ? 0.f : square(x[0]);
    for (int64_t i = length < kSumGroups ? 0 : kSumGroups; i < length; ++i) sum += square(x[i]);
    for (int64_t i = 1; i < kSumGroups && length >= kSumGroups; ++i) sum += square(x[i]);
    return sum;
  }
  const SumRegisters whole = sum_groups(x, length / kSumWidth);
  float lanes[kSumWidth];
  memcpy(lanes, &whole, sizeof(lanes));
  int64_t i = length / kSumWidth * kSumWidth;
  for (; i + kSumLanes <= length; i += kSumLanes)
    for (int lane = 0; lane < kSumLanes; ++lane) lanes[lane] += square(x[i + lane]);
  for (int group = 1; group < kSumGroups; ++group)
    for (int lane = 0; lane < kSumLanes; ++lane) lanes[lane] += lanes[group * kSumLanes + lane];
  float sum = 0.f;
  for (; i < length; ++i) sum += square(x[i]);
  for (int lane = 0; lane < kSumLanes; ++lane) sum += lanes[lane];
  return sum;
}

template <typename T>
SPECEXTEND_ALWAYS_INLINE void add_rows(const T* a, const T* b, T* total, int64_t length) {
  simd::for_elements(length, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Floats sum = simd::load_elements(a + i, count) + simd::load_elements(b + i, count);
    simd::store_elements(total + i, sum, count);
  });
}

template <typename T, bool kRoundFirst>
SPECEXTEND_ALWAYS_INLINE void scale_row(const T* x, const T* weight, float scale, float offset,
                                        T* out, int64_t length) {
  simd::for_elements(length, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Floats h = simd::load_elements(x + i, count) * scale;
    const Floats w = simd::load_elements(weight + i, count) + offset;
    simd::store_elements(out + i, w * (kRoundFirst ? simd::rounded<T>(h) : h), count);
  });
}

template <typename T>
void rms_norm(const RmsNormParams& p, int64_t begin, int64_t end) {
  const int64_t length = p.shape.length;
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = row_begin<T>(p.shape, p.x, row);
    if (p.total != nullptr) {
      T* total = static_cast<T*>(p.total) + row * length;
      add_rows(row_begin<T>(p.shape, p.residual, row), x, total, length);
      x = total;
    }
    const float mean = sum_of_squares(x, length) / float(length);
    const float scale = 1.f / sqrtf(mean + p.eps);
    T* out = static_cast<T*>(p.out) + row * length;
    if (p.round_first) {
      scale_row<T, true>(x, weight, scale, p.offset, out, length);
    } else {
      scale_row<T, false>(x, weight, scale, p.offset, out, length);
    }
  }
}

}  // namespace rows
}  // namespace
}  // namespace specextend::cpu
