#include <torch/csrc/stable/library.h>

#include <tuple>

#include "check.h"
#include "cpu/cpu.h"
#include "ops/allocate.h"

namespace specextend {
namespace {

constexpr const char* kOp = "verify_tree";

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

std::tuple<Result, VerifyTreeParams> prepare(const Tensor& tokens, const Tensor& parents,
                                             const Tensor& target_tokens) {
  check_tree(kOp, tokens, parents);
  check_shape(kOp, "target_tokens", target_tokens, {tokens.size(0), tokens.size(1)});
  check_dtype(kOp, "target_tokens", target_tokens, ScalarType::Long);
  check_contiguous(kOp, "target_tokens", target_tokens);
  check_same_device(kOp, "target_tokens", target_tokens, "tokens", tokens);

  Result r = allocate_result(tokens);
  return {r,
          {tokens.const_data_ptr<int64_t>(), parents.const_data_ptr<int32_t>(),
           target_tokens.const_data_ptr<int64_t>(), std::get<0>(r).mutable_data_ptr<int32_t>(),
           std::get<1>(r).mutable_data_ptr<int32_t>(), std::get<2>(r).mutable_data_ptr<int64_t>(),
           std::get<3>(r).mutable_data_ptr<int64_t>(), int(tokens.size(0)), int(tokens.size(1))}};
}

Result verify_tree_cpu(const Tensor& tokens, const Tensor& parents, const Tensor& target_tokens) {
  auto [result, params] = prepare(tokens, parents, target_tokens);
  cpu::verify_tree(params);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def(
      "verify_tree(Tensor tokens, Tensor parents, Tensor target_tokens) -> "
      "(Tensor path, Tensor num_accepted, Tensor emitted, Tensor next_root)");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) {
  m.impl("verify_tree", TORCH_BOX(&verify_tree_cpu));
}

}  // namespace specextend
