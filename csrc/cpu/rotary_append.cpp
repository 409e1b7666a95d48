#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/cpu.h"
#include "cpu/isa.h"
#include "cpu/kv_copy.h"
#include "kv_rows.h"

namespace specextend::cpu {
namespace {

void rotate(const RotaryAppendParams& p, RotateRowKernel kernel, const KvRows& from, int64_t row,
            const KvRows& to, int64_t to_row, int b, int heads) {
  kernel({kv_row(from, b, row, 0), kv_row(to, b, to_row, 0), from.stride_h, to.stride_h,
          kv_row(p.cos, b, row, 0), kv_row(p.sin, b, row, 0), p.append.row_bytes[0], heads,
          p.rotary_dim});
}

}  // namespace

void rotary_append(const RotaryAppendParams& p, DType dtype) {
  const AppendKvParams& a = p.append;
  const RotateRowKernel kernel = isa().rotate_row[int(dtype)];
  const int64_t bytes = a.row_bytes[0] * (p.num_heads + a.num_kv_heads);
  const int64_t grain = 1 + kCopyGrainBytes / std::max<int64_t>(1, bytes);
  torch::stable::parallel_for(
      0, int64_t(a.batch) * a.num_rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int b = int(i / a.num_rows);
          const int64_t row = i % a.num_rows;
          rotate(p, kernel, p.q, row, p.out, row, b, p.num_heads);
          if (row >= append_count(a, b)) continue;
          const int64_t to = a.lens[b] + row;
          rotate(p, kernel, a.rows[0], row, a.caches[0], to, b, a.num_kv_heads);
          copy_rows(a.caches[1], to, a.rows[1], row, b, 1, a.num_kv_heads, a.row_bytes[1]);
        }
      });
}

}  // namespace specextend::cpu
