#pragma once

// Keys and values of the cache, packed into the panels that product.h multiplies by.

#include "cpu/isa/attention/product.h"

namespace specextend::cpu {
namespace {
namespace attention {

// The keys of a block that are read: all before the tree's, and of the tree's those that some row
// sees. Others may hold anything.
struct SeenKeys {
  int tree_begin;        // the first tree key, counted from the block's first key
  const uint64_t* tree;  // bit per tree key; null: all are read

  SPECEXTEND_ALWAYS_INLINE bool contains(int key) const {
    const int t = key - tree_begin;
    return !tree || t < 0 || (tree[t >> 6] >> (t & 63) & 1);
  }
};

// Loads kTileWords words of the keys k, k + stride, ..., of which there are n <= kLanes,
// transposed.
template <typename Math, typename T>
SPECEXTEND_ALWAYS_INLINE void load_transposed(const T* k, int64_t stride, int n, int words,
                                              Floats rows[kTileWords]) {
#pragma GCC unroll 8
  for (int i = 0; i < kTileWords; ++i) {
    rows[i] = join_tiles([&](int tile) {
      const int key = i + tile * kTileWords;
      return key < n ? Math::load(k + key * stride, words) : Tile{};
    });
  }
  transpose(rows);
}

// Packs panels of B for the logits: B[word, key]. `columns` are the keys rounded up to kLanes, and
// those behind the last key become 0.
template <typename Math, typename T>
__attribute__((noinline)) void pack_keys(const CacheRows<T>& k, int keys, int columns, int words,
                                         float* packed, Prefetcher* prefetch) {
  constexpr int kWidth = kPanel * kLanes;
  const int64_t stride = k.stride;
  for (int col = 0; col < columns; col += kLanes) {
    const int panel = col / kWidth * kWidth, width = int(min_of(kWidth, columns - panel));
    float* to = packed + int64_t(panel) * words + (col - panel);
    const T* from = k.row(col);
    const int n = int(min_of(kLanes, keys - col));
    int w = 0;
    if (n == kLanes)
      for (; w + kTileWords <= words; w += kTileWords) {
        Floats rows[kTileWords];
        load_transposed<Math>(from + w * Math::kPerWord, stride, kLanes, kTileWords, rows);
#pragma GCC unroll 8
        for (int i = 0; i < kTileWords; ++i) store(to + int64_t(w + i) * width, rows[i]);
        prefetch->steps(kLanes / 4);
      }
    for (; w < words; w += kTileWords) {
      Floats rows[kTileWords];
      load_transposed<Math>(from + w * Math::kPerWord, stride, n, words - w, rows);
      for (int i = 0; i < kTileWords && w + i < words; ++i)
        store(to + int64_t(w + i) * width, rows[i]);
    }
  }
}

// Packs panels of B for the output: B[key (pair), d]. Keys that are not seen become 0.
template <typename Math, typename T>
__attribute__((noinline)) void pack_values(const CacheRows<T>& v, int keys, int dim, SeenKeys seen,
                                           float* packed, Prefetcher* prefetch) {
  constexpr int kWidth = kPanel * kLanes;
  const int steps = (keys + Math::kPerWord - 1) / Math::kPerWord, columns = round_up(dim, kLanes);
  const T* first = v.first;
  const int64_t stride = v.stride;
  for (int s = 0; s < steps; ++s) {
    const T* from[Math::kPerWord];
    for (int i = 0; i < Math::kPerWord; ++i) {
      const int key = s * Math::kPerWord + i;
      from[i] = key < keys && seen.contains(key) ? first + key * stride : nullptr;
    }
    prefetch->steps(3);
    for (int panel = 0; panel < columns; panel += kWidth) {
      const int width = int(min_of(kWidth, columns - panel));
      Math::pack_value_row(from, panel, dim, width,
                           packed + int64_t(panel) * steps + int64_t(s) * width);
    }
  }
}

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
