#pragma once

// Positions and masks: which keys a query row sees, through the tree's mask, the end of its
// sequence, and a window or the chunk that it is in. Functions that say "by whole warps" are called
// by all lanes of a warp.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention/softmax.cuh"
#include "params.h"
#include "tree.h"
#include "work_partition.h"

namespace specextend {

// Returns the length of a sequence's prefix, clamped to what the cache can hold.
__device__ __forceinline__ int64_t prefix_length(const TreeAttentionParams& p, int b) {
  return clamp_between(p.prefix_lens[b], 0, p.capacity - p.num_tree_keys);
}

// Returns the depth of a query row in the tree; without depths the tree is a chain.
__device__ __forceinline__ int row_depth(const TreeAttentionParams& p, int b, int row) {
  return p.q_depths ? p.q_depths[int64_t(b) * p.num_rows + row]
                    : row + p.num_tree_keys - p.num_rows;
}

// Returns whether rows see from a position on that depends on their own.
__device__ __forceinline__ bool sees_by_position(const TreeAttentionParams& p) {
  return p.window || p.attention_chunk;
}

// Returns the first position that a row sees: that of its window or of its own chunk; 0 without
// either. It never falls with the depth.
__device__ __forceinline__ int64_t first_position(const TreeAttentionParams& p, int64_t prefix,
                                                  int depth) {
  const int64_t position = prefix + depth;
  if (p.attention_chunk) {
    // 32 bits are enough, and divisions of 64 take many registers. Nodes may lie before 0.
    const uint32_t size = uint32_t(p.attention_chunk);
    const uint32_t rest = uint32_t(position < 0 ? ~position : position) % size;
    return position - (position < 0 ? size - 1 - rest : rest);
  }
  return p.window ? position - p.window + 1 : 0;
}

// Returns the least depth of the rows of a sequence, 0 where it is not needed. By whole warps.
__device__ __forceinline__ int least_depth(const TreeAttentionParams& p, int b) {
  if (!sees_by_position(p)) return 0;
  if (!p.q_depths) return row_depth(p, b, 0);
  int least = INT32_MAX;
  for (int row = int(threadIdx.x % 32); row < p.num_rows; row += 32) {
    least = min(least, row_depth(p, b, row));
  }
  return __reduce_min_sync(kAllLanes, least);
}

// Returns the cache rows that some query row may see: prefix keys before the first position of all
// rows are none.
__device__ __forceinline__ Range keys_of(const TreeAttentionParams& p, int64_t prefix,
                                         int least_depth) {
  return {clamp_between(first_position(p, prefix, least_depth), 0, prefix),
          prefix + p.num_tree_keys};
}

// Row `packed` of a KV head is head packed % G of its group, of query row packed / G.
struct PackedRow {
  int row, head;

  __device__ __forceinline__ PackedRow(const TreeAttentionParams& p, int kv_head, int packed) {
    const int group = p.num_heads / p.num_kv_heads;
    row = packed / group;
    head = kv_head * group + packed % group;
  }
  // Returns the row's index in outputs [B, M, Hq].
  __device__ __forceinline__ int64_t output(const TreeAttentionParams& p, int b) const {
    return (int64_t(b) * p.num_rows + row) * p.num_heads + head;
  }
};

// Says which keys a query row sees: its mask.
struct RowView {
  const uint64_t* mask;   // the row's words of the tree mask, or null
  const int32_t* depths;  // depths of the tree's keys, which `by_position` alone needs; or null
  int64_t first, prefix;
  int last, num_tree_keys;
  bool by_position;

  __device__ __forceinline__ RowView(const TreeAttentionParams& p, int b, int64_t prefix, int row)
      : prefix(prefix), num_tree_keys(p.num_tree_keys), by_position(sees_by_position(p)) {
    row = min(row, p.num_rows - 1);  // a row behind the last one may see whatever it likes
    mask =
        p.mask ? p.mask + (int64_t(b) * p.num_rows + row) * mask_words(p.num_tree_keys) : nullptr;
    depths = p.k_depths ? p.k_depths + int64_t(b) * p.num_tree_keys : nullptr;
    first = by_position ? first_position(p, prefix, row_depth(p, b, row)) : 0;
    last = row + p.num_tree_keys - p.num_rows;
  }
  __device__ __forceinline__ bool sees(int64_t key) const {
    if (key < prefix) return key >= first;
    const int64_t slot = key - prefix;
    if (slot >= num_tree_keys) return false;
    if (!(mask ? mask_bit(mask, int(slot)) : slot <= last)) return false;
    return !by_position || prefix + (depths ? depths[slot] : slot) >= first;
  }
};

// Returns a word with its low n bits set, for any n.
__device__ __forceinline__ uint32_t low_bits32(int64_t n) {
  return n <= 0 ? 0 : n >= 32 ? ~0u : (1u << n) - 1;
}
__device__ __forceinline__ uint64_t low_bits(int64_t n) {
  return uint64_t(low_bits32(n - 32)) << 32 | low_bits32(n);
}

// Returns the bits [at, at + 32) of a mask row; bits outside of the row are 0.
__device__ __forceinline__ uint32_t mask_bits32(const uint64_t* row, int num_keys, int at) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(row);  // the low half comes first
  const int num_words = 2 * mask_words(num_keys), word = at >> 5;
  const uint32_t low = word >= 0 && word < num_words ? words[word] : 0;
  const uint32_t high = word + 1 >= 0 && word + 1 < num_words ? words[word + 1] : 0;
  return __funnelshift_r(low, high, uint32_t(at)) & low_bits32(num_keys - at);
}
__device__ __forceinline__ uint64_t mask_bits(const uint64_t* row, int num_keys, int64_t at) {
  const uint64_t high = mask_bits32(row, num_keys, int(at) + 32);
  return high << 32 | mask_bits32(row, num_keys, int(at));
}

}  // namespace specextend
