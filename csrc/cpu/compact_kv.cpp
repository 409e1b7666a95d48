#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "cpu/cpu.h"
#include "cpu/kv_copy.h"
#include "kv_rows.h"

namespace specextend::cpu {
namespace {

// Moves the path of one head. It goes in path order, so that a row P + i is written after it has
// been read, while all rows still to be read, P + path[j] with path[j] >= j > i, lie untouched.
void compact(const CompactKvParams& p, int cache, int b, int h) {
  const KvRows rows{p.caches[cache], p.stride_b, p.stride_s, p.stride_h};
  const int count = compact_count(p, b);
  for (int i = 0; i < count; ++i) {
    const int64_t source = compact_source(p, b, i);
    if (source < 0) continue;
    std::memcpy(kv_row(rows, b, int64_t(p.prefix_lens[b]) + i, h), kv_row(rows, b, source, h),
                size_t(p.row_bytes));
  }
}

}  // namespace

void compact_kv(const CompactKvParams& p) {
  int rows = 0;
  for (int b = 0; b < p.batch; ++b) rows = std::max(rows, compact_count(p, b));
  if (rows == 0) return;
  const int64_t grain = 1 + kCopyGrainBytes / std::max<int64_t>(1, rows * p.row_bytes);
  const int64_t per_cache = int64_t(p.batch) * p.num_kv_heads;
  const int64_t items = p.num_caches * per_cache;
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t within = i % per_cache;
      compact(p, int(i / per_cache), int(within / p.num_kv_heads), int(within % p.num_kv_heads));
    }
  });
}

}  // namespace specextend::cpu
