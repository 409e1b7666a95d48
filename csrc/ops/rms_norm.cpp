#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "check.h"
#include "cpu/cpu.h"
#include "ops/dtype.h"
#include "ops/rows.h"
#ifdef SPECEXTEND_HAS_CUDA
#include "launch.h"
#include "stream.h"
#endif

namespace specextend {
namespace {

constexpr int64_t kMaxLength = (1 << 24) - 1;  // torch sums longer rows by other steps

struct Options {
  double eps, offset;
  bool round_first;
};

struct Prepared {
  Tensor out, total;
  RmsNormParams params;
  DType dtype;
};

// Does everything that does not depend on the device. Without `residual` there is no total.
Prepared prepare(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight,
                 const Options& options) {
  check_rows(op, "x", x);
  check_float(op, "x", x);
  if (residual != nullptr) check_rows_like(op, "residual", *residual, "x", x);
  check_range(op, "the length of a row N", x.size(x.dim() - 1), 0, kMaxLength);
  check_shape(op, "weight", weight, {x.size(x.dim() - 1)});
  check_dtype(op, "weight", weight, x.scalar_type());
  check_unit_last_stride(op, "weight", weight);
  check_same_device(op, "weight", weight, "x", x);

  STD_TORCH_CHECK(options.offset == 0 || !options.round_first, op,
                  ": offset must be 0 with round_first, got ", options.offset);

  Prepared r{allocate_rows(x),
             residual != nullptr ? allocate_rows(x) : Tensor(),
             {},
             to_dtype(x.scalar_type())};
  RmsNormParams& p = r.params;
  p.shape = row_shape(x);
  p.x = rows_of(x);
  if (residual != nullptr) {
    p.residual = rows_of(*residual);
    p.total = r.total.mutable_data_ptr();
  }
  p.weight = weight.const_data_ptr();
  p.out = r.out.mutable_data_ptr();
  p.eps = float(options.eps);
  // Nothing is added where there is no offset: a weight of -0 stays -0.
  p.offset = options.offset == 0 ? -0.f : float(options.offset);
  p.round_first = options.round_first;
  return r;
}

Tensor rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps, double offset,
                    bool round_first) {
  Prepared r = prepare("rms_norm", x, nullptr, weight, {eps, offset, round_first});
  cpu::rms_norm(r.params, r.dtype);
  return r.out;
}

std::tuple<Tensor, Tensor> add_rms_norm_cpu(const Tensor& x, const Tensor& residual,
                                            const Tensor& weight, double eps, double offset,
                                            bool round_first) {
  Prepared r = prepare("add_rms_norm", x, &residual, weight, {eps, offset, round_first});
  cpu::rms_norm(r.params, r.dtype);
  return {r.out, r.total};
}

#ifdef SPECEXTEND_HAS_CUDA
void launch_prepared(const char* op, const Prepared& r) {
  const int32_t device = r.out.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  check_launch(op, by_device_type(r.dtype, [&](auto x) {
                 return launch_rms_norm<decltype(x)>(r.params, stream);
               }));
}

Tensor rms_norm_cuda(const Tensor& x, const Tensor& weight, double eps, double offset,
                     bool round_first) {
  Prepared r = prepare("rms_norm", x, nullptr, weight, {eps, offset, round_first});
  launch_prepared("rms_norm", r);
  return r.out;
}

std::tuple<Tensor, Tensor> add_rms_norm_cuda(const Tensor& x, const Tensor& residual,
                                             const Tensor& weight, double eps, double offset,
                                             bool round_first) {
  Prepared r = prepare("add_rms_norm", x, &residual, weight, {eps, offset, round_first});
  launch_prepared("add_rms_norm", r);
  return {r.out, r.total};
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def(
      "rms_norm(Tensor x, Tensor weight, *, float eps, float offset=0.0, bool round_first=True) "
      "-> Tensor");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, *, float eps, float offset=0.0, "
      "bool round_first=True) -> (Tensor out, Tensor total)");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_cpu));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm_cpu));
}
#ifdef SPECEXTEND_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(specextend, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_cuda));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm_cuda));
}
#endif

}  // namespace specextend
