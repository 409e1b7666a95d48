#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "check.h"
#include "cpu/cpu.h"
#include "ops/allocate.h"
#ifdef SPECEXTEND_HAS_CUDA
#include "launch.h"
#include "ops/scratch.h"
#include "stream.h"
#endif

namespace specextend {
namespace {

constexpr const char* kOp = "verify_tree";
constexpr const char* kRejectionOp = "verify_tree.rejection";

using Result =
    std::tuple<Tensor, Tensor, Tensor, Tensor>;  // path, num_accepted, emitted, next_root

void check_tree(const char* op, const Tensor& tokens, const Tensor& parents) {
  check_dim(op, "tokens", tokens, 2, "[B, N]");
  check_dtype(op, "tokens", tokens, ScalarType::Long);
  check_contiguous(op, "tokens", tokens);
  check_range(op, "the number of nodes N", tokens.size(1), 1, INT32_MAX);
  check_shape(op, "parents", parents, {tokens.size(0), tokens.size(1)});
  check_dtype(op, "parents", parents, ScalarType::Int);
  check_contiguous(op, "parents", parents);
  check_same_device(op, "parents", parents, "tokens", tokens);
}

Result allocate_result(const Tensor& tokens) {
  const int64_t batch = tokens.size(0), num_nodes = tokens.size(1);
  return {allocate(tokens, {batch, num_nodes}, ScalarType::Int),
          allocate(tokens, {batch}, ScalarType::Int),
          allocate(tokens, {batch, num_nodes}, ScalarType::Long),
          allocate(tokens, {batch}, ScalarType::Long)};
}

// Without target_tokens.
VerifyTreeParams tree_params(const Tensor& tokens, const Tensor& parents, const Result& result) {
  const auto& [path, num_accepted, emitted, next_root] = result;
  return {tokens.const_data_ptr<int64_t>(),
          parents.const_data_ptr<int32_t>(),
          nullptr,
          path.mutable_data_ptr<int32_t>(),
          num_accepted.mutable_data_ptr<int32_t>(),
          emitted.mutable_data_ptr<int64_t>(),
          next_root.mutable_data_ptr<int64_t>(),
          int(tokens.size(0)),
          int(tokens.size(1))};
}

struct Prepared {
  Result result;
  VerifyTreeParams params;
};

Prepared prepare(const Tensor& tokens, const Tensor& parents, const Tensor& target_tokens) {
  check_tree(kOp, tokens, parents);
  check_shape(kOp, "target_tokens", target_tokens, {tokens.size(0), tokens.size(1)});
  check_dtype(kOp, "target_tokens", target_tokens, ScalarType::Long);
  check_contiguous(kOp, "target_tokens", target_tokens);
  check_same_device(kOp, "target_tokens", target_tokens, "tokens", tokens);

  Prepared r{allocate_result(tokens), {}};
  r.params = tree_params(tokens, parents, r.result);
  r.params.target_tokens = target_tokens.const_data_ptr<int64_t>();
  return r;
}

void check_probs(const char* name, const Tensor& probs, const Tensor& tokens, int64_t vocab) {
  check_shape(kRejectionOp, name, probs, {tokens.size(0), tokens.size(1), vocab});
  check_dtype(kRejectionOp, name, probs, ScalarType::Float);
  check_unit_last_stride(kRejectionOp, name, probs);
  check_same_device(kRejectionOp, name, probs, "tokens", tokens);
}

void check_uniforms(const char* name, const Tensor& uniforms, const Tensor& tokens) {
  check_shape(kRejectionOp, name, uniforms, {tokens.size(0), tokens.size(1)});
  check_contiguous(kRejectionOp, name, uniforms);
  check_same_device(kRejectionOp, name, uniforms, "tokens", tokens);
}

struct PreparedRejection {
  Result result;
  VerifyTreeRejectionParams params;
};

PreparedRejection prepare_rejection(const Tensor& tokens, const Tensor& parents,
                                    const Tensor& target_probs, const Tensor& draft_probs,
                                    const Tensor& uniforms, const Tensor& final_uniforms) {
  check_tree(kRejectionOp, tokens, parents);
  check_dim(kRejectionOp, "target_probs", target_probs, 3, "[B, N, V]");
  const int64_t vocab = target_probs.size(2);
  check_range(kRejectionOp, "the vocabulary size V", vocab, 1, INT32_MAX);
  check_probs("target_probs", target_probs, tokens, vocab);
  check_probs("draft_probs", draft_probs, tokens, vocab);
  check_uniforms("uniforms", uniforms, tokens);
  check_uniforms("final_uniforms", final_uniforms, tokens);
  const ScalarType type = uniforms.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, kRejectionOp,
                  ": uniforms must be float32 or float64, got ", dtype_string(type));
  check_dtype(kRejectionOp, "final_uniforms", final_uniforms, type);

  PreparedRejection r{allocate_result(tokens), {}};
  r.params = {tree_params(tokens, parents, r.result),
              target_probs.const_data_ptr<float>(),
              draft_probs.const_data_ptr<float>(),
              target_probs.stride(0),
              target_probs.stride(1),
              draft_probs.stride(0),
              draft_probs.stride(1),
              uniforms.const_data_ptr(),
              final_uniforms.const_data_ptr(),
              type == ScalarType::Double,
              vocab};
  return r;
}

Result verify_tree_cpu(const Tensor& tokens, const Tensor& parents, const Tensor& target_tokens) {
  Prepared r = prepare(tokens, parents, target_tokens);
  cpu::verify_tree(r.params);
  return r.result;
}

Result verify_tree_rejection_cpu(const Tensor& tokens, const Tensor& parents,
                                 const Tensor& target_probs, const Tensor& draft_probs,
                                 const Tensor& uniforms, const Tensor& final_uniforms) {
  PreparedRejection r =
      prepare_rejection(tokens, parents, target_probs, draft_probs, uniforms, final_uniforms);
  cpu::verify_tree_rejection(r.params);
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

Result verify_tree_rejection_cuda(const Tensor& tokens, const Tensor& parents,
                                  const Tensor& target_probs, const Tensor& draft_probs,
                                  const Tensor& uniforms, const Tensor& final_uniforms) {
  PreparedRejection r =
      prepare_rejection(tokens, parents, target_probs, draft_probs, uniforms, final_uniforms);
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const cudaStream_t stream = current_stream(tokens.get_device_index());
  const AllocatedScratch scratch(tokens, r.params);
  check_launch(kRejectionOp, launch_verify_tree_rejection(r.params, scratch.arrays, stream));
  return r.result;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def(
      "verify_tree(Tensor tokens, Tensor parents, Tensor target_tokens) -> "
      "(Tensor path, Tensor num_accepted, Tensor emitted, Tensor next_root)");
  m.def(
      "verify_tree.rejection(Tensor tokens, Tensor parents, Tensor target_probs, "
      "Tensor draft_probs, Tensor uniforms, Tensor final_uniforms) -> "
      "(Tensor path, Tensor num_accepted, Tensor emitted, Tensor next_root)");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) {
  m.impl("verify_tree", TORCH_BOX(&verify_tree_cpu));
  m.impl("verify_tree.rejection", TORCH_BOX(&verify_tree_rejection_cpu));
}
#ifdef SPECEXTEND_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(specextend, CUDA, m) {
  m.impl("verify_tree", TORCH_BOX(&verify_tree_cuda));
  m.impl("verify_tree.rejection", TORCH_BOX(&verify_tree_rejection_cuda));
}
#endif

}  // namespace specextend
