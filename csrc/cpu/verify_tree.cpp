#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/row_softmax.h"
#include "cpu/scratch.h"

namespace specextend::cpu {
namespace {

// Children of every node as linked lists in index order: first[n], then next[child], ending with
// -1. Node 0 is nobody's child and a parent out of range is nobody's, so that a walk from node 0
// meets no node twice, whatever the parents are.
struct Children {
  std::vector<int32_t> first, next;

  void build(const int32_t* parents, int num_nodes) {
    first.assign(size_t(num_nodes), -1);
    next.resize(size_t(num_nodes));
    for (int node = num_nodes - 1; node > 0; --node) {
      const int32_t parent = parents[node];
      if (parent < 0 || parent >= num_nodes) continue;
      next[node] = first[parent];
      first[parent] = node;
    }
  }
};

// The accepted path of one tree, written as it grows.
class Walk {
 public:
  Walk(const VerifyTreeParams& p, int b)
      : num_nodes_(p.num_nodes),
        tokens_(p.tokens + int64_t(b) * p.num_nodes),
        path_(p.path + int64_t(b) * p.num_nodes),
        emitted_(p.emitted + int64_t(b) * p.num_nodes),
        num_accepted_(p.num_accepted + b),
        next_root_(p.next_root + b) {
    path_[0] = 0;
  }

  void accept(int32_t node) {
    emitted_[length_ - 1] = tokens_[node];
    path_[length_++] = node;
  }

  void finish(int64_t last_token) {
    emitted_[length_ - 1] = last_token;
    *next_root_ = last_token;
    *num_accepted_ = length_ - 1;
    std::fill(path_ + length_, path_ + num_nodes_, -1);
    std::fill(emitted_ + length_, emitted_ + num_nodes_, -1);
  }

 private:
  int num_nodes_, length_ = 1;
  const int64_t* tokens_;
  int32_t* path_;
  int64_t* emitted_;
  int32_t* num_accepted_;
  int64_t* next_root_;
};

// Of one block.
double block_sum(const float* x, int n) {
  double lanes[kVocabLanes] = {};
  int i = 0;
  for (; i + kVocabLanes <= n; i += kVocabLanes) {
    for (int lane = 0; lane < kVocabLanes; ++lane) lanes[lane] += double(x[i + lane]);
  }
  for (; i < n; ++i) lanes[i % kVocabLanes] += double(x[i]);
  for (int w = kVocabLanes / 2; w > 0; w /= 2) {
    for (int lane = 0; lane < w; ++lane) lanes[lane] += lanes[lane + w];
  }
  return lanes[0];
}

// What is left of the target's law at one node while its children are rejected: the normalised
// positive part of law - draft, again and again.
class Residual {
 public:
  explicit Residual(int64_t vocab) : vocab_(vocab), num_blocks_(num_vocab_blocks(vocab)) {}

  void start(const float* target) {
    weights_ = target;
    total_ = 1.;  // probabilities are taken as they are given
  }

  double operator[](int64_t token) const { return double(weights_[token]) / total_; }

  void subtract(const float* draft) {
    static thread_local Scratch<float> scratch;
    float* rest = scratch.get(size_t(2 * vocab_));
    if (weights_ == rest) rest += vocab_;
    const double scale = 1. / total_;
    for (int64_t i = 0; i < vocab_; ++i) {
      const float x = float(double(weights_[i]) * scale - double(draft[i]));
      rest[i] = x < 0.f ? 0.f : x;  // NaN stays
    }
    const double total = accumulate(block_sums(rest), num_blocks_);
    // Where the draft's law is the target's up to rounding nothing is left, and any token will do:
    // a rejection has the probability of that rounding.
    if (total == 0.) return;
    weights_ = rest;
    total_ = total;
  }

  // The first token whose cumulative probability exceeds u; -1 where that is undefined.
  int64_t draw(double u) const {
    double* cumulative = block_sums(weights_);
    const double total = accumulate(cumulative, num_blocks_);
    if (!(total > 0.) || std::isinf(total) || std::isnan(u)) return -1;
    const double threshold = draw_threshold(u, total);
    const int64_t block = block_above(cumulative, num_blocks_, threshold);
    const int64_t begin = block * kVocabBlock;
    const int size = block_size(begin);
    double values[kVocabBlock];
    std::copy_n(weights_ + begin, size, values);
    const double base = block > 0 ? cumulative[block - 1] : 0.;
    return begin + first_above(values, size, base, threshold);
  }

 private:
  int block_size(int64_t begin) const {
    return int(std::min<int64_t>(kVocabBlock, vocab_ - begin));
  }

  double* block_sums(const float* x) const {
    static thread_local Scratch<double> scratch;
    double* sums = scratch.get(size_t(num_blocks_));
    for (int64_t b = 0; b < num_blocks_; ++b) {
      sums[b] = block_sum(x + b * kVocabBlock, block_size(b * kVocabBlock));
    }
    return sums;
  }

  const float* weights_ = nullptr;
  double total_ = 1.;
  int64_t vocab_, num_blocks_;
};

}  // namespace

void verify_tree(const VerifyTreeParams& p) {
  static thread_local Children children;
  for (int b = 0; b < p.batch; ++b) {
    const int64_t* tokens = p.tokens + int64_t(b) * p.num_nodes;
    const int64_t* target = p.target_tokens + int64_t(b) * p.num_nodes;
    children.build(p.parents + int64_t(b) * p.num_nodes, p.num_nodes);
    Walk walk(p, b);
    int32_t node = 0;
    while (true) {
      int32_t child = children.first[node];
      // A negative choice says that the target had none; a padded node's token never matches it.
      while (child >= 0 && (tokens[child] != target[node] || target[node] < 0)) {
        child = children.next[child];
      }
      if (child < 0) break;
      walk.accept(child);
      node = child;
    }
    walk.finish(target[node]);
  }
}

void verify_tree_rejection(const VerifyTreeRejectionParams& p) {
  static thread_local Children children;
  const VerifyTreeParams& tree = p.tree;
  const auto uniform = [&](const void* uniforms, int64_t i) {
    return p.uniforms_are_double ? static_cast<const double*>(uniforms)[i]
                                 : double(static_cast<const float*>(uniforms)[i]);
  };
  for (int b = 0; b < tree.batch; ++b) {
    const int64_t offset = int64_t(b) * tree.num_nodes;
    const int64_t* tokens = tree.tokens + offset;
    children.build(tree.parents + offset, tree.num_nodes);
    Walk walk(tree, b);
    Residual residual(p.vocab);
    int32_t node = 0;
    while (true) {
      residual.start(p.target_probs + b * p.target_stride_b + node * p.target_stride_n);
      const float* draft = p.draft_probs + b * p.draft_stride_b + node * p.draft_stride_n;
      int32_t child = children.first[node];
      for (; child >= 0; child = children.next[child]) {
        const int64_t token = tokens[child];
        // What the draft cannot have drawn is no trial.
        if (token < 0 || token >= p.vocab || !(draft[token] > 0.f)) continue;
        if (uniform(p.uniforms, offset + child) * double(draft[token]) < residual[token]) break;
        residual.subtract(draft);
      }
      if (child < 0) break;
      walk.accept(child);
      node = child;
    }
    walk.finish(residual.draw(uniform(p.final_uniforms, offset + node)));
  }
}

}  // namespace specextend::cpu
