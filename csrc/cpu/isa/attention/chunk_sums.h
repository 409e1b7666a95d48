#pragma once

// Log-sum-exps of the prefix's chunks, gathered block by block.
//
// What lies of a chunk in one block is a part. Where chunks divide blocks a part is the chunk, and
// goes to chunk_lse; else it is a piece, and the pieces of a chunk are merged in the end.

#include "cpu/isa/attention/item_rows.h"

namespace specextend::cpu {
namespace {
namespace attention {

class ChunkSums {
 public:
  ChunkSums(const ItemRows& rows, RowState* states)
      : rows_(rows), item_(rows.item), p_(rows.p), states_(states) {}

  // Marks every part in the item's segments as empty so far.
  void clear() {
    if (!p_.chunk_lse) return;
    const int64_t places = item_.pieces ? item_.num_pieces : p_.num_chunks;
    const int64_t begin = place(int64_t(item_.segment_begin) * kAttentionSegment);
    const int64_t end = item_.last ? places : place(int64_t(item_.segment_end) * kAttentionSegment);
    for (int i = 0; i < rows_.count; ++i) {
      float* const to = (item_.pieces ? item_.pieces : p_.chunk_lse) + rows_.output_row(i) * places;
      for (int64_t n = begin; n < end; ++n) to[n] = -INFINITY;
      states_[i].chunks = to;
    }
  }

  // Goes on to the block of positions [at, at + kBlock).
  void begin_block(int64_t at) {
    if (!p_.chunk_lse) return;
    first_begin_ = at / p_.chunk_size * p_.chunk_size - at;
    first_place_ = place(at);
  }

  // Adds row i's part of every chunk that has some of the block's first `keys` keys. `x` are the
  // logits (base 2), `weights` holds 2^(x - shift).
  void add(int i, const float* x, const float* weights, float shift, int keys) {
    if (!p_.chunk_lse || keys <= 0) return;
    const int64_t size = p_.chunk_size;
    float* to = states_[i].chunks + first_place_;
    for (int64_t chunk_begin = first_begin_; chunk_begin < keys; chunk_begin += size, ++to) {
      const int begin = int(max_of(0, chunk_begin)), end = int(min_of(keys, chunk_begin + size));
      Floats sum{};
      int j = begin;
      for (; j + kLanes <= end; j += kLanes) sum += load(weights + j);
      if (j < end) sum += keep_lanes(load(weights + j), 0, end - j, 0.f);
      constexpr float kTooSmall = 0x1p-80f;  // terms of such a sum may have been flushed to 0
      if (!any_at_least(sum, kTooSmall)) {
        *to = exact_lse(x, begin, end);
        continue;
      }
      store(part_sums_ + num_parts_ * kLanes, sum);
      part_shifts_[num_parts_] = shift;
      parts_[num_parts_] = to;
      if (++num_parts_ == kLanes) flush();
    }
  }

  // Takes the logarithms of the parts that wait, a register of them at a time.
  void flush() {
    if (num_parts_ == 0) return;
    float lse[kLanes];
    for (int n = num_parts_; n < kLanes; ++n) {
      store(part_sums_ + n * kLanes, broadcast(1.f));
      part_shifts_[n] = 0.f;
    }
    store(lse, (log2(reduce_add_each(part_sums_)) + load(part_shifts_)) * kLn2);
    for (int n = 0; n < num_parts_; ++n) *parts_[n] = lse[n];
    num_parts_ = 0;
  }

  // Writes row i's chunks, of whose pieces all are there.
  void merge_pieces(int i) {
    if (!item_.pieces) return;
    const float* pieces = item_.pieces + rows_.output_row(i) * item_.num_pieces;
    float* to = p_.chunk_lse + rows_.output_row(i) * p_.num_chunks;
    for (int64_t c = 0; c < p_.num_chunks; ++c) {
      const int64_t begin = c * p_.chunk_size, end = min_of(begin + p_.chunk_size, rows_.prefix);
      if (begin >= end) {
        to[c] = -INFINITY;
        continue;
      }
      const int64_t first = c + begin / kBlock, last = c + (end - 1) / kBlock;
      float max = -INFINITY, sum = 0.f;
      for (int64_t j = first; j <= last; ++j) max = pieces[j] > max ? pieces[j] : max;
      for (int64_t j = first; j <= last && max != -INFINITY; ++j) sum += expf(pieces[j] - max);
      to[c] = sum == 0.f ? -INFINITY : max + logf(sum);
    }
  }

 private:
  // Returns the place in a row of chunks of the first part in the block at `at`. Pieces have one
  // place per chunk and one more per block border.
  int64_t place(int64_t at) const { return at / p_.chunk_size + (item_.pieces ? at / kBlock : 0); }

  // Returns the LSE of logits in base 2, which may all be -inf.
  static float exact_lse(const float* x, int begin, int end) {
    Floats top = broadcast(-INFINITY), sum{};
    for (int j = begin; j < end; j += kLanes)
      top = simd::max(top, keep_lanes(load(x + j), 0, end - j, -INFINITY));
    const float max = reduce_max(top);
    if (max == -INFINITY) return max;
    for (int j = begin; j < end; j += kLanes)
      sum += simd::exp2(keep_lanes(load(x + j), 0, end - j, -INFINITY) - max);
    return (max + log2f(reduce_add(sum))) * kLn2;
  }

  const ItemRows& rows_;
  const AttentionItem& item_;
  const TreeAttentionParams& p_;
  RowState* states_;
  int64_t first_begin_, first_place_;  // of the block's first chunk: its begin, from the block's
  int num_parts_ = 0;                  // parts that wait for flush
  float part_sums_[kLanes * kLanes], part_shifts_[kLanes];
  float* parts_[kLanes];
};

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
