#pragma once

// Blocks of keys multiplied by matrix units: the policy of row_block.h for bf16 with AMX, for any
// number of rows.
//
// Rows come in tiles of 16, two of which make a group. Keys are multiplied as they lie in the cache
// (scores = keys queries^T), so that only queries are packed, once; the scores of a tile are then
// transposed for the softmax of a row. Values are interleaved by pairs of keys, once per block. The
// softmax of a group takes turns with the scores of the next, of which the processor computes the
// one while the other waits.
//
// A key lies at the place in a tile that its place in the row's line says. Where masks hide tree
// keys, that differs from row to row: the last tiles of such lines are put together for each tree
// row, of its values alone.

#include "cpu/isa/attention/item_cache.h"
#include "cpu/isa/attention/pack.h"
#include "cpu/isa/attention/softmax.h"
#include "cpu/isa/attention/tiles.h"

namespace specextend::cpu {
namespace {
namespace attention {

class TileBlocks {
 public:
  using Math = BFloat16Math;
  using Element = BFloat16;

  TileBlocks(const ItemRows& rows, const ItemScratch& scratch, const TreeSlots& slots,
             Softmax<Math>* softmax)
      : rows_(rows),
        p_(rows.p),
        scratch_(scratch),
        slots_(slots),
        softmax_(*softmax),
        cache_(rows),
        tiles_((rows.count + kTile - 1) / kTile),
        value_lines_((p_.value_dim * int(sizeof(BFloat16)) + 63) / 64),
        own_(scratch.own, tiles_, scratch) {}

  static ItemScratch make_scratch(const TreeAttentionParams& p, int rows, float* memory) {
    const int padded = round_up(rows, kTile), words = round_up(p.head_dim / 2, kTile);
    ScratchShape shape{padded, words, Math::kPerWord, kGroupRows, 0};
    shape.own = Own(nullptr, padded / kTile, ItemScratch(p, shape, nullptr)).floats;
    return ItemScratch(p, shape, memory);
  }

  void set_query(int i, const BFloat16* q) {
    float* const to = scratch_.q + int64_t(i) * scratch_.words;
    memset(to, 0, size_t(scratch_.words) * 4);
    Math::copy_words(q, to, p_.head_dim / Math::kPerWord);
  }

  void begin() {
    const int words = scratch_.words;
    memset(scratch_.q + int64_t(rows_.count) * words, 0,
           size_t(tiles_ * kTile - rows_.count) * size_t(words) * 4);
    for (int t = 0; t < tiles_; ++t)
      for (int w = 0; w < words; w += kTileWords)
        transpose_to(scratch_.q + int64_t(t) * kTile * words + w, words,
                     queries(t) + int64_t(w) * kTile, kTile, [](Floats pairs) { return pairs; });
    // Rows that fill a tile up have no weights.
    memset(scratch_.weights, 0, size_t(kGroupRows) * size_t(scratch_.keys) * 4);
    configure_tiles();
  }

  void end() { _tile_release(); }

  void run(const KeyBlock& block, bool first) {
    const bool output = cache_.v.first;
    if (first && output) memset(scratch_.out, 0, size_t(tiles_) * kTile * size_t(scratch_.dim) * 4);
    prefetch_ = {{}, 0, rows_.shorter_row() * int(sizeof(BFloat16)), {}};
    const Prefetcher::Rows next_keys = cache_.block_behind(cache_.k, block.row_begin, kBlock);
    prefetch_.append(output ? to_fetch(cache_.v, block.row_begin, block.keys) : next_keys);
    const CacheRows<BFloat16> keys = whole_tiles(block);
    const int pairs = round_up(block.keys, 2 * kTile) / (2 * kTile);  // of tiles of keys
    for (int pair = 0; pair < pairs; ++pair) multiply_keys(keys, pair, 0);
    // Up to here a line is the same for all rows.
    const int shared = block.masked ? block.prefix_keys / kStep : (block.keys + kStep - 1) / kStep;
    if (output) {
      prefetch_.append(next_keys);
      const CacheRows<BFloat16> v = cache_.v.from(block.row_begin);
      pack_pairs(
          0, shared * kStep, [&](int at) { return at < block.keys ? v.row(at) : nullptr; },
          scratch_.packed_values);
    }
    for (int first_row = 0; first_row < rows_.count; first_row += kGroupRows) {
      run_softmax(block, first_row, keys, pairs);
      if (!output) continue;
      multiply_values(scratch_.weights, scratch_.keys, num_tiles_from(first_row), shared,
                      scratch_.packed_values, scratch_.out + int64_t(first_row) * scratch_.dim);
      if (block.masked) multiply_own_values(block, first_row, shared);
    }
  }

