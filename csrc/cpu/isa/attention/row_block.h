#pragma once

// Attention of one work item: a block of rows over some segments of their lines.

#include "cpu/isa/attention/direct.h"
#include "cpu/isa/attention/pack.h"
#include "cpu/isa/attention/partial_softmax.h"
#include "cpu/isa/attention/softmax.h"

namespace specextend::cpu {
namespace {
namespace attention {

constexpr int kPart = 64;  // keys that are packed at a time for a single tile of rows

template <typename Math, typename T>
class RowBlock {
  using Path = Direct<Math, T>;

 public:
  explicit RowBlock(const AttentionItem& item)
      : item_(item),
        p_(*item.params),
        rows_(item),
        scratch_(make_scratch(p_, item.num_rows, static_cast<float*>(item.scratch))),
        slots_(rows_, scratch_.slots, scratch_.seen),
        chunks_(rows_, scratch_.states),
        softmax_(rows_, scratch_, slots_, &chunks_) {
    k_ = {static_cast<const T*>(p_.k) + item.b * p_.k_stride_b + item.kv_head * p_.k_stride_h,
          p_.k_stride_s};
    v_ = {nullptr, p_.v_stride_s};
    if (p_.out)
      v_.first =
          static_cast<const T*>(p_.v) + item.b * p_.v_stride_b + item.kv_head * p_.v_stride_h;
  }

  static int64_t scratch_floats(const TreeAttentionParams& p, int rows) {
    return make_scratch(p, rows, nullptr).floats;
  }

