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

constexpr const char* kOp = "select_chunks";

using Result = std::tuple<Tensor, Tensor>;  // ids, counts

struct Prepared {
  Result result;
  SelectChunksParams params;
};

Prepared prepare(const Tensor& scores, const Tensor& lens, int64_t chunk_size, int64_t budget,
                 int64_t num_sinks, int64_t num_recent) {
  check_dim(kOp, "scores", scores, 2, "[B, C]");
  check_dtype(kOp, "scores", scores, ScalarType::Float);
  check_contiguous(kOp, "scores", scores);
  const int64_t batch = scores.size(0), num_chunks = scores.size(1);
  check_range(kOp, "the number of chunks C", num_chunks, 0, INT32_MAX);
  check_shape(kOp, "lens", lens, {batch});
  check_dtype(kOp, "lens", lens, ScalarType::Int);
  check_contiguous(kOp, "lens", lens);
  check_same_device(kOp, "lens", lens, "scores", scores);
  check_range(kOp, "chunk_size", chunk_size, 1, INT32_MAX);
  check_range(kOp, "budget", budget, 1, INT32_MAX);
  check_range(kOp, "num_sinks", num_sinks, 0, budget);
  check_range(kOp, "num_recent", num_recent, 0, budget);
  STD_TORCH_CHECK(num_sinks + num_recent <= budget, kOp,
                  ": num_sinks + num_recent must be at most budget = ", budget, ", got ", num_sinks,
                  " + ", num_recent);

  Prepared r{{allocate(scores, {batch, budget}, ScalarType::Int),
              allocate(scores, {batch}, ScalarType::Int)},
             {}};
  auto& [ids, counts] = r.result;
  r.params = {scores.const_data_ptr<float>(),
              lens.const_data_ptr<int32_t>(),
              ids.mutable_data_ptr<int32_t>(),
              counts.mutable_data_ptr<int32_t>(),
              int(batch),
              int(num_chunks),
              int(chunk_size),
              int(budget),
              int(num_sinks),
              int(num_recent)};
  return r;
}

Result select_chunks_cpu(const Tensor& scores, const Tensor& lens, int64_t chunk_size,
                         int64_t budget, int64_t num_sinks, int64_t num_recent) {
  Prepared r = prepare(scores, lens, chunk_size, budget, num_sinks, num_recent);
  cpu::select_chunks(r.params);
  return r.result;
}

#ifdef SPECEXTEND_HAS_CUDA
Result select_chunks_cuda(const Tensor& scores, const Tensor& lens, int64_t chunk_size,
                          int64_t budget, int64_t num_sinks, int64_t num_recent) {
  Prepared r = prepare(scores, lens, chunk_size, budget, num_sinks, num_recent);
  const int32_t device = scores.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(kOp, launch_select_chunks(r.params, current_stream(device)));
  return r.result;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def(
      "select_chunks(Tensor scores, Tensor lens, *, int chunk_size, int budget, int num_sinks=0, "
      "int num_recent=0) -> (Tensor ids, Tensor counts)");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) {
  m.impl("select_chunks", TORCH_BOX(&select_chunks_cpu));
}
#ifdef SPECEXTEND_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(specextend, CUDA, m) {
  m.impl("select_chunks", TORCH_BOX(&select_chunks_cuda));
}
#endif

}  // namespace specextend
