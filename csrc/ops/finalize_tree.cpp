#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "check.h"
#include "cpu/cpu.h"
#include "ops/allocate.h"
#include "tree.h"
#ifdef SPECEXTEND_HAS_CUDA
#include "launch.h"
#include "ops/scratch.h"
#include "stream.h"
#endif

namespace specextend {
namespace {

constexpr const char* kOp = "finalize_tree";

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Prepared {
  Result result;
  FinalizeTreeParams params;
};

Prepared prepare(const Tensor& logp, const Tensor& parents, int64_t num_nodes) {
  check_dim(kOp, "logp", logp, 2, "[B, T]");
  check_dtype(kOp, "logp", logp, ScalarType::Float);
  check_contiguous(kOp, "logp", logp);
  const int64_t batch = logp.size(0), num_candidates = logp.size(1);
  check_range(kOp, "the number of candidates T", num_candidates, 0, INT32_MAX);
  check_shape(kOp, "parents", parents, {batch, num_candidates});
  check_dtype(kOp, "parents", parents, ScalarType::Int);
  check_contiguous(kOp, "parents", parents);
  check_same_device(kOp, "parents", parents, "logp", logp);
  check_range(kOp, "num_nodes", num_nodes, 0, num_candidates);

  const int64_t num_slots = 1 + num_nodes;
  Prepared r{{allocate(logp, {batch, num_nodes}, ScalarType::Int),
              allocate(logp, {batch, num_slots}, ScalarType::Int),
              allocate(logp, {batch, num_slots}, ScalarType::Int),
              allocate(logp, {batch, num_slots, mask_words(int(num_slots))}, ScalarType::Long)},
             {}};
  auto& [nodes, tree_parents, depths, mask] = r.result;
  r.params = {logp.const_data_ptr<float>(),
              parents.const_data_ptr<int32_t>(),
              nodes.mutable_data_ptr<int32_t>(),
              tree_parents.mutable_data_ptr<int32_t>(),
              depths.mutable_data_ptr<int32_t>(),
              static_cast<uint64_t*>(mask.mutable_data_ptr()),
              int(batch),
              int(num_candidates),
              int(num_nodes)};
  return r;
}

Result finalize_tree_cpu(const Tensor& logp, const Tensor& parents, int64_t num_nodes) {
  Prepared r = prepare(logp, parents, num_nodes);
  cpu::finalize_tree(r.params);
  return r.result;
}

#ifdef SPECEXTEND_HAS_CUDA
Result finalize_tree_cuda(const Tensor& logp, const Tensor& parents, int64_t num_nodes) {
  Prepared r = prepare(logp, parents, num_nodes);
  const torch::stable::accelerator::DeviceGuard guard(logp.get_device_index());
  const cudaStream_t stream = current_stream(logp.get_device_index());
  const AllocatedScratch scratch(logp, r.params);
  check_launch(kOp, launch_finalize_tree(r.params, scratch.arrays, stream));
  return r.result;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def(
      "finalize_tree(Tensor logp, Tensor parents, *, int num_nodes) -> "
      "(Tensor nodes, Tensor tree_parents, Tensor depths, Tensor mask)");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) {
  m.impl("finalize_tree", TORCH_BOX(&finalize_tree_cpu));
}
#ifdef SPECEXTEND_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(specextend, CUDA, m) {
  m.impl("finalize_tree", TORCH_BOX(&finalize_tree_cuda));
}
#endif

}  // namespace specextend
