#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "cpu/cpu.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"

namespace specextend::cpu {
namespace {

void score_one(const ChunkScoresParams& p, int64_t b) {
  static thread_local Scratch<double> scratch;
  const int64_t row = std::clamp<int64_t>(p.rows[b], 0, p.num_rows - 1);
  const float* chunk_lse = p.chunk_lse + b * p.chunk_stride_b + row * p.chunk_stride_m;
  const float* lse = p.lse + b * p.lse_stride_b + row * p.lse_stride_m;
  float* scores = p.scores + b * p.num_chunks;

  // The chunk that the first tree key falls into is the last to hold anything.
  const int tree_chunk = std::min(std::max(p.prefix_lens[b], 0) / p.chunk_size, p.num_chunks);
  const size_t padded = size_t(tree_chunk / kVocabLanes + 1) * kVocabLanes;
  double* mass = scratch.get(padded);
  std::fill_n(mass, padded, 0.);
  double tree_mass = 0.;
  const ChunkMassKernel kernel = isa().chunk_mass[p.largest];
  for (int h = 0; h < p.num_heads; ++h, chunk_lse += p.chunk_stride_h) {
    if (!std::isfinite(lse[h])) continue;
    const double before = kernel(chunk_lse, tree_chunk, lse[h], mass);
    if (tree_chunk == p.num_chunks) continue;
    const double own = std::exp(double(chunk_lse[tree_chunk]) - double(lse[h]));
    const double rest = std::max(std::isfinite(own) ? own : 0., 1. - before);
    tree_mass = p.largest ? std::max(tree_mass, rest) : tree_mass + rest;
  }
  if (tree_chunk < p.num_chunks) mass[tree_chunk] = tree_mass;
  const double scale = p.largest ? 1. : 1. / p.num_heads;
  for (int c = 0; c < p.num_chunks; ++c) {
    scores[c] = c <= tree_chunk ? float(mass[c] * scale) : 0.f;
  }
}

}  // namespace

void chunk_scores(const ChunkScoresParams& p) {
  constexpr int64_t kGrain = 1 << 14;  // exponentials that are worth a thread
  const int64_t work = std::max<int64_t>(1, int64_t(p.num_heads) * p.num_chunks);
  torch::stable::parallel_for(0, p.batch, std::max<int64_t>(1, kGrain / work),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t b = begin; b < end; ++b) score_one(p, b);
                              });
}

}  // namespace specextend::cpu
