#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "cpu/cpu.h"
#include "cpu/isa.h"
#include "cpu/row_softmax.h"
#include "cpu/scratch.h"
#include "order.h"

namespace specextend::cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;  // logits that are worth a thread

// Returns a value that at least k elements of the row reach, close to the k-th largest: the k-th
// largest of the maxima of some hundred disjoint groups (lanes of runs of blocks); -inf if it has
// none.
float reachable_threshold(const float* lane_max, int64_t num_blocks, int64_t k) {
  static thread_local Scratch<float> scratch;
  const int64_t run = std::max<int64_t>(1, num_blocks * kVocabLanes / (4 * k));
  const int64_t num_groups = (num_blocks + run - 1) / run * kVocabLanes;
  if (num_groups < k) return -INFINITY;
  float* groups = scratch.get(size_t(num_groups));
  for (int64_t begin = 0, g = 0; begin < num_blocks; begin += run, g += kVocabLanes) {
    const int64_t end = std::min(begin + run, num_blocks);
    std::copy_n(lane_max + begin * kVocabLanes, kVocabLanes, groups + g);
    for (int64_t b = begin + 1; b < end; ++b) {
      for (int i = 0; i < kVocabLanes; ++i) {
        groups[g + i] = std::max(groups[g + i], lane_max[b * kVocabLanes + i]);
      }
    }
  }
  std::nth_element(groups, groups + k - 1, groups + num_groups, std::greater<float>());
  return groups[k - 1];
}

// Finds the top_k elements of one row, and the log of their probabilities on top of `logp`.
void expand_row(const VocabKernels& kernels, const void* row, int64_t vocab, float logp, int top_k,
                int64_t* tokens, float* logps) {
  static thread_local Scratch<float> floats;
  static thread_local Scratch<double> doubles;
  static thread_local Scratch<int32_t> index_scratch;
  static thread_local Scratch<uint64_t> key_scratch;
  const int64_t num_blocks = num_vocab_blocks(vocab);
  float* refs = floats.get(size_t(num_blocks * (1 + kVocabLanes) + vocab));
  float* lane_max = refs + num_blocks;
  float* values = lane_max + num_blocks * kVocabLanes;
  double* sums = doubles.get(size_t(num_blocks));
  const float max = kernels.row_stats(row, vocab, refs, sums, lane_max).max;

  int32_t* indices = index_scratch.get(size_t(vocab));
  const float threshold = reachable_threshold(lane_max, num_blocks, top_k);
  const int64_t count = kernels.collect(row, vocab, lane_max, threshold, top_k, values, indices);
  uint64_t* keys = key_scratch.get(size_t(count));
  for (int64_t i = 0; i < count; ++i) keys[i] = rank_key(values[i], uint32_t(indices[i]));
  if (count > top_k) std::nth_element(keys, keys + top_k, keys + count);
  std::sort(keys, keys + top_k);

  // This is the log of the softmax at the largest logit. Logits of +inf share all the probability.
  double log_first = -INFINITY;
  if (max == INFINITY) {
    log_first =
        -std::log(double(kernels.collect(row, vocab, lane_max, max, vocab, values, indices)));
  } else if (max != -INFINITY) {
    log_first = -std::log(accumulate_blocks(refs, sums, num_blocks, max));
  }
  for (int i = 0; i < top_k; ++i) {
    tokens[i] = rank_index(keys[i]);
    const float value = rank_value(keys[i]);
    const double below = value == max ? 0. : double(value) - double(max);
    const double sum = double(logp) + (below + log_first);
    logps[i] = std::isnan(sum) ? -INFINITY : float(sum);
  }
}

// Finds the best `width` of all candidates by merging the nodes' lists, each of which is in order.
void best_candidates(const float* logps, int frontier, int top_k, int width, int32_t* beam,
                     float* beam_logp) {
  static thread_local Scratch<uint64_t> scratch;
  uint64_t* heap = scratch.get(size_t(frontier));
  for (int f = 0; f < frontier; ++f) {
    heap[f] = rank_key(logps[int64_t(f) * top_k], uint32_t(f) * uint32_t(top_k));
  }
  std::make_heap(heap, heap + frontier, std::greater<uint64_t>());
  int size = frontier;
  for (int i = 0; i < width; ++i) {
    std::pop_heap(heap, heap + size, std::greater<uint64_t>());
    const uint32_t best = rank_index(heap[size - 1]);
    beam[i] = int32_t(best);
    beam_logp[i] = logps[best];
    if ((best + 1) % uint32_t(top_k) == 0) {
      --size;
    } else {
      heap[size - 1] = rank_key(logps[best + 1], best + 1);
      std::push_heap(heap, heap + size, std::greater<uint64_t>());
    }
  }
}

}  // namespace

void expand_tree(const ExpandTreeParams& p, DType dtype) {
  const VocabKernels& kernels = isa().vocab[int(dtype)];
  const int64_t element_size = dtype == DType::kFloat32 ? 4 : 2;
  const int64_t grain = std::max<int64_t>(1, kGrain / p.vocab);
  torch::stable::parallel_for(
      0, int64_t(p.batch) * p.frontier, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / p.frontier, f = i % p.frontier;
          const void* row =
              static_cast<const char*>(p.logits) + (b * p.stride_b + f * p.stride_f) * element_size;
          expand_row(kernels, row, p.vocab, p.beam_logp[i], p.top_k, p.cand_tokens + i * p.top_k,
                     p.cand_logp + i * p.top_k);
        }
      });
  for (int64_t b = 0; b < p.batch; ++b) {
    best_candidates(p.cand_logp + b * p.frontier * p.top_k, p.frontier, p.top_k, p.width,
                    p.beam + b * p.width, p.beam_logp_out + b * p.width);
  }
}

}  // namespace specextend::cpu
