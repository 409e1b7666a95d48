#pragma once

// Softmax mass per chunk of one head, compiled once per instruction set by table.h. Like the rows
// of logits, it gives the same bits on every instruction set.

#include "cpu/isa.h"
#include "cpu/isa/vocab.h"

namespace specextend::cpu {
namespace {
namespace vocab {

template <typename F>
SPECEXTEND_ALWAYS_INLINE void update(double* to, Doubles x, const F& f) {
  Doubles y;
  std::memcpy(&y, to, sizeof(y));
  y = f(y, x);
  std::memcpy(to, &y, sizeof(y));
}

template <bool kLargest>
double chunk_mass(const float* chunk_lse, int64_t n, float lse, double* mass) {
  const Floats bound = broadcast(lse);
  Doubles low[kParts] = {}, high[kParts] = {};
  const auto merge = [](Doubles a, Doubles b) __attribute__((always_inline)) {
    return kLargest ? (a > b ? a : b) : a + b;
  };
  for (int64_t begin = 0; begin < n; begin += kVocabBlock) {
    const int size = int(n - begin < kVocabBlock ? n - begin : kVocabBlock);
    for_lanes(chunk_lse + begin, size, [&](const Lanes& v, int j) __attribute__((always_inline)) {
      double* to = mass + begin + j;
      for (int i = 0; i < kParts; ++i) {
        const Floats e = as_floats(as_ints(exp(v.part[i] - bound)) & (v.part[i] < INFINITY));
        Doubles l, h;
        widen(e, l, h);
        low[i] += l;
        high[i] += h;
        update(to + i * kWidth, l, merge);
        update(to + i * kWidth + kWidth / 2, h, merge);
      }
    });
  }
  return add_lanes(low, high);
}

}  // namespace vocab
}  // namespace
}  // namespace specextend::cpu
