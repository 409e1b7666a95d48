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

AppendKvParams prepare(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                       const Tensor& v, const Tensor& lens) {
  check_kv(kOp, "k_cache", k_cache, "[B, S, Hkv, D]");
  check_kv(kOp, "v_cache", v_cache, "[B, S, Hkv, D]");
  check_kv(kOp, "k", k, "[B, M, Hkv, D]");
  check_kv(kOp, "v", v, "[B, M, Hkv, D]");
  const int64_t batch = k_cache.size(0), capacity = k_cache.size(1), heads = k_cache.size(2);
  const int64_t rows = k.size(1);
  check_shape(kOp, "v_cache", v_cache, {batch, capacity, heads, v_cache.size(3)});
  check_range(kOp, "the number of rows M", rows, 0, INT32_MAX);
  check_shape(kOp, "k", k, {batch, rows, heads, k_cache.size(3)});
  check_shape(kOp, "v", v, {batch, rows, heads, v_cache.size(3)});
  check_dtype(kOp, "k", k, k_cache.scalar_type());
  check_dtype(kOp, "v", v, v_cache.scalar_type());
  check_row_size(kOp, "k_cache", k_cache);
  check_row_size(kOp, "v_cache", v_cache);
  check_not_expanded(kOp, "k_cache", k_cache);
  check_not_expanded(kOp, "v_cache", v_cache);
  check_same_device(kOp, "v_cache", v_cache, "k_cache", k_cache);
  check_same_device(kOp, "k", k, "k_cache", k_cache);
  check_same_device(kOp, "v", v, "k_cache", k_cache);
  check_ints(kOp, "lens", lens, {batch}, "k_cache", k_cache);

  return {{kv_rows(k_cache), kv_rows(v_cache)},
          {kv_rows(k), kv_rows(v)},
          {kv_row_bytes(k), kv_row_bytes(v)},
          lens.const_data_ptr<int32_t>(),
          capacity,
          int(batch),
          int(rows),
          int(heads)};
}

void append_kv_cpu(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                   const Tensor& lens) {
  cpu::append_kv(prepare(k_cache, v_cache, k, v, lens));
}

#ifdef SPECEXTEND_HAS_CUDA
void append_kv_cuda(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                    const Tensor& lens) {
  const AppendKvParams p = prepare(k_cache, v_cache, k, v, lens);
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
