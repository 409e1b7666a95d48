#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>

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

  // The kernel serves whole chunks. The chunk that the first tree key falls into, which also gets
  // what is left of the mass, is served apart. Nothing behind it is read.
  const int64_t prefix = std::max(p.prefix_lens[b], 0);
  const int64_t num_full =
      p.tree ? prefix / p.chunk_size : (prefix + p.chunk_size - 1) / p.chunk_size;
  const int last = int(std::min<int64_t>(num_full, p.num_chunks));
  const bool has_tree_chunk = p.tree && last < p.num_chunks;
  const size_t padded = size_t(last / kVocabLanes + 1) * kVocabLanes;
  double* mass = scratch.get(padded);
  std::fill_n(mass, padded, 0.);
  double tree_mass = 0.;
  const ChunkMassKernel kernel = isa().chunk_mass[p.largest];
  for (int h = 0; h < p.num_heads; ++h, chunk_lse += p.chunk_stride_h) {
    if (!std::isfinite(lse[h])) continue;
    const double before = kernel(chunk_lse, last, lse[h], mass);
    if (!has_tree_chunk) continue;
    const double own = std::exp(double(chunk_lse[last]) - double(lse[h]));
    const double rest = std::max(std::isfinite(own) ? own : 0., 1. - before);
    tree_mass = p.largest ? std::max(tree_mass, rest) : tree_mass + rest;
  }
  mass[last] = tree_mass;  // padding if there is no such chunk
  const double scale = p.largest ? 1. : 1. / p.num_heads;
  for (int c = 0; c < p.num_chunks; ++c) {
    scores[c] = c <= last ? float(mass[c] * scale) : 0.f;
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

// Scores by a pass of tree attention with one row, no tree and no values.
void chunk_scores_keys(const ChunkScoresKeysParams& p, DType dtype) {
  TreeAttentionParams a = p.attention;
  const int64_t element_size = dtype == DType::kFloat32 ? 4 : 2;
  const int64_t row_size = a.head_dim * element_size;
  const int64_t num_states = int64_t(a.batch) * a.num_heads;
  static thread_local Scratch<char> row_scratch;
  static thread_local Scratch<float> state_scratch;
  char* rows = row_scratch.get(size_t(num_states * row_size));
  float* states = state_scratch.get(size_t(num_states * (1 + int64_t(a.num_chunks))));
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t row = std::clamp<int64_t>(p.rows[b], 0, a.num_rows - 1);
    for (int64_t h = 0; h < a.num_heads; ++h) {
      const int64_t offset = b * a.q_stride_b + row * a.q_stride_m + h * a.q_stride_h;
      std::memcpy(rows + (b * a.num_heads + h) * row_size,
                  static_cast<const char*>(a.q) + offset * element_size, size_t(row_size));
    }
  }
  a.q = rows;
  a.q_stride_b = a.q_stride_m = int64_t(a.num_heads) * a.head_dim;
  a.q_stride_h = a.head_dim;
  a.num_rows = 1;
  a.lse = states;
  a.chunk_lse = states + num_states;
  tree_attention(a, dtype);

  const int64_t chunk_stride_b = int64_t(a.num_heads) * a.num_chunks;
  chunk_scores({a.chunk_lse, a.lse, chunk_stride_b, 0, a.num_chunks, a.num_heads, 0, p.rows,
                a.prefix_lens, p.scores, a.batch, 1, a.num_heads, a.num_chunks, a.chunk_size,
                p.largest, false});
}

}  // namespace specextend::cpu
