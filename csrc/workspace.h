#pragma once

// The working memory of the CUDA kernels of the tree ops; each kernel's is laid out in one piece.

#include <cstddef>
#include <cstdint>

#include "params.h"
#include "vocab.h"

namespace specextend {

// Hands out arrays of one piece of memory, one behind the other; without memory, adds up their
// size.
class Workspace {
 public:
  explicit Workspace(void* memory = nullptr) : memory_(static_cast<unsigned char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    unsigned char* const at = memory_ == nullptr ? nullptr : memory_ + bytes_;
    bytes_ += (count * int64_t(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(at);
  }

  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kAlignment = 16;
  unsigned char* memory_;
  int64_t bytes_ = 0;
};

// So many keys are sorted in shared memory; more are sorted in global memory.
constexpr int64_t kSharedKeys = 4096;

// Returns how many places n keys take to be sorted: a power of two.
SPECEXTEND_HOST_DEVICE int64_t sort_capacity(int64_t n) {
  int64_t capacity = 1;
  while (capacity < n) capacity *= 2;
  return capacity;
}

// Holds the scratch of sample_nodes, for each row and in it for each block of vocab.h.
struct SampleNodesScratch {
  uint64_t* keys;  // [B * N, blocks], without uniforms
  float* refs;     // [B * N, blocks], with uniforms
  double* sums;    // [B * N, run_place(blocks)], with uniforms
};

inline SampleNodesScratch lay_out(const SampleNodesParams& p, Workspace& w) {
  const int64_t rows = int64_t(p.batch) * p.num_nodes, blocks = num_vocab_blocks(p.vocab);
  SampleNodesScratch s{};
  if (p.uniforms == nullptr) {
    s.keys = w.take<uint64_t>(rows * blocks);
  } else {
    s.refs = w.take<float>(rows * blocks);
    s.sums = w.take<double>(rows * run_place(blocks));
  }
  return s;
}

struct ExpandTreeScratch {
  float* refs;           // [B * F, blocks]
  double* sums;          // [B * F, run_place(blocks)]
  uint64_t* lane_keys;   // [B * F, blocks, kVocabLanes]: the key of each lane's best element
  uint64_t* candidates;  // [B * F, sort_capacity(expand_candidates)], or null: in shared memory
  uint64_t* beam;        // [B, sort_capacity(width)], or null: in shared memory
};

// Returns how many elements of a row are looked at, at most: its best top_k elements lie in the
// top_k lanes whose best elements are the best.
SPECEXTEND_HOST_DEVICE int64_t expand_candidates(int64_t vocab, int64_t top_k) {
  const int64_t elements = top_k * kVocabLaneElements;
  return elements < vocab ? elements : vocab;
}

inline ExpandTreeScratch lay_out(const ExpandTreeParams& p, Workspace& w) {
  const int64_t rows = int64_t(p.batch) * p.frontier, blocks = num_vocab_blocks(p.vocab);
  const int64_t row_keys = sort_capacity(expand_candidates(p.vocab, p.top_k));
  const int64_t beam_keys = sort_capacity(p.width);
  return {w.take<float>(rows * blocks), w.take<double>(rows * run_place(blocks)),
          w.take<uint64_t>(rows * blocks * kVocabLanes),
          row_keys > kSharedKeys ? w.take<uint64_t>(rows * row_keys) : nullptr,
          beam_keys > kSharedKeys ? w.take<uint64_t>(p.batch * beam_keys) : nullptr};
}

constexpr int64_t kFinalizeCandidateBytes = 16;      // rank, log probability, parent
constexpr int64_t kFinalizeSharedCandidates = 4096;  // in shared memory; more are in global memory

struct FinalizeTreeScratch {
  unsigned char* candidates;  // [B, T, kFinalizeCandidateBytes], or null: in shared memory
};

inline FinalizeTreeScratch lay_out(const FinalizeTreeParams& p, Workspace& w) {
  if (p.num_candidates <= kFinalizeSharedCandidates) return {nullptr};
  return {w.take<unsigned char>(int64_t(p.batch) * p.num_candidates * kFinalizeCandidateBytes)};
}

}  // namespace specextend
