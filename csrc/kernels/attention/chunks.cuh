#pragma once

// Log-sum-exps of the chunks of a prefix, from the logits that attention has anyway.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention/call.cuh"
#include "kernels/attention/segments.cuh"

namespace specextend {

// Writes the log-sum-exps of the chunks that have keys in part `part` of the segment; a part has
// `part_keys` keys. A chunk that goes on in the next part is carried there, in `carry`
// [2, rows_per_block]; one that the segment's begin or end cuts is left to the combine.
// sum_keys(row, begin, end) returns the softmax of keys of the part. By whole blocks.
template <typename F>
__device__ __forceinline__ void emit_chunks(const AttentionCall& c, const SegmentState& s, int part,
                                            int part_keys, PartialSum* carry, const F& sum_keys) {
  const int rows = c.cut.rows_per_block;
  const int64_t size = c.chunk_size, prefix = s.prefix;
  const int64_t segment_key = s.first_tile * c.cut.tile_keys;
  const int64_t segment_end = segment_key + int64_t(s.num_tiles) * c.cut.tile_keys;
  const int64_t part_key = segment_key + int64_t(part) * part_keys;
  const int64_t part_end = min(part_key + part_keys, segment_end);
  if (part_key >= prefix) return;
  // Keys have 31 bits: divisions of 64 are many times slower.
  const int first = int(uint32_t(part_key) / uint32_t(c.chunk_size));
  const int last = int(uint32_t(min(part_end, prefix) - 1) / uint32_t(c.chunk_size));
  for (int i = int(threadIdx.x); i < (last - first + 1) * rows; i += int(blockDim.x)) {
    const int row = i % rows;
    if (row >= s.num_rows) continue;
    const int chunk = first + i / rows;
    const int64_t begin = chunk * size, end = min(begin + size, prefix);
    PartialSum sum =
        sum_keys(row, int(max(begin, part_key) - part_key), int(min(end, part_end) - part_key));
    if (begin < part_key && part > 0) sum = add_partial_sums(carry[part % 2 * rows + row], sum);
    const bool cut_before = begin < segment_key && !s.segment.opens;
    if (end > part_end && part_end < segment_end) {
      carry[(part + 1) % 2 * rows + row] = sum;
    } else if (cut_before || end > part_end) {
      const int64_t partial = partial_of(blockIdx.x, s.segment.opens);
      c.workspace.edges[(partial * 2 + !cut_before) * rows + row] = sum;
    } else {
      const PackedRow at(c, s.kv_head, s.first_packed + row);
      c.chunk_lse[at.output(c, s.b) * c.num_chunks + chunk] = natural_lse(sum);
    }
  }
}

}  // namespace specextend
