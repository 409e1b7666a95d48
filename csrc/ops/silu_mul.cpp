#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>

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

constexpr const char* kOp = "silu_mul";

void check(const Tensor& gate, const Tensor& up) {
  check_rows(kOp, "gate", gate);
  check_float(kOp, "gate", gate);
  check_rows_like(kOp, "up", up, "gate", gate);
}

SiluMulParams params(const Tensor& gate, const Tensor& up, const Tensor& out) {
  return {row_shape(gate), rows_of(gate), rows_of(up), out.mutable_data_ptr()};
}

Tensor call_torch(const char* name, const char* overload, std::array<StableIValue, 2> stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// In fp32, where the last bit shows, torch's exponential is another one for the elements behind
// whole vectors; its own functions are called.
Tensor silu_mul_float(const Tensor& gate, const Tensor& up) {
  using torch::stable::detail::from;
  const Tensor y = call_torch("aten::silu", "", {from(gate), 0});
  return torch::stable::contiguous(call_torch("aten::mul_", "Tensor", {from(y), from(up)}));
}

Tensor silu_mul_cpu(const Tensor& gate, const Tensor& up) {
  check(gate, up);
  if (gate.scalar_type() == ScalarType::Float) return silu_mul_float(gate, up);
  const Tensor out = allocate_rows(gate);
  cpu::silu_mul(params(gate, up, out), to_dtype(gate.scalar_type()));
  return out;
}

#ifdef SPECEXTEND_HAS_CUDA
Tensor silu_mul_cuda(const Tensor& gate, const Tensor& up) {
  check(gate, up);
  const Tensor out = allocate_rows(gate);
  const SiluMulParams p = params(gate, up, out);
  const int32_t device = gate.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  check_launch(kOp, by_device_type(to_dtype(gate.scalar_type()), [&](auto x) {
                 return launch_silu_mul<decltype(x)>(p, stream);
               }));
  return out;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) { m.impl("silu_mul", TORCH_BOX(&silu_mul_cpu)); }
#ifdef SPECEXTEND_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(specextend, CUDA, m) { m.impl("silu_mul", TORCH_BOX(&silu_mul_cuda)); }
#endif

}  // namespace specextend
