#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>

#include "check.h"
#include "cpu/cpu.h"
#include "ops/allocate.h"
#include "ops/dtype.h"
#ifdef SPECEXTEND_HAS_CUDA
#include "launch.h"
#include "ops/scratch.h"
#include "stream.h"
#endif

namespace specextend {
namespace {

constexpr const char* kOp = "sample_nodes";

struct Prepared {
  Tensor tokens;
  SampleNodesParams params;
  DType dtype;
};

Prepared prepare(const Tensor& logits, const std::optional<Tensor>& uniforms) {
  check_dim(kOp, "logits", logits, 3, "[B, N, V]");
  check_float(kOp, "logits", logits);
  check_unit_last_stride(kOp, "logits", logits);
  const int64_t batch = logits.size(0), num_nodes = logits.size(1), vocab = logits.size(2);
  check_range(kOp, "the number of nodes N", num_nodes, 0, INT32_MAX);
  check_range(kOp, "the vocabulary size V", vocab, 1, INT32_MAX);
  bool is_double = false;
  if (uniforms) {
    check_shape(kOp, "uniforms", *uniforms, {batch, num_nodes});
    is_double = uniforms->scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(is_double || uniforms->scalar_type() == ScalarType::Float, kOp,
                    ": uniforms must be float32 or float64, got ",
                    dtype_string(uniforms->scalar_type()));
    check_contiguous(kOp, "uniforms", *uniforms);
    check_same_device(kOp, "uniforms", *uniforms, "logits", logits);
  }

  Prepared r{
      allocate(logits, {batch, num_nodes}, ScalarType::Long), {}, to_dtype(logits.scalar_type())};
  r.params = {logits.const_data_ptr(),
              logits.stride(0),
              logits.stride(1),
              uniforms ? uniforms->const_data_ptr() : nullptr,
              is_double,
              r.tokens.mutable_data_ptr<int64_t>(),
              vocab,
              int(batch),
              int(num_nodes)};
  return r;
}

Tensor sample_nodes_cpu(const Tensor& logits, std::optional<Tensor> uniforms) {
  Prepared r = prepare(logits, uniforms);
  cpu::sample_nodes(r.params, r.dtype);
  return r.tokens;
}

#ifdef SPECEXTEND_HAS_CUDA
Tensor sample_nodes_cuda(const Tensor& logits, std::optional<Tensor> uniforms) {
  Prepared r = prepare(logits, uniforms);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = current_stream(logits.get_device_index());
  const AllocatedScratch scratch(logits, r.params);
  check_launch(kOp, by_device_type(r.dtype, [&](auto x) {
                 return launch_sample_nodes<decltype(x)>(r.params, scratch.arrays, stream);
               }));
  return r.tokens;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def("sample_nodes(Tensor logits, Tensor? uniforms=None) -> Tensor tokens");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) {
  m.impl("sample_nodes", TORCH_BOX(&sample_nodes_cpu));
}
#ifdef SPECEXTEND_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(specextend, CUDA, m) {
  m.impl("sample_nodes", TORCH_BOX(&sample_nodes_cuda));
}
#endif

}  // namespace specextend
