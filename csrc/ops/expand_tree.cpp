#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

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

constexpr const char* kOp = "expand_tree";

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Prepared {
  Result result;
  ExpandTreeParams params;
  DType dtype;
};

Prepared prepare(const Tensor& logits, const Tensor& beam_logp, int64_t top_k, int64_t width) {
  check_dim(kOp, "logits", logits, 3, "[B, F, V]");
  check_float(kOp, "logits", logits);
  check_unit_last_stride(kOp, "logits", logits);
  const int64_t batch = logits.size(0), frontier = logits.size(1), vocab = logits.size(2);
  check_range(kOp, "the number of frontier nodes F", frontier, 1, INT32_MAX);
  check_range(kOp, "the vocabulary size V", vocab, 1, INT32_MAX);
  check_shape(kOp, "beam_logp", beam_logp, {batch, frontier});
  check_dtype(kOp, "beam_logp", beam_logp, ScalarType::Float);
  check_contiguous(kOp, "beam_logp", beam_logp);
  check_same_device(kOp, "beam_logp", beam_logp, "logits", logits);
  check_range(kOp, "top_k", top_k, 1, vocab);
  check_range(kOp, "the number of candidates F * top_k", frontier * top_k, 1, INT32_MAX);
  check_range(kOp, "width", width, 1, frontier * top_k);

  Prepared r{{allocate(logits, {batch, frontier, top_k}, ScalarType::Long),
              allocate(logits, {batch, frontier, top_k}, ScalarType::Float),
              allocate(logits, {batch, width}, ScalarType::Int),
              allocate(logits, {batch, width}, ScalarType::Float)},
             {},
             to_dtype(logits.scalar_type())};
  auto& [cand_tokens, cand_logp, beam, beam_logp_out] = r.result;
  r.params = {logits.const_data_ptr(),
              logits.stride(0),
              logits.stride(1),
              beam_logp.const_data_ptr<float>(),
              cand_tokens.mutable_data_ptr<int64_t>(),
              cand_logp.mutable_data_ptr<float>(),
              beam.mutable_data_ptr<int32_t>(),
              beam_logp_out.mutable_data_ptr<float>(),
              vocab,
              int(batch),
              int(frontier),
              int(top_k),
              int(width)};
  return r;
}

Result expand_tree_cpu(const Tensor& logits, const Tensor& beam_logp, int64_t top_k,
                       int64_t width) {
  Prepared r = prepare(logits, beam_logp, top_k, width);
  cpu::expand_tree(r.params, r.dtype);
  return r.result;
}

#ifdef SPECEXTEND_HAS_CUDA
Result expand_tree_cuda(const Tensor& logits, const Tensor& beam_logp, int64_t top_k,
                        int64_t width) {
  Prepared r = prepare(logits, beam_logp, top_k, width);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const cudaStream_t stream = current_stream(logits.get_device_index());
  const AllocatedScratch scratch(logits, r.params);
  check_launch(kOp, by_device_type(r.dtype, [&](auto x) {
                 return launch_expand_tree<decltype(x)>(r.params, scratch.arrays, stream);
               }));
  return r.result;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def(
      "expand_tree(Tensor logits, Tensor beam_logp, *, int top_k, int width) -> "
      "(Tensor cand_tokens, Tensor cand_logp, Tensor beam, Tensor beam_logp_out)");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) {
  m.impl("expand_tree", TORCH_BOX(&expand_tree_cpu));
}
#ifdef SPECEXTEND_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(specextend, CUDA, m) {
  m.impl("expand_tree", TORCH_BOX(&expand_tree_cuda));
}
#endif

}  // namespace specextend