 private:
  static constexpr int kGroupRows = 2 * kTile;
  static constexpr int kStep = 2 * kTile;  // keys of one product of tiles

  // What the memory of these blocks is divided into.
  struct Own {
    float* queries;    // [tiles, words, kTile]
    float* scores[2];  // [keys, kGroupRows]: of a group and of the next
    float* values;     // [kBlock / 2, dim]: of a tree row
    float* weights;    // [kTile, kBlock / 2]: of some rows of a tree row
    float* out;        // [kTile, dim]
    int64_t floats = 0;

    Own(float* memory, int tiles, const ItemScratch& scratch) {
      const auto take = [&](int64_t n) {
        float* const begin = memory ? memory + floats : nullptr;
        floats += n;
        return begin;
      };
      queries = take(int64_t(tiles) * scratch.words * kTile);
      for (float*& to : scores) to = take(int64_t(scratch.keys) * kGroupRows);
      values = take(int64_t(kBlock / 2) * scratch.dim);
      weights = take(kTile * kBlock / 2);
      out = take(int64_t(kTile) * scratch.dim);
    }
  };

  float* queries(int tile) const { return own_.queries + int64_t(tile) * scratch_.words * kTile; }

  int num_tiles_from(int first_row) const {
    return int(min_of(kGroupRows / kTile, tiles_ - first_row / kTile));
  }

  // Writes f(from^T), of kTile rows and kTileWords columns.
  template <typename F>
  SPECEXTEND_ALWAYS_INLINE static void transpose_to(const float* from, int64_t stride, float* to,
                                                    int64_t to_stride, const F& f) {
    Floats rows[kTileWords];
    load_transposed<Float32Math>(from, stride, kTile, kTileWords, rows);
#pragma GCC unroll 8
    for (int i = 0; i < kTileWords; ++i) store(to + i * to_stride, f(rows[i]));
  }

  // Returns the block's keys where they lie if they are whole pairs of tiles, else in a copy that
  // is filled up with 0.
  CacheRows<BFloat16> whole_tiles(const KeyBlock& block) {
    const CacheRows<BFloat16> k = cache_.k.from(block.row_begin);
    if (p_.head_dim % kStep == 0 && block.keys % kStep == 0) return k;
    const int words = scratch_.words;
    const size_t bytes = size_t(p_.head_dim) * sizeof(BFloat16), all = size_t(words) * 4;
    float* to = scratch_.packed_keys;
    for (int j = 0; j < block.keys; ++j, to += words) {
      memcpy(to, k.row(j), bytes);
      memset(reinterpret_cast<char*>(to) + bytes, 0, all - bytes);
    }
    memset(to, 0, size_t(round_up(block.keys, kStep) - block.keys) * all);
    return {reinterpret_cast<const BFloat16*>(scratch_.packed_keys), words * Math::kPerWord};
  }

  // Computes the scores of a pair of tiles of keys for the group of rows from first_row on.
  void multiply_keys(const CacheRows<BFloat16>& keys, int pair, int first_row) {
    const BFloat16* const k = keys.row(int64_t(pair) * kStep);
    const int64_t key_bytes = keys.stride * int64_t(sizeof(BFloat16));
    float* const to = scores(first_row) + int64_t(pair) * kStep * kGroupRows;
    auto* const multiply =
        num_tiles_from(first_row) == 2
            ? tiles_ == 2 ? multiply_key_tiles<2, true> : multiply_key_tiles<2, false>
        : tiles_ == 1 ? multiply_key_tiles<1, true>
                      : multiply_key_tiles<1, false>;
    multiply(k, key_bytes, scratch_.words, queries(first_row / kTile), to, kGroupRows * 4,
             &prefetch_);
  }

  float* scores(int first_row) const { return own_.scores[first_row / kGroupRows % 2]; }

  // Leaves the weights of the group of rows from first_row on, in line, and rescales their output;
  // computes the scores of the next group meanwhile.
  void run_softmax(const KeyBlock& block, int first_row, const CacheRows<BFloat16>& keys,
                   int pairs) {
    const int next_row = first_row + kGroupRows;
    const int count = int(min_of(kGroupRows, rows_.count - first_row));
    int pair = next_row < rows_.count ? 0 : pairs;
    for (int r = 0; r < count; ++r) {
      if (r % kTileWords == 0) transpose_scores(first_row, r, block.columns);
      const int i = first_row + r;
      const int64_t at = int64_t(r) * scratch_.keys;
      softmax_.run_in_line(i, block, scratch_.logits + at, scratch_.weights + at);
      if (cache_.v.first) rescale(scratch_.out + int64_t(i) * scratch_.dim, scratch_.rescale[i]);
      for (; pair < pairs * (r + 1) / count; ++pair) multiply_keys(keys, pair, next_row);
    }
  }

