#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "cpu/cpu.h"
#include "kv.h"

namespace specextend::cpu {
namespace {

constexpr int64_t kGrainBytes = 1 << 16;  // less is not worth waking a thread for

// All heads of one new row, of the keys or of the values.
void append_row(const AppendKvParams& p, int which, int b, int row) {
  const KvRows &to = p.cache[which], &from = p.rows[which];
  char* dst = static_cast<char*>(to.data) + b * to.stride_b + (p.lens[b] + row) * to.stride_s;
  const char* src =
      static_cast<const char*>(from.data) + b * from.stride_b + row * from.stride_s;
  for (int h = 0; h < p.num_kv_heads; ++h) {
    std::memcpy(dst + h * to.stride_h, src + h * from.stride_h, size_t(p.row_bytes[which]));
  }
}

}  // namespace

void append_kv(const AppendKvParams& p) {
  const int64_t row_bytes = (p.row_bytes[0] + p.row_bytes[1]) * p.num_kv_heads;
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes));
  const int64_t items = int64_t(p.batch) * p.num_rows;
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int b = int(item / p.num_rows), row = int(item % p.num_rows);
      if (row >= append_count(p, b)) continue;
      append_row(p, 0, b, row);
      append_row(p, 1, b, row);
    }
  });
}

}  // namespace specextend::cpu
