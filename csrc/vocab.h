#pragma once

// How sums over a vocabulary are formed: alike on every device and instruction set, so that a row
// and a uniform number give the same token on all of them. Host and device code share this.
//
// A row is cut into blocks, the last one shorter, and every block into lanes: element j of a block
// belongs to lane j % kVocabLanes. A lane adds its elements in order; lanes are folded, halves onto
// each other. Exponentials are fp32, relative to the largest element of their block, and sums fp64.
// Cumulative sums, over the blocks as over the elements of one, go by runs: what is before the run,
// and the sum within the run, in order both. Products are not fused into sums.

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace specextend {

constexpr int kVocabBlock = 512;
constexpr int kVocabLanes = 16;
constexpr int kVocabLaneElements = kVocabBlock / kVocabLanes;
constexpr int kVocabRun = 16;

SPECEXTEND_HOST_DEVICE int64_t num_vocab_blocks(int64_t vocab) {
  return (vocab + kVocabBlock - 1) / kVocabBlock;
}

// Returns the place of value i in memory. On a GPU, warps take cumulative sums, a run per lane; in
// these places they meet no bank twice.
SPECEXTEND_HOST_DEVICE int64_t run_place(int64_t i) { return i + i / kVocabRun; }

// The fp32 exponential is made by Cody-Waite reduction by multiples of log 2 (its high part has 9
// bits, so the product is exact) and a minimax polynomial for (exp(r) - 1 - r) / r^2 on |r| <=
// log(2) / 2, of relative error 3e-9.
struct Exp32 {
  // Adding it leaves the nearest integer in the low bits.
  static constexpr float kRound = 0x1.8p23f;
  static constexpr float kLog2E = 0x1.715476p+0f;
  static constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;
  static constexpr float kP0 = 0x1.fffffcp-2f, kP1 = 0x1.555492p-3f, kP2 = 0x1.5558f2p-5f,
                         kP3 = 0x1.123a2p-7f, kP4 = 0x1.6a23ccp-10f;
  static constexpr float kLeast = -87.f;  // 0 below
};

// Returns exp(x) for x <= 0 within 1 ulp or so; 0 below -87 and for NaN.
SPECEXTEND_HOST_DEVICE float exp_nonpositive(float x) {
  const float shifted = rounded_product(x, Exp32::kLog2E) + Exp32::kRound;
  const float n = shifted - Exp32::kRound;
  const float r = (x - rounded_product(n, Exp32::kLn2High)) - rounded_product(n, Exp32::kLn2Low);
  float p = rounded_product(r, Exp32::kP4) + Exp32::kP3;
  p = rounded_product(p, r) + Exp32::kP2;
  p = rounded_product(p, r) + Exp32::kP1;
  p = rounded_product(p, r) + Exp32::kP0;
  p = rounded_product(p, rounded_product(r, r)) + r + 1.f;
  uint32_t bits, exponent;
  memcpy(&bits, &p, sizeof(bits));
  memcpy(&exponent, &shifted, sizeof(exponent));
  bits += exponent << 23;
  memcpy(&p, &bits, sizeof(p));
  return x >= Exp32::kLeast ? p : 0.f;
}

// Returns exp(x) for x <= 0 within 2 ulp, 0 below -708, by the same reduction and the Taylor
// polynomial.
SPECEXTEND_HOST_DEVICE double exp_nonpositive(double x) {
  if (!(x >= -708.)) return 0.;
  constexpr double kRound = 0x1.8p52;
  const double shifted = rounded_product(x, 0x1.71547652b82fep+0) + kRound;
  const double n = shifted - kRound;
  const double r =
      (x - rounded_product(n, 0x1.62e42feep-1)) - rounded_product(n, 0x1.a39ef35793c76p-33);
  double p = rounded_product(r, 1. / 6227020800) + 1. / 479001600;
  p = rounded_product(p, r) + 1. / 39916800;
  p = rounded_product(p, r) + 1. / 3628800;
  p = rounded_product(p, r) + 1. / 362880;
  p = rounded_product(p, r) + 1. / 40320;
  p = rounded_product(p, r) + 1. / 5040;
  p = rounded_product(p, r) + 1. / 720;
  p = rounded_product(p, r) + 1. / 120;
  p = rounded_product(p, r) + 1. / 24;
  p = rounded_product(p, r) + 1. / 6;
  p = rounded_product(p, r) + 0.5;
  p = rounded_product(p, r) + 1.;
  p = rounded_product(p, r) + 1.;
  uint64_t bits, exponent;
  memcpy(&bits, &p, sizeof(bits));
  memcpy(&exponent, &shifted, sizeof(exponent));
  bits += exponent << 52;
  memcpy(&p, &bits, sizeof(p));
  return p;
}

// Returns what a block's sum, in units of exp(ref), is rescaled with to units of exp(max). max is
// finite.
SPECEXTEND_HOST_DEVICE double block_scale(float ref, float max) {
  return ref == max ? 1. : exp_nonpositive(double(ref) - double(max));
}

// Returns the threshold of a draw (inverse CDF): it takes the first token whose cumulative sum
// exceeds this. The threshold is below the total, so that there is such a token also where u is 1
// or rounding made it so. total > 0.
SPECEXTEND_HOST_DEVICE double draw_threshold(double u, double total) {
  uint64_t bits;
  memcpy(&bits, &total, sizeof(bits));
  --bits;
  double below;
  memcpy(&below, &bits, sizeof(below));
  const double threshold = (u > 0. ? u : 0.) * total;
  return threshold < below ? threshold : below;
}

}  // namespace specextend
