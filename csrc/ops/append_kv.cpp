#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "check.h"
#include "cpu/cpu.h"
#include "ops/kv.h"
#ifdef SPECEXTEND_HAS_CUDA
#include "launch.h"
#include "stream.h"
#endif

namespace specextend {
namespace {

constexpr const char* kOp = "append_kv";

void append_kv_cpu(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                   const Tensor& lens) {
  cpu::append_kv(append_params(kOp, k_cache, v_cache, k, v, lens));
}

#ifdef SPECEXTEND_HAS_CUDA
void append_kv_cuda(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                    const Tensor& lens) {
  const AppendKvParams p = append_params(kOp, k_cache, v_cache, k, v, lens);
  const int32_t device = k_cache.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(kOp, launch_append_kv(p, current_stream(device)));
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def("append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor lens) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) { m.impl("append_kv", TORCH_BOX(&append_kv_cpu)); }
#ifdef SPECEXTEND_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(specextend, CUDA, m) { m.impl("append_kv", TORCH_BOX(&append_kv_cuda)); }
#endif

}  // namespace specextend
