#pragma once

// The keys and values of a work item, where they lie in the cache.

#include "cpu/isa/attention/item_rows.h"
#include "cpu/isa/attention/prefetch.h"

namespace specextend::cpu {
namespace {
namespace attention {

template <typename T>
struct ItemCache {
  CacheRows<T> k, v;  // v.first is null where no output is wanted
  int64_t end;        // rows of the cache that the item reads lie before it

  explicit ItemCache(const ItemRows& rows) {
    const TreeAttentionParams& p = rows.p;
    const AttentionItem& item = rows.item;
    k = {static_cast<const T*>(p.k) + item.b * p.k_stride_b + item.kv_head * p.k_stride_h,
         p.k_stride_s};
    v = {nullptr, p.v_stride_s};
    if (p.out)
      v.first = static_cast<const T*>(p.v) + item.b * p.v_stride_b + item.kv_head * p.v_stride_h;
    end = min_of(int64_t(item.segment_end) * kAttentionSegment, rows.prefix + p.num_tree_keys);
  }

  // Returns up to `most` rows of k or v in the block behind that from `row` on, to be fetched.
  Prefetcher::Rows block_behind(const CacheRows<T>& cache, int64_t row, int most) const {
    const int64_t begin = row + kBlock;
    return to_fetch(cache, begin, max_of(0, min_of(most, end - begin)));
  }
};

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
