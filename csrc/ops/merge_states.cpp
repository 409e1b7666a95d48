#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "check.h"
#include "cpu/cpu.h"
#include "ops/dtype.h"
#ifdef SPECEXTEND_HAS_CUDA
#include "launch.h"
#include "stream.h"
#endif

namespace specextend {
namespace {

constexpr const char* kOp = "merge_states";

struct Prepared {
  Tensor o, lse;
  MergeStatesParams params;
  DType dtype;
};

void check_lse(const char* name, const Tensor& lse, const char* o_name, const Tensor& o) {
  check_dtype(kOp, name, lse, ScalarType::Float);
  check_contiguous(kOp, name, lse);
  bool ok = lse.dim() == o.dim() - 1;
  for (int64_t i = 0; ok && i < lse.dim(); ++i) ok = lse.size(i) == o.size(i);
  STD_TORCH_CHECK(ok, kOp, ": ", name, " must have the shape of ", o_name,
                  " without its last dimension ", shape_string(o), ", got ", shape_string(lse));
}

// Does everything that does not depend on the device: checks, allocation, parameters.
Prepared prepare(const Tensor& o_a, const Tensor& lse_a, const Tensor& o_b, const Tensor& lse_b) {
  STD_TORCH_CHECK(o_a.dim() >= 1, kOp, ": o_a must be [..., D], got ", shape_string(o_a));
  check_float(kOp, "o_a", o_a);
  check_dtype(kOp, "o_b", o_b, o_a.scalar_type());
  STD_TORCH_CHECK(shape_string(o_a) == shape_string(o_b), kOp, ": o_b must have the shape of o_a ",
                  shape_string(o_a), ", got ", shape_string(o_b));
  check_contiguous(kOp, "o_a", o_a);
  check_contiguous(kOp, "o_b", o_b);
  check_lse("lse_a", lse_a, "o_a", o_a);
  check_lse("lse_b", lse_b, "o_b", o_b);
  check_same_device(kOp, "o_b", o_b, "o_a", o_a);
  check_same_device(kOp, "lse_a", lse_a, "o_a", o_a);
  check_same_device(kOp, "lse_b", lse_b, "o_a", o_a);

  Prepared r{torch::stable::empty_like(o_a),
             torch::stable::empty_like(lse_a),
             {},
             to_dtype(o_a.scalar_type())};
  r.params = {o_a.const_data_ptr(),   lse_a.const_data_ptr<float>(),
              o_b.const_data_ptr(),   lse_b.const_data_ptr<float>(),
              r.o.mutable_data_ptr(), r.lse.mutable_data_ptr<float>(),
              lse_a.numel(),          int(o_a.size(o_a.dim() - 1))};
  return r;
}

std::tuple<Tensor, Tensor> merge_states_cpu(const Tensor& o_a, const Tensor& lse_a,
                                            const Tensor& o_b, const Tensor& lse_b) {
  Prepared r = prepare(o_a, lse_a, o_b, lse_b);
  cpu::merge_states(r.params, r.dtype);
  return {r.o, r.lse};
}

#ifdef SPECEXTEND_HAS_CUDA
std::tuple<Tensor, Tensor> merge_states_cuda(const Tensor& o_a, const Tensor& lse_a,
                                             const Tensor& o_b, const Tensor& lse_b) {
  Prepared r = prepare(o_a, lse_a, o_b, lse_b);
  const torch::stable::accelerator::DeviceGuard guard(o_a.get_device_index());
  const cudaStream_t stream = current_stream(o_a.get_device_index());
  check_launch(kOp, by_device_type(r.dtype, [&](auto x) {
                 return launch_merge_states<decltype(x)>(r.params, stream);
               }));
  return {r.o, r.lse};
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def(
      "merge_states(Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b) -> (Tensor o, Tensor lse)");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) {
  m.impl("merge_states", TORCH_BOX(&merge_states_cpu));
}
#ifdef SPECEXTEND_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(specextend, CUDA, m) {
  m.impl("merge_states", TORCH_BOX(&merge_states_cuda));
}
#endif

}  // namespace specextend
