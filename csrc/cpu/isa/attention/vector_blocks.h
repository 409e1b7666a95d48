#pragma once

// Blocks of keys multiplied by vector instructions: the policy of row_block.h for instruction sets
// without matrix units. Few rows take a full block without packing it, where direct.h serves them;
// for all others keys and values are packed first.

#include "cpu/isa/attention/direct.h"
#include "cpu/isa/attention/item_cache.h"
#include "cpu/isa/attention/pack.h"
#include "cpu/isa/attention/softmax.h"

namespace specextend::cpu {
namespace {
namespace attention {

constexpr int kPart = 64;  // keys that are packed at a time for a single tile of rows

template <typename MathOfT, typename T>
class VectorBlocks {
  using Path = Direct<MathOfT, T>;

 public:
  using Math = MathOfT;
  using Element = T;

  VectorBlocks(const ItemRows& rows, const ItemScratch& scratch, const TreeSlots& slots,
               Softmax<Math>* softmax)
      : rows_(rows),
        p_(rows.p),
        scratch_(scratch),
        slots_(slots),
        softmax_(*softmax),
        cache_(rows) {}

  static ItemScratch make_scratch(const TreeAttentionParams& p, int rows, float* memory) {
    const int at_once = int(max_of(kTileRows, min_of(rows, Path::kRows)));
    return ItemScratch(p, {rows, p.head_dim / Math::kPerWord, Math::kPerWord, at_once, 0}, memory);
  }

  void set_query(int i, const T* q) {
    Math::copy_words(q, scratch_.q + int64_t(i) * scratch_.words, scratch_.words);
  }
  void begin() {}
  void end() {}

  void run(const KeyBlock& block, bool first) {
    empty_ = first;
    prefetch_ = {{}, 0, rows_.shorter_row() * int(sizeof(T)), {}};
    const bool full = !block.masked && block.keys == kBlock;
    if (full && Path::takes(rows_.count, p_.head_dim) && Path::takes(rows_.count, p_.value_dim)) {
      run_direct(block);
    } else {
      run_packed(block);
    }
  }

 private:
  // Serves a full block for few rows. What it reads is fetched half a block ahead: not more, since
  // what comes before the lead in an item is not fetched at all; not less, since values are read
  // panel by panel of columns, and the first panel runs through the rows faster than whole rows are
  // fetched.
  void run_direct(const KeyBlock& block) {
    constexpr int kLead = kBlock / 2;
    const CacheRows<T> k = cache_.k.from(block.row_begin);
    prefetch_.append(to_fetch(k, kLead, kBlock - kLead));
    if (cache_.v.first) prefetch_.append(to_fetch(cache_.v, block.row_begin, kBlock));
    Path::logits(logits_product(kBlock), k, scratch_.packed_keys, &prefetch_);
    for (int i = 0; i < rows_.count; ++i) run_softmax(i, i, block);
    prefetch_.append(cache_.block_behind(cache_.k, block.row_begin, kLead));
    if (cache_.v.first)
      Path::values(values_product(kBlock, empty_ ? nullptr : scratch_.rescale),
                   cache_.v.from(block.row_begin), &prefetch_);
  }

  // Serves a block by packing it. Rows of one tile pass over what is packed once: in parts that
  // stay in the L1 cache. Else all is packed for the tiles to share. The order of the sums is the
  // same.
  void run_packed(const KeyBlock& block) {
    prefetch_.append(cache_.block_behind(cache_.k, block.row_begin, kBlock));
    if (cache_.v.first) prefetch_.append(cache_.block_behind(cache_.v, block.row_begin, kBlock));
    const int part = num_tiles(rows_.count) == 1 ? kPart : block.columns;
    for_each_tile(rows_.count, [&](int first, int count) {
      multiply_keys(block, first, count, part);
      for (int r = 0; r < count; ++r) run_softmax(first + r, r, block);
      if (cache_.v.first) multiply_values(block, first, count, part);
    });
  }

  // Computes the logits of a tile of rows. The first tile packs the keys.
  void multiply_keys(const KeyBlock& block, int first, int count, int part) {
    for (int j = 0; j < block.keys; j += part) {
      const int columns = int(min_of(part, block.columns - j));
      if (first == 0)
        pack_keys<Math>(cache_.k.from(block.row_begin + j), int(min_of(part, block.keys - j)),
                        columns, scratch_.words, scratch_.packed_keys, &prefetch_);
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
        pack_values<Math>(cache_.v.from(block.row_begin + j), n, p_.value_dim, seen,
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
    return {rows_.count,   scratch_.words,      columns,
            scratch_.q,    scratch_.words,      scratch_.logits,
            scratch_.keys, rows_.logit_scale(), nullptr};
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

  const ItemRows& rows_;
  const TreeAttentionParams& p_;
  const ItemScratch& scratch_;
  const TreeSlots& slots_;
  Softmax<Math>& softmax_;
  const ItemCache<T> cache_;
  Prefetcher prefetch_;
  bool empty_;  // no key of this segment was summed yet
};

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
