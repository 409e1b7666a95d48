#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "check.h"
#include "cpu/cpu.h"
#include "ops/allocate.h"
#include "ops/dtype.h"

namespace specextend {
namespace {

constexpr const char* kOp = "invariant_linear";

void check(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, kOp, ": x must be [M, K] or [B, M, K], got ",
                  shape_string(x));
  const int64_t dims = x.dim(), depth = x.size(dims - 1);
  check_dim(kOp, "w", w, dims,
            dims == 2 ? "[N, K], as x is [M, K]" : "[B, N, K], as x is [B, M, K]");
  check_float(kOp, "x", x);
  check_dtype(kOp, "w", w, x.scalar_type());
  check_same_device(kOp, "w", w, "x", x);
  const int64_t columns = w.size(dims - 2);
  if (dims == 2) {
    check_shape(kOp, "w", w, {columns, depth});
  } else {
    check_shape(kOp, "w", w, {x.size(0), columns, depth});
  }
  check_unit_last_stride(kOp, "x", x);
  const bool by_column = depth <= 1 || w.stride(dims - 1) == 1;
  STD_TORCH_CHECK(by_column || columns <= 1 || w.stride(dims - 2) == 1, kOp,
                  ": w must have a last stride of 1, or one of 1 before it, got ",
                  w.stride(dims - 2), " and ", w.stride(dims - 1));
  if (!bias) return;
  check_dtype(kOp, "bias", *bias, x.scalar_type());
  check_same_device(kOp, "bias", *bias, "x", x);
  check_shape(kOp, "bias", *bias, {columns});
  check_unit_last_stride(kOp, "bias", *bias);
}

Tensor invariant_linear_cpu(const Tensor& x, const Tensor& w, std::optional<Tensor> bias) {
  check(x, w, bias);
  const int64_t dims = x.dim(), rows = x.size(dims - 2), depth = x.size(dims - 1);
  const int64_t batch = dims == 3 ? x.size(0) : 1, columns = w.size(dims - 2);
  Tensor y = dims == 3 ? allocate(x, {batch, rows, columns}, x.scalar_type())
                       : allocate(x, {rows, columns}, x.scalar_type());
  if (batch == 0 || rows == 0 || columns == 0) return y;
  const bool by_k = depth > 1 && w.stride(dims - 1) != 1;
  InvariantLinearParams p{};
  p.x = x.const_data_ptr();
  p.w = w.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.x_stride_b = dims == 3 ? x.stride(0) : 0;
  p.x_stride_m = x.stride(dims - 2);
  p.w_stride_b = dims == 3 ? w.stride(0) : 0;
  p.w_stride = w.stride(by_k ? dims - 1 : dims - 2);
  p.by_k = by_k;
  p.batch = batch;
  p.num_rows = rows;
  p.num_columns = columns;
  p.depth = depth;
  cpu::invariant_linear(p, to_dtype(x.scalar_type()));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def("invariant_linear(Tensor x, Tensor w, Tensor? bias=None) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) {
  m.impl("invariant_linear", TORCH_BOX(&invariant_linear_cpu));
}

}  // namespace specextend