  void run() {
    prepare_rows();
    slots_.prepare();
    chunks_.clear();
    for (int segment = item_.segment_begin; segment < item_.segment_end; ++segment) {
      run_segment(segment);
      end_segment(segment);
    }
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
  static ItemScratch make_scratch(const TreeAttentionParams& p, int rows, float* memory) {
    const int at_once = int(max_of(kTileRows, min_of(rows, Path::kRows)));
    return ItemScratch(p, rows, Math::kPerWord, at_once, memory);
  }

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
      Math::copy_words(q, scratch_.q + int64_t(i) * scratch_.words, scratch_.words);
      RowState& s = scratch_.states[i];
      s.tree_row = m - rows_.tree_begin;
      s.begin = p_.window ? max_of(0, rows_.position(m) - p_.window + 1) : 0;
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
    prefetch_ = {{}, 0, p_.head_dim * int(sizeof(T)), {}};
    const bool full = !block.masked && block.keys == kBlock;
    if (full && Path::takes(rows_.count, p_.head_dim)) {
      run_direct(block);
    } else {
      run_packed(block);
    }
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

  // Returns the rows of a cache in the block behind that from `row` on, as far as this item reads
  // it.
  Prefetcher::Rows block_behind(const CacheRows<T>& cache, int64_t row, int most) const {
    const int64_t begin = row + kBlock, end = int64_t(item_.segment_end) * kAttentionSegment;
    const int64_t rows = min_of(most, min_of(end, rows_.prefix + p_.num_tree_keys) - begin);
    return to_fetch(cache, begin, max_of(0, rows));
  }

  // Serves a full block for few rows. What it reads is fetched half a block ahead: not more, since
  // what comes before the lead in an item is not fetched at all; not less, since values are read
  // panel by panel of columns, and the first panel runs through the rows faster than whole rows are
  // fetched.
  void run_direct(const KeyBlock& block) {
    constexpr int kLead = kBlock / 2;
    const CacheRows<T> k = k_.from(block.row_begin);
    prefetch_.append(to_fetch(k, kLead, kBlock - kLead));
    if (v_.first) prefetch_.append(to_fetch(v_, block.row_begin, kBlock));
    Path::logits(logits_product(kBlock), k, scratch_.packed_keys, &prefetch_);
    for (int i = 0; i < rows_.count; ++i) run_softmax(i, i, block);
    prefetch_.append(block_behind(k_, block.row_begin, kLead));
    if (v_.first)
      Path::values(values_product(kBlock, empty_ ? nullptr : scratch_.rescale),
                   v_.from(block.row_begin), &prefetch_);
  }

  // Serves a block by packing it. Rows of one tile pass over what is packed once: in parts that
  // stay in the L1 cache. Else all is packed for the tiles to share. The order of the sums is the
  // same.
  void run_packed(const KeyBlock& block) {
    prefetch_.append(block_behind(k_, block.row_begin, kBlock));
    if (v_.first) prefetch_.append(block_behind(v_, block.row_begin, kBlock));
    const int part = num_tiles(rows_.count) == 1 ? kPart : block.columns;
    for_each_tile(rows_.count, [&](int first, int count) {
      multiply_keys(block, first, count, part);
      for (int r = 0; r < count; ++r) run_softmax(first + r, r, block);
      if (v_.first) multiply_values(block, first, count, part);
    });
  }

  // Computes the logits of a tile of rows. The first tile packs the keys.
  void multiply_keys(const KeyBlock& block, int first, int count, int part) {
    for (int j = 0; j < block.keys; j += part) {
      const int columns = int(min_of(part, block.columns - j));
      if (first == 0)
        pack_keys<Math>(k_.from(block.row_begin + j), int(min_of(part, block.keys - j)), columns,
                        scratch_.words, scratch_.packed_keys, &prefetch_);
      Product product = logits_product(columns);
      product.rows = count;
      product.a += int64_t(first) * scratch_.words;
      product.c += j;  // each tile's logits take the place of the last one's
      multiply<Math>(product, scratch_.packed_keys, &prefetch_);
    }
  }

  // Adds the values of a tile of rows to their output. The first tile packs them.
  void multiply_values(const KeyBlock& block, int first, int count, int part) {
    constexpr float kOnes[kTileRows] = {1.f, 1.f, 1.f, 1.f, 1.f, 1.f};
    for (int j = 0; j < block.keys; j += part) {
      const int n = int(min_of(part, block.keys - j));
      if (first == 0) {
        const SeenKeys seen{block.tree_begin - j, block.masked ? slots_.seen() : nullptr};
        pack_values<Math>(v_.from(block.row_begin + j), n, p_.head_dim, seen,
                          scratch_.packed_values, &prefetch_);
      }
      const float* const rescale = j > 0 ? kOnes : empty_ ? nullptr : scratch_.rescale + first;
      Product product = values_product(n, rescale);
      product.rows = count;
      product.a += j / Math::kPerWord;
      product.c += int64_t(first) * scratch_.dim;
      multiply<Math>(product, scratch_.packed_values, &prefetch_);
    }
  }

  // Logits [rows, columns] = scale * queries * keys.
  Product logits_product(int columns) const {
    const float scale = p_.softcap > 0 ? p_.scale / p_.softcap : p_.scale * kLog2E;
    return {rows_.count,     scratch_.words, columns, scratch_.q, scratch_.words,
            scratch_.logits, scratch_.keys,  scale,   nullptr};
  }

  // Output [rows, dim] = rescale * output + weights * values.
  Product values_product(int keys, const float* rescale) const {
    const int steps = (keys + Math::kPerWord - 1) / Math::kPerWord;
    return {rows_.count,  steps,        scratch_.dim, scratch_.weights, scratch_.keys,
            scratch_.out, scratch_.dim, 1.f,          rescale};
  }

  // Turns row r of the logits into row r of the weights, for row i of the item.
  void run_softmax(int i, int r, const KeyBlock& block) {
    const int64_t at = int64_t(r) * scratch_.keys;
    softmax_.run(i, block, scratch_.logits + at, scratch_.weights + at);
  }

  const AttentionItem& item_;
  const TreeAttentionParams& p_;
  const ItemRows rows_;
  const ItemScratch scratch_;
  TreeSlots slots_;
  ChunkSums chunks_;
  Softmax<Math> softmax_;
  CacheRows<T> k_, v_;
  int64_t first_begin_, last_end_;  // positions that any row sees
  Prefetcher prefetch_;
  bool empty_;  // no key of this segment was summed yet
};

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
