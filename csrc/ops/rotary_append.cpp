#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "cpu/cpu.h"
#include "ops/allocate.h"
#include "ops/dtype.h"
#include "ops/kv.h"
#ifdef SPECEXTEND_HAS_CUDA
#include "launch.h"
#include "stream.h"
#endif

namespace specextend {
namespace {

constexpr const char* kOp = "rotary_append";

struct Arguments {
  const Tensor &q, &k, &v, &cos, &sin, &k_cache, &v_cache, &lens;
};

// Returns the factors [B or 1, M, R] of q's rows.
KvRows factors(const char* name, const Tensor& t, const Arguments& a) {
  check_dim(kOp, name, t, 3, "[B or 1, M, R]");
  check_shape(kOp, name, t, {t.size(0) == 1 ? 1 : a.q.size(0), a.q.size(1), a.cos.size(2)});
  check_dtype(kOp, name, t, a.q.scalar_type());
  check_unit_last_stride(kOp, name, t);
  check_same_device(kOp, name, t, "k_cache", a.k_cache);
  const auto stride = [&t](int64_t i) {
    return t.size(i) > 1 ? t.stride(i) * int64_t(t.element_size()) : 0;
  };
  return {const_cast<void*>(t.const_data_ptr()), stride(0), stride(1), 0};
}

struct Prepared {
  Tensor out;
  RotaryAppendParams params;
  DType dtype;
};

// Does everything that does not depend on the device: checks, allocation, parameters.
Prepared prepare(const Arguments& a) {
  RotaryAppendParams p{};
  p.append = append_params(kOp, a.k_cache, a.v_cache, a.k, a.v, a.lens);
  const int64_t dim = a.k_cache.size(3);
  check_kv(kOp, "q", a.q, "[B, M, Hq, D]");
  check_shape(kOp, "q", a.q, {a.k.size(0), a.k.size(1), a.q.size(2), dim});
  check_float(kOp, "q", a.q);
  check_row_size(kOp, "q", a.q);
  check_dtype(kOp, "k", a.k, a.q.scalar_type());
  check_dtype(kOp, "v", a.v, a.q.scalar_type());
  check_same_device(kOp, "q", a.q, "k_cache", a.k_cache);
  p.q = kv_rows(a.q);
  p.cos = factors("cos", a.cos, a);
  p.sin = factors("sin", a.sin, a);
  const int64_t rotary_dim = a.cos.size(2);
  STD_TORCH_CHECK(rotary_dim <= dim && rotary_dim % 2 == 0, kOp,
                  ": cos must have an even number R of columns, no more than D = ", dim, ", got ",
                  rotary_dim);
  p.num_heads = int(a.q.size(2));
  p.rotary_dim = int(rotary_dim);

  Prepared r{allocate(a.q, {a.q.size(0), a.q.size(1), a.q.size(2), dim}, a.q.scalar_type()), p,
             to_dtype(a.q.scalar_type())};
  r.params.out = kv_rows(r.out);
  return r;
}

Tensor rotary_append_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                         const Tensor& sin, const Tensor& k_cache, const Tensor& v_cache,
                         const Tensor& lens) {
  Prepared r = prepare({q, k, v, cos, sin, k_cache, v_cache, lens});
  cpu::rotary_append(r.params, r.dtype);
  return r.out;
}

#ifdef SPECEXTEND_HAS_CUDA
Tensor rotary_append_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                          const Tensor& sin, const Tensor& k_cache, const Tensor& v_cache,
                          const Tensor& lens) {
  Prepared r = prepare({q, k, v, cos, sin, k_cache, v_cache, lens});
  const int32_t device = k_cache.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  check_launch(kOp, by_device_type(r.dtype, [&](auto x) {
                 return launch_rotary_append<decltype(x)>(r.params, stream);
               }));
  return r.out;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def(
      "rotary_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, Tensor lens) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) {
  m.impl("rotary_append", TORCH_BOX(&rotary_append_cpu));
}
#ifdef SPECEXTEND_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(specextend, CUDA, m) {
  m.impl("rotary_append", TORCH_BOX(&rotary_append_cuda));
}
#endif

}  // namespace specextend
