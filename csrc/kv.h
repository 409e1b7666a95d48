#pragma once

// Which row of a KV cache goes where. Shared by the CPU kernels and the CUDA kernels.

#include <cstdint>

#include "math.h"
#include "params.h"

namespace specextend {

// Rows of a path that compact_kv moves: those up to the last accepted node.
SPECEXTEND_HOST_DEVICE int compact_count(const CompactKvParams& p, int b) {
  const int count = p.num_accepted[b] < p.path_len ? p.num_accepted[b] + 1 : p.path_len;
  return count > 0 ? count : 0;
}

// The row that node i of the path comes from; -1 where nothing is to be moved. A row outside the
// cache is neither read nor written.
SPECEXTEND_HOST_DEVICE int64_t compact_source(const CompactKvParams& p, int b, int i) {
  const int32_t node = p.path[int64_t(b) * p.path_len + i];
  const int64_t row = int64_t(p.prefix_lens[b]) + node;
  return node > i && p.prefix_lens[b] >= 0 && row < p.capacity ? row : -1;
}

// How many of the new rows fit behind the first lens[b] ones.
SPECEXTEND_HOST_DEVICE int append_count(const AppendKvParams& p, int b) {
  const int64_t room = p.lens[b] < 0 ? 0 : p.capacity - p.lens[b];
  return room < 0 ? 0 : room < p.num_rows ? int(room) : p.num_rows;
}

}  // namespace specextend
