#pragma once

// Attention of one work item: a block of rows over some segments of their lines.
//
// How rows meet a block of keys is the policy Blocks, one of vector_blocks.h and tile_blocks.h:
//
//   Math, Element               of words; of queries, keys and values
//   make_scratch(p, rows, at)   the item's memory; its size, if `at` is null
//   set_query(i, q)             takes row i's query
//   begin(), end()              are called around the blocks of an item, all queries being known
//   run(block, first)           makes logits of all rows, their weights, and output = rescale *
//                               output + weights * values; first: what the output holds is not read

#include "cpu/isa/attention/item_cache.h"
#include "cpu/isa/attention/partial_softmax.h"
#include "cpu/isa/attention/softmax.h"

namespace specextend::cpu {
namespace {
namespace attention {

template <typename Blocks>
class RowBlock {
  using Math = typename Blocks::Math;
  using T = typename Blocks::Element;

 public:
  explicit RowBlock(const AttentionItem& item)
      : item_(item),
        p_(*item.params),
        rows_(item),
        scratch_(Blocks::make_scratch(p_, item.num_rows, static_cast<float*>(item.scratch))),
        slots_(rows_, scratch_.slots, scratch_.seen),
        chunks_(rows_, scratch_.states),
        softmax_(rows_, scratch_, slots_, &chunks_),
        blocks_(rows_, scratch_, slots_, &softmax_) {}

  static int64_t scratch_floats(const TreeAttentionParams& p, int rows) {
    return Blocks::make_scratch(p, rows, nullptr).floats;
  }

  void run() {
    prepare_rows();
    slots_.prepare();
    chunks_.clear();
    blocks_.begin();
    for (int segment = item_.segment_begin; segment < item_.segment_end; ++segment) {
      run_segment(segment);
      end_segment(segment);
    }
    blocks_.end();
    chunks_.flush();
    if (item_.partials) return;
    for (int i = 0; i < rows_.count; ++i)
      finish(i, scratch_.states[i].total, scratch_.total + int64_t(i) * scratch_.dim);
  }

  // Merges the partials of segments that were run apart.
  void combine() {
    for (int i = 0; i < rows_.count; ++i) {
      SoftmaxState total{-INFINITY, 0.f};
      for (int segment = item_.segment_begin; segment < item_.segment_end; ++segment) {
        const float* part = partial(segment, i);
        merge_part(&total, scratch_.total, {part[0], part[1]}, part + 2, scratch_.dim);
      }
      finish(i, total, scratch_.total);
    }
  }

 private:
  // Returns where the results of row i in a segment go: maximum, sum, output.
  float* partial(int segment, int i) const {
    return item_.partials + (int64_t(segment) * rows_.count + i) * (scratch_.dim + 2);
  }

  void finish(int i, SoftmaxState total, const float* out) {
    finish_row<T>(p_, rows_.output_row(i), total, out);
    chunks_.merge_pieces(i);
  }

  void prepare_rows() {
    const int n = p_.num_tree_keys;
    const int64_t prefix = rows_.prefix;
    first_begin_ = prefix + n, last_end_ = rows_.masked ? prefix + n : 0;
    for (int i = 0; i < rows_.count; ++i) {
      const int m = rows_.tree_row(i);
      const T* q = static_cast<const T*>(p_.q) + item_.b * p_.q_stride_b + m * p_.q_stride_m +
                   rows_.head(i) * p_.q_stride_h;
      blocks_.set_query(i, q);
      RowState& s = scratch_.states[i];
      s.tree_row = m - rows_.tree_begin;
      s.begin = rows_.first_seen(m);
      s.end = rows_.masked ? prefix : max_of(prefix, prefix + m + n - p_.num_rows + 1);
      s.total = {-INFINITY, 0.f};
      first_begin_ = min_of(first_begin_, s.begin);
      last_end_ = max_of(last_end_, s.end);
    }
  }

  void run_segment(int segment) {
    empty_ = true;
    softmax_.clear();
    const int64_t begin = int64_t(segment) * kAttentionSegment;
    const int64_t end = min_of(begin + kAttentionSegment, rows_.prefix + p_.num_tree_keys);
    for (int64_t at = begin; at < end; at += kBlock) run_block(at);
  }

  // Adds the segment to those before, or leaves it to combine.
  void end_segment(int segment) {
    for (int i = 0; i < rows_.count; ++i) {
      RowState& s = scratch_.states[i];
      const SoftmaxState state{s.max, empty_ ? 0.f : softmax_.sum(i)};
      const float* out = scratch_.out + int64_t(i) * scratch_.dim;
      if (item_.partials) {
        float* to = partial(segment, i);
        to[0] = state.max, to[1] = state.sum;
        if (!empty_) memcpy(to + 2, out, size_t(scratch_.dim) * 4);
      } else {
        merge_part(&s.total, scratch_.total + int64_t(i) * scratch_.dim, state, out, scratch_.dim);
      }
    }
  }

  // Serves positions [at, at + kBlock) of the line.
  void run_block(int64_t at) {
    const KeyBlock block = find_keys(at);
    if (block.keys == 0) return;
    chunks_.begin_block(at);
    blocks_.run(block, empty_);
    empty_ = false;
  }

  // Returns the keys of the block at `at`; none if no row sees any.
  KeyBlock find_keys(int64_t at) {
    const int64_t prefix = rows_.prefix;
    KeyBlock block{};
    block.at = block.row_begin = at;
    block.masked = rows_.masked && at + kBlock > prefix;
    int64_t row_end = min_of(at + kBlock, last_end_);
    if (block.masked) {
      const bool some = slots_.find(at);
      if (at >= prefix) block.row_begin = prefix + slots_.begin();
      row_end = some ? prefix + slots_.end() : prefix;
    }
    if (block.row_begin >= row_end || (!block.masked && row_end <= first_begin_)) return block;
    block.keys = int(row_end - block.row_begin);
    block.columns = round_up(block.keys, kLanes);
    block.prefix_keys = int(max_of(0, min_of(prefix - at, kBlock)));
    block.tree_begin = int(prefix - block.row_begin);
    return block;
  }

  const AttentionItem& item_;
  const TreeAttentionParams& p_;
  const ItemRows rows_;
  const ItemScratch scratch_;
  TreeSlots slots_;
  ChunkSums chunks_;
  Softmax<Math> softmax_;
  Blocks blocks_;
  int64_t first_begin_, last_end_;  // positions that any row sees
  bool empty_;                      // no key of this segment was summed yet
};

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
