#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/cpu.h"
#include "cpu/kv_copy.h"
#include "kv_rows.h"

namespace specextend::cpu {

void append_kv(const AppendKvParams& p) {
  const int64_t bytes = (p.row_bytes[0] + p.row_bytes[1]) * p.num_kv_heads;
  const int64_t grain = 1 + kCopyGrainBytes / std::max<int64_t>(1, bytes);
  const int64_t items = int64_t(p.batch) * p.num_rows;
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int b = int(begin / p.num_rows);
      const int64_t row = begin % p.num_rows, rows = std::min(p.num_rows - row, end - begin);
      const int64_t fit = std::min(row + rows, int64_t(append_count(p, b))) - row;
      for (int i = 0; i < 2 && fit > 0; ++i) {
        copy_rows(p.caches[i], p.lens[b] + row, p.rows[i], row, b, fit, p.num_kv_heads,
                  p.row_bytes[i]);
      }
      begin += rows;
    }
  });
}

}  // namespace specextend::cpu
