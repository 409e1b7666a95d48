#pragma once

// The rows of a work item, and the memory that it works in.

#include "cpu/isa/attention/math.h"

namespace specextend::cpu {
namespace {
namespace attention {

// Where the packed rows of an item stand in the tensors, and what its sequence is like. Letters are
// those of params.h.
struct ItemRows {
  const AttentionItem& item;
  const TreeAttentionParams& p;
  const int count, group;  // rows; query heads per KV head
  const int tree_begin,
      tree_count;        // tree rows [tree_begin, tree_begin + tree_count) are the item's
  const int64_t prefix;  // P, clamped
  const bool masked;     // the tree keys of a row are not simply the first so many

  explicit ItemRows(const AttentionItem& item_)
      : item(item_),
        p(*item.params),
        count(item.num_rows),
        group(p.num_heads / p.num_kv_heads),
        tree_begin(item.row_begin / group),
        tree_count((item.row_begin + count - 1) / group - tree_begin + 1),
        prefix(max_of(0, min_of(p.prefix_lens[item.b], p.capacity - p.num_tree_keys))),
        masked(p.num_tree_keys > 0 && (p.mask || (p.k_depths && by_position()))) {}

  int tree_row(int i) const { return (item.row_begin + i) / group; }
  int head(int i) const { return item.kv_head * group + (item.row_begin + i) % group; }

  // Returns the index of row i in [B, M, Hq].
  int64_t output_row(int i) const {
    return (int64_t(item.b) * p.num_rows + tree_row(i)) * p.num_heads + head(i);
  }

  // Returns the size of a row of keys or values, or, if they differ, the smaller one: so much of
  // each is fetched ahead.
  int shorter_row() const { return int(min_of(p.head_dim, p.value_dim)); }

  // Returns what products of queries and keys are multiplied by: to logits of base 2, or by their
  // softcap.
  float logit_scale() const { return p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2E; }

  // Returns the position of tree row m.
  int64_t position(int m) const {
    return prefix + (p.q_depths ? p.q_depths[int64_t(item.b) * p.num_rows + m]
                                : m + p.num_tree_keys - p.num_rows);
  }

  // Returns whether a row's position hides keys.
  bool by_position() const { return p.window || p.attention_chunk; }

  // Returns the first position that tree row m sees.
  int64_t first_seen(int m) const {
    if (p.window) return max_of(0, position(m) - p.window + 1);
    if (p.attention_chunk) return max_of(0, position(m)) / p.attention_chunk * p.attention_chunk;
    return 0;
  }

  // Returns the position of a tree key.
  int64_t key_position(int slot) const {
    return prefix + (p.k_depths ? p.k_depths[int64_t(item.b) * p.num_tree_keys + slot] : slot);
  }
};

// The maximum of some logits (base 2), and the sum of 2^(logit - max). Of no logits the sum is 0.
struct SoftmaxState {
  float max, sum;
};

// What is known of one packed row.
struct RowState {
  int64_t begin, end;  // positions of the line that it sees; past the prefix a mask decides, if any
  int tree_row;        // counted from the item's first
  float max;           // of the logits of this segment so far, base 2
  SoftmaxState total;  // of the segments before
  float* chunks;       // its row of pieces, or of chunk_lse
};

// What the keys of a block of the line are.
struct KeyBlock {
  int64_t at;         // the block is positions [at, at + kBlock)
  int64_t row_begin;  // its keys, and perhaps others, are `keys` rows of the cache from here on
  int keys, columns;  // columns: keys rounded up to kLanes
  int prefix_keys;    // positions before the tree's
  int tree_begin;     // the row of the first tree key, counted from row_begin
  bool masked;        // masks hide some of the tree keys in it
};

// What the size of an item's memory depends on, beside the call.
struct ScratchShape {
  int rows, words, per_word;  // words of a row of queries or keys, of so many elements each
  int rows_at_once;           // rows whose logits and weights are there at a time
  int64_t own;                // floats for the policy that multiplies blocks
};

// The memory of an item, of which arrays are given out; nothing in it is initialised.
struct ItemScratch {
  int words, dim,
      keys;  // words of a row; columns of the output; keys of the widest block, and more
  float* q;  // [rows, words]
  float *packed_keys, *packed_values;
  float *logits, *weights;  // [rows at once, keys]
  float* line;              // [3, keys]
  float *out, *total;       // [rows, dim]: of a segment; of all before
  float* sum;               // [rows, kLanes]
  float* rescale;           // [rows]
  float* own;
  RowState* states;    // [rows]
  int32_t* slots;      // [tree rows, 1 + kBlock]
  uint64_t* seen;      // bit per tree key
  int64_t floats = 0;  // the size of all

  // Without memory, it tells the size.
  ItemScratch(const TreeAttentionParams& p, const ScratchShape& shape, float* memory) {
    const int rows = shape.rows;
    const auto take = [&](int64_t n) {
      float* const begin = memory ? memory + floats : nullptr;
      floats += (n + 15) / 16 * 16;
      return begin;
    };
    words = shape.words;
    dim = p.out ? round_up(p.value_dim, kLanes) : 0;
    keys = round_up(kBlock + p.num_tree_keys, 2 * kLanes) + 2 * kLanes;
    q = take(int64_t(rows) * words);
    packed_keys = take(int64_t(keys) * words);
    packed_values = take(int64_t(keys) * dim / shape.per_word + dim);
    logits = take(int64_t(shape.rows_at_once) * keys);
    weights = take(int64_t(shape.rows_at_once) * keys);
    line = take(3 * keys);
    out = take(int64_t(rows) * dim);
    total = take(int64_t(rows) * dim);
    sum = take(int64_t(rows) * kLanes);
    rescale = take(rows);
    own = take(shape.own);
    states = reinterpret_cast<RowState*>(take(int64_t(rows) * int64_t(sizeof(RowState) / 4)));
    slots = reinterpret_cast<int32_t*>(take(min_of(rows, p.num_rows) * (kBlock + 1)));
    seen = reinterpret_cast<uint64_t*>(take((p.num_tree_keys + 63) / 64 * 2));
  }
};

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
