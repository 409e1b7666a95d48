#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "cpu/cpu.h"
#include "kv.h"

namespace specextend::cpu {
namespace {

constexpr int64_t kGrainBytes = 1 << 16;  // less is not worth waking a thread for

// The path of one head of one sequence. In path order: a row that is written, P + i, lies before all
// rows still to be read, P + path[j] with path[j] >= j > i.
void compact(const CompactKvParams& p, int cache, int b, int h) {
  char* rows = static_cast<char*>(p.caches[cache]) + b * p.stride_b + h * p.stride_h;
  const int count = compact_count(p, b);
  for (int i = 0; i < count; ++i) {
    const int64_t source = compact_source(p, b, i);
    if (source < 0) continue;
    const int64_t target = int64_t(p.prefix_lens[b]) + i;
    std::memcpy(rows + target * p.stride_s, rows + source * p.stride_s, size_t(p.row_bytes));
  }
}

}  // namespace

void compact_kv(const CompactKvParams& p) {
  const int64_t item_bytes = std::max<int64_t>(1, p.row_bytes * p.path_len);
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / item_bytes);
  const int64_t per_cache = int64_t(p.batch) * p.num_kv_heads;
  torch::stable::parallel_for(
      0, p.num_caches * per_cache, grain, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t within = item % per_cache;
          compact(p, int(item / per_cache), int(within / p.num_kv_heads),
                  int(within % p.num_kv_heads));
        }
      });
}

}  // namespace specextend::cpu
