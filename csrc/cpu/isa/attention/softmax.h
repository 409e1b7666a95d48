#pragma once

// The softmax of one row over one block of its line.

#include "cpu/isa/attention/chunk_sums.h"
#include "cpu/isa/attention/tree_slots.h"

namespace specextend::cpu {
namespace {
namespace attention {

template <typename Math>
class Softmax {
 public:
  Softmax(const ItemRows& rows, const ItemScratch& scratch, const TreeSlots& slots,
          ChunkSums* chunks)
      : rows_(rows),
        p_(rows.p),
        slots_(slots),
        chunks_(*chunks),
        states_(scratch.states),
        weights_(scratch.line),
        adjusted_(scratch.line + scratch.keys),
        in_line_(scratch.line + 2 * scratch.keys),
        sum_(scratch.sum),
        rescale_(scratch.rescale) {}

  // Begins a segment: no row has seen a key.
  void clear() {
    for (int i = 0; i < rows_.count; ++i) states_[i].max = -INFINITY;
    memset(sum_, 0, size_t(rows_.count) * kLanes * 4);
  }

  // Returns the sum of row i's weights in this segment, relative to its maximum.
  float sum(int i) const { return reduce_add(load(sum_ + int64_t(i) * kLanes)); }

  // Turns row i's logits of a block into words of weights, key by key as they lie in the block, and
  // leaves the factor for what was summed before in rescale[i].
  void run(int i, const KeyBlock& block, const float* logits, float* words) {
    weigh(i, block, logits);
    if (block.masked) put_at_slots(i, block);
    Math::store_weights(weights_, words, block.columns);
  }

  // Does the same, but leaves the weights in the order of the row's line, up to a whole pair of
  // registers.
  void run_in_line(int i, const KeyBlock& block, const float* logits, float* words) {
    const int columns = weigh(i, block, logits);
    store(weights_ + columns, Floats{});
    Math::store_weights(weights_, words, columns);
  }

 private:
  // Leaves the weights of row i's line in weights_: so many, a multiple of kLanes.
  int weigh(int i, const KeyBlock& block, const float* logits) {
    if (block.masked) return weigh_masked(i, block, logits);
    const RowState& s = states_[i];
    const int begin = int(max_of(0, s.begin - block.at));
    const int end = int(min_of(block.columns, s.end - block.at));
    run_line(i, logits, begin, end, block.columns, block.prefix_keys, p_.softcap > 0);
    return block.columns;
  }

  // Serves a block where masks hide tree keys: its logits, given by slot, are put in line.
  int weigh_masked(int i, const KeyBlock& block, const float* logits) {
    const RowState& s = states_[i];
    const int prefix_keys = block.prefix_keys, tree_begin = block.tree_begin;
    const int32_t* slots = slots_.slots(s.tree_row);
    const int tree_keys = slots_.count(s.tree_row), keys = prefix_keys + tree_keys;
    float* const in_line = in_line_;
    memcpy(in_line, logits, size_t(prefix_keys) * 4);
    for (int j = 0; j < tree_keys; ++j) in_line[prefix_keys + j] = logits[tree_begin + slots[j]];
    if (p_.softcap > 0)
      for (int j = 0; j < keys; j += kLanes) store(in_line + j, softcapped(load(in_line + j)));
    for (int j = 0; j < prefix_keys && block.at + j < s.begin; ++j) in_line[j] = -INFINITY;
    for (int j = 0; rows_.by_position() && j < tree_keys; ++j)
      if (rows_.key_position(slots[j]) < s.begin) in_line[prefix_keys + j] = -INFINITY;
    const int columns = round_up(keys, kLanes);
    run_line(i, in_line, 0, keys, columns, prefix_keys, false);
    return columns;
  }

  // Puts the weights of row i's line at their slots.
  void put_at_slots(int i, const KeyBlock& block) {
    const int prefix_keys = block.prefix_keys, tree_row = states_[i].tree_row;
    const int32_t* slots = slots_.slots(tree_row);
    float* const by_slot = in_line_;
    memset(by_slot, 0, size_t(block.columns) * 4);
    memcpy(by_slot, weights_, size_t(prefix_keys) * 4);
    for (int j = 0; j < slots_.count(tree_row); ++j)
      by_slot[block.tree_begin + slots[j]] = weights_[prefix_keys + j];
    memcpy(weights_, by_slot, size_t(block.columns) * 4);
  }

  Floats softcapped(Floats logits) const { return simd::tanh(logits) * (p_.softcap * kLog2E); }

  // Leaves the weights of logits in line, of which row i sees [begin, end), in weights_.
  void run_line(int i, const float* logits, int begin, int end, int columns, int prefix_keys,
                bool softcap) {
    RowState& s = states_[i];
    const float* x = logits;
    float *const adjusted = adjusted_, *const weights = weights_;  // stores might change members
    if (begin > 0 || end < columns || softcap) {
      for (int j = 0; j < columns; j += kLanes) {
        Floats y = load(logits + j);
        if (softcap) y = softcapped(y);
        store(adjusted + j, keep_lanes(y, begin - j, end - j, -INFINITY));
      }
      x = adjusted;
    }
    Floats top = broadcast(-INFINITY);
    for (int j = 0; j < columns; j += kLanes) top = simd::max(top, load(x + j));
    const float block_max = reduce_max(top), max = block_max > s.max ? block_max : s.max;
    const float shift = max == -INFINITY ? 0.f : max;
    const float rescale = max == s.max ? 1.f : simd::exp2(s.max - max);
    Floats sum = load(sum_ + int64_t(i) * kLanes) * rescale;
    for (int j = 0; j < columns; j += kLanes) {
      const Floats weight = simd::exp2(load(x + j) - shift);
      store(weights + j, weight);
      sum += weight;
    }
    store(sum_ + int64_t(i) * kLanes, sum);
    s.max = max;
    rescale_[i] = rescale;
    chunks_.add(i, x, weights, shift, prefix_keys);
  }

  const ItemRows& rows_;
  const TreeAttentionParams& p_;
  const TreeSlots& slots_;
  ChunkSums& chunks_;
  RowState* states_;
  float *weights_, *adjusted_, *in_line_;  // of one row and block
  float* sum_;                             // [rows, kLanes]
  float* rescale_;                         // [rows]
};

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
