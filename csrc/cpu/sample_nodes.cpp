#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "cpu/cpu.h"
#include "cpu/isa.h"
#include "cpu/row_softmax.h"
#include "cpu/scratch.h"

namespace specextend::cpu {
namespace {

constexpr int64_t kGrain = 1 << 16;  // logits that are worth a thread

// Returns the first token whose cumulative probability exceeds u. Exponentials are fp32, their sums
// fp64 and in fixed order, so that the draw depends on the row and on u alone.
int64_t draw(const VocabKernels& kernels, const void* row, int64_t vocab, int element_size,
             double u) {
  static thread_local Scratch<float> floats;
  static thread_local Scratch<double> doubles;
  const int64_t num_blocks = num_vocab_blocks(vocab);
  float* refs = floats.get(size_t(num_blocks * (1 + kVocabLanes)));
  double* sums = doubles.get(size_t(num_blocks));
  const RowStats stats = kernels.row_stats(row, vocab, refs, sums, refs + num_blocks);
  // Where softmax is undefined there is no choice.
  if (stats.has_nan || std::isnan(u) || std::isinf(stats.max)) return -1;

  const double total = accumulate_blocks(refs, sums, num_blocks, stats.max);
  const double threshold = draw_threshold(u, total);
  const int64_t block = block_above(sums, num_blocks, threshold);
  const int64_t begin = block * kVocabBlock;
  const int size = int(std::min<int64_t>(kVocabBlock, vocab - begin));
  float e[kVocabBlock];
  kernels.exp_block(static_cast<const char*>(row) + begin * element_size, size, refs[block], e);
  const double scale = block_scale(refs[block], stats.max);
  double values[kVocabBlock];
  for (int i = 0; i < size; ++i) values[i] = e[i] * scale;
  return begin + first_above(values, size, block > 0 ? sums[block - 1] : 0., threshold);
}

}  // namespace

void sample_nodes(const SampleNodesParams& p, DType dtype) {
  const VocabKernels& kernels = isa().vocab[int(dtype)];
  const int element_size = dtype == DType::kFloat32 ? 4 : 2;
  const int64_t grain = std::max<int64_t>(1, kGrain / p.vocab);
  torch::stable::parallel_for(
      0, int64_t(p.batch) * p.num_nodes, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / p.num_nodes, node = i % p.num_nodes;
          const void* row = static_cast<const char*>(p.logits) +
                            (b * p.stride_b + node * p.stride_n) * element_size;
          if (!p.uniforms) {
            p.tokens[i] = kernels.argmax(row, p.vocab);
            continue;
          }
          const double u = p.uniforms_are_double ? static_cast<const double*>(p.uniforms)[i]
                                                 : double(static_cast<const float*>(p.uniforms)[i]);
          p.tokens[i] = draw(kernels, row, p.vocab, element_size, u);
        }
      });
}

}  // namespace specextend::cpu