  // Makes logits of the scores of kTileWords rows, from row r of a group on.
  void transpose_scores(int first_row, int r, int columns) {
    const float scale = rows_.logit_scale();
    const float* from = scores(first_row) + r;
    float* const to = scratch_.logits + int64_t(r) * scratch_.keys;
    for (int j = 0; j < columns; j += kTile)
      transpose_to(from + int64_t(j) * kGroupRows, kGroupRows, to + j, scratch_.keys,
                   [&](Floats sums) { return sums * scale; });
  }

  void rescale(float* out, float factor) const {
    if (factor == 1.f) return;
    for (int d = 0; d < scratch_.dim; d += kLanes) store(out + d, load(out + d) * factor);
  }

  // Interleaves the pairs of values at positions [begin, end) of a block: row(at), or 0 where that
  // is null.
  template <typename F>
  void pack_pairs(int begin, int end, const F& row, float* to) {
    Prefetcher ahead = prefetch_;
    for (int at = begin; at < end; at += 2, to += scratch_.dim) {
      const BFloat16* const from[2] = {row(at), row(at + 1)};
      Math::pack_value_row(from, 0, p_.value_dim, scratch_.dim, to);
      ahead.steps(value_lines_);  // and as many in multiply_values
    }
    prefetch_ = ahead;
  }

  // Adds to the output of one or two tiles of rows.
  void multiply_values(const float* weights, int weight_stride, int tiles, int steps,
                       const float* values, float* out) {
    if (steps == 0) return;
    const int dim = scratch_.dim;
    for (int d = 0; d < dim; d += 2 * kTile) {
      const bool two = d + kTile < dim;
      auto* const multiply = tiles == 2
                                 ? two ? multiply_value_tiles<2, 2> : multiply_value_tiles<2, 1>
                             : two ? multiply_value_tiles<1, 2>
                                   : multiply_value_tiles<1, 1>;
      multiply(weights, int64_t(weight_stride) * 4, steps, values + d, dim, out + d, &prefetch_);
    }
  }

  // Adds to the output of a group's rows what of their lines lies behind the first `shared` steps:
  // values that are put together for each tree row.
  void multiply_own_values(const KeyBlock& block, int first_row, int shared) {
    const int end = int(min_of(first_row + kGroupRows, rows_.count));
    for (int i = first_row, next; i < end; i = next) {
      const int tree_row = scratch_.states[i].tree_row;
      for (next = i + 1; next < end && next - i < kTile; ++next)
        if (scratch_.states[next].tree_row != tree_row) break;
      const int prefix_keys = block.prefix_keys;
      const int keys = prefix_keys + slots_.count(tree_row);
      const int steps = (keys + kStep - 1) / kStep - shared;
      if (steps <= 0) continue;
      const int32_t* const slots = slots_.slots(tree_row);
      const auto row = [&](int at) -> const BFloat16* {
        if (at >= keys) return nullptr;
        return cache_.v.row(at < prefix_keys ? block.at + at
                                             : rows_.prefix + slots[at - prefix_keys]);
      };
      pack_pairs(shared * kStep, (shared + steps) * kStep, row, own_.values);
      const float* weights = scratch_.weights + int64_t(i - first_row) * scratch_.keys;
      float* const out = scratch_.out + int64_t(i) * scratch_.dim;
      add_rows(next - i, steps, weights + shared * kTile, out);
    }
  }

  // Adds weights * own values to the output of at most kTile rows, in a tile that has no others.
  void add_rows(int count, int steps, const float* weights, float* out) {
    constexpr int kWords = kBlock / 2;
    memset(own_.weights, 0, kTile * kWords * 4);
    for (int r = 0; r < count; ++r)
      memcpy(own_.weights + r * kWords, weights + int64_t(r) * scratch_.keys,
             size_t(steps) * kTile * 4);
    const size_t bytes = size_t(count) * size_t(scratch_.dim) * 4;
    memcpy(own_.out, out, bytes);
    multiply_values(own_.weights, kWords, 1, steps, own_.values, own_.out);
    memcpy(out, own_.out, bytes);
  }

  const ItemRows& rows_;
  const TreeAttentionParams& p_;
  const ItemScratch& scratch_;
  const TreeSlots& slots_;
  Softmax<Math>& softmax_;
  const ItemCache<BFloat16> cache_;
  const int tiles_;        // of rows
  const int value_lines_;  // cache lines of a row of values
  const Own own_;
  Prefetcher prefetch_;
};

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
