#include <torch/csrc/stable/ops.h>

#include "cpu/cpu.h"
#include "cpu/isa.h"
#include "cpu/rows_grain.h"

void specextend::cpu::rms_norm(const RmsNormParams& p, DType dtype) {
  const RmsNormKernel run = isa().rms_norm[int(dtype)];
  torch::stable::parallel_for(0, p.shape.num_rows, rows_grain(p.shape.length),
                              [&](int64_t begin, int64_t end) { run(p, begin, end); });
}
