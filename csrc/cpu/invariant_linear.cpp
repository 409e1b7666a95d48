#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/cpu.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"

namespace specextend::cpu {
namespace {

constexpr int64_t kMaxRows = 64;     // prepared together: they stay in the L2 cache
constexpr int64_t kGrain = 1 << 17;  // multiplications that are worth a thread
constexpr int64_t kReadingRows = 4;  // reading a column counts as so many rows

thread_local Scratch<float> prepared, panel;

}  // namespace

// The columns are dealt out to threads, kLinearColumns at a time; the bits do not depend on it.
void invariant_linear(const InvariantLinearParams& p, DType dtype) {
  const LinearKernels& kernels = isa().linear[int(dtype)];
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  const int64_t chunks = (p.num_columns + kLinearColumns - 1) / kLinearColumns;
  const int64_t row_floats = kernels.prepared_floats(p.depth);
  for (int64_t begin = 0; begin < p.num_rows; begin += kMaxRows) {
    const int64_t rows = std::min(kMaxRows, p.num_rows - begin);
    float* const x = prepared.get(size_t(p.batch * rows * row_floats));
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t m = 0; m < rows; ++m) {
        const int64_t offset = b * p.x_stride_b + (begin + m) * p.x_stride_m;
        kernels.prepare(static_cast<const char*>(p.x) + offset * size, p.depth,
                        x + (b * rows + m) * row_floats);
      }
    const int64_t work = kLinearColumns * std::max<int64_t>(1, p.depth) * (rows + kReadingRows);
    torch::stable::parallel_for(
        0, p.batch * chunks, std::max<int64_t>(1, kGrain / work), [&](int64_t from, int64_t to) {
          float* const own = p.by_k ? panel.get(size_t(kernels.panel_floats(p.depth))) : nullptr;
          for (int64_t i = from; i < to; ++i) {
            const int64_t b = i / chunks, column = i % chunks * kLinearColumns;
            kernels.run({&p, b, begin, rows, column,
                         std::min<int64_t>(kLinearColumns, p.num_columns - column),
                         x + b * rows * row_floats, own});
          }
        });
  }
}

}  // namespace specextend::cpu
