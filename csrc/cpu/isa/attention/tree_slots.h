#pragma once

// Which tree keys stand where in the lines of the rows, where masks hide some.

#include "cpu/isa/attention/item_rows.h"

namespace specextend::cpu {
namespace {
namespace attention {

class TreeSlots {
 public:
  TreeSlots(const ItemRows& rows, int32_t* slots, uint64_t* seen)
      : rows_(rows), p_(rows.p), slots_(slots), seen_(seen) {}

  // Notes which tree keys the rows see, for seen().
  void prepare() {
    if (!rows_.masked) return;
    const int words = (p_.num_tree_keys + 63) / 64;
    memset(seen_, 0, size_t(words) * 8);
    for (int m = 0; m < rows_.tree_count; ++m)
      for (int w = 0; w < words; ++w) seen_[w] |= mask_word(rows_.tree_begin + m, w);
  }

  // Returns the tree keys that some row sees, a bit each.
  const uint64_t* seen() const { return seen_; }

  // Finds the tree keys at positions [line_begin, line_begin + kBlock) of each row's line. Returns
  // false if there are none; else their slots lie in [begin(), end()).
  bool find(int64_t line_begin) {
    const int64_t rank_begin = line_begin - rows_.prefix, rank_end = rank_begin + kBlock;
    begin_ = p_.num_tree_keys, end_ = 0;
    for (int m = 0; m < rows_.tree_count; ++m) {
      int32_t* slots = slots_ + int64_t(m) * (kBlock + 1);
      int count = 0;
      int64_t rank = 0;
      for (int w = 0; w * 64 < p_.num_tree_keys && rank < rank_end; ++w) {
        uint64_t word = mask_word(rows_.tree_begin + m, w);
        const int ones = __builtin_popcountll(word);
        if (rank + ones > rank_begin)
          for (int64_t r = rank; word && r < rank_end; word &= word - 1, ++r)
            if (r >= rank_begin) slots[1 + count++] = w * 64 + __builtin_ctzll(word);
        rank += ones;
      }
      slots[0] = count;
      if (count) {
        begin_ = int(min_of(begin_, slots[1]));
        end_ = int(max_of(end_, slots[count] + 1));
      }
    }
    return end_ > begin_;
  }

  int begin() const { return begin_; }
  int end() const { return end_; }

  // Returns how many were found for a tree row of the item, and their slots in order.
  int count(int tree_row) const { return slots_[int64_t(tree_row) * (kBlock + 1)]; }
  const int32_t* slots(int tree_row) const { return slots_ + int64_t(tree_row) * (kBlock + 1) + 1; }

 private:
  // Returns 64 bits of the mask of row m. Bits past the last key are 0.
  uint64_t mask_word(int m, int w) const {
    const int left = p_.num_tree_keys - w * 64;
    uint64_t word;
    if (p_.mask) {
      word =
          p_.mask[(int64_t(rows_.item.b) * p_.num_rows + m) * ((p_.num_tree_keys + 63) / 64) + w];
    } else {
      const int seen = m + p_.num_tree_keys - p_.num_rows + 1 - w * 64;
      word = seen <= 0 ? 0 : seen >= 64 ? ~uint64_t(0) : (uint64_t(1) << seen) - 1;
    }
    return left >= 64 ? word : word & ((uint64_t(1) << left) - 1);
  }

  const ItemRows& rows_;
  const TreeAttentionParams& p_;
  int32_t* slots_;  // [tree rows, 1 + kBlock]: their number, and the slots
  uint64_t* seen_;
  int begin_ = 0, end_ = 0;
};

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
