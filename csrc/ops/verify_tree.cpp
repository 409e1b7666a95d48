#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "check.h"
#include "cpu/cpu.h"
#include "ops/allocate.h"
#ifdef SPECEXTEND_HAS_CUDA
#include "launch.h"
#include "stream.h"
#endif

namespace specextend {
namespace {

constexpr const char* kOp = "verify_tree";

using Result =
    std::tuple<Tensor, Tensor, Tensor, Tensor>;  // path, num_accepted, emitted, next_root

struct Prepared {
  Result result;
  VerifyTreeParams params;
};

Prepared prepare(const Tensor& tokens, const Tensor& parents, const Tensor& target_tokens) {
  check_dim(kOp, "tokens", tokens, 2, "[B, N]");
  check_dtype(kOp, "tokens", tokens, ScalarType::Long);
  check_contiguous(kOp, "tokens", tokens);
  check_range(kOp, "the number of nodes N", tokens.size(1), 1, INT32_MAX);
  check_shape(kOp, "parents", parents, {tokens.size(0), tokens.size(1)});
  check_dtype(kOp, "parents", parents, ScalarType::Int);
  check_contiguous(kOp, "parents", parents);
  check_same_device(kOp, "parents", parents, "tokens", tokens);
  check_shape(kOp, "target_tokens", target_tokens, {tokens.size(0), tokens.size(1)});
  check_dtype(kOp, "target_tokens", target_tokens, ScalarType::Long);
  check_contiguous(kOp, "target_tokens", target_tokens);
  check_same_device(kOp, "target_tokens", target_tokens, "tokens", tokens);

  const int64_t batch = tokens.size(0), num_nodes = tokens.size(1);
  Prepared r{{allocate(tokens, {batch, num_nodes}, ScalarType::Int),
              allocate(tokens, {batch}, ScalarType::Int),
              allocate(tokens, {batch, num_nodes}, ScalarType::Long),
              allocate(tokens, {batch}, ScalarType::Long)},
             {}};
  const auto& [path, num_accepted, emitted, next_root] = r.result;
  r.params = {tokens.const_data_ptr<int64_t>(),
              parents.const_data_ptr<int32_t>(),
              target_tokens.const_data_ptr<int64_t>(),
              path.mutable_data_ptr<int32_t>(),
              num_accepted.mutable_data_ptr<int32_t>(),
              emitted.mutable_data_ptr<int64_t>(),
              next_root.mutable_data_ptr<int64_t>(),
              int(batch),
              int(num_nodes)};
  return r;
}

Result verify_tree_cpu(const Tensor& tokens, const Tensor& parents, const Tensor& target_tokens) {
  Prepared r = prepare(tokens, parents, target_tokens);
  cpu::verify_tree(r.params);
  return r.result;
}

#ifdef SPECEXTEND_HAS_CUDA
Result verify_tree_cuda(const Tensor& tokens, const Tensor& parents, const Tensor& target_tokens) {
  Prepared r = prepare(tokens, parents, target_tokens);
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const cudaStream_t stream = current_stream(tokens.get_device_index());
  check_launch(kOp, launch_verify_tree(r.params, stream));
  return r.result;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def(
      "verify_tree(Tensor tokens, Tensor parents, Tensor target_tokens) -> "
      "(Tensor path, Tensor num_accepted, Tensor emitted, Tensor next_root)");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) {
  m.impl("verify_tree", TORCH_BOX(&verify_tree_cpu));
}
#ifdef SPECEXTEND_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(specextend, CUDA, m) {
  m.impl("verify_tree", TORCH_BOX(&verify_tree_cuda));
}
#endif

}  // namespace specextend
