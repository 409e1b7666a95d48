#include <torch/csrc/stable/library.h>

#include <string>

#include "check.h"
#include "cpu/cpu.h"
#include "ops/allocate.h"

namespace specextend {
namespace {

constexpr const char* kOp = "chunk_scores";

struct Prepared {
  Tensor scores;
  ChunkScoresParams params;
};

bool takes_largest(const std::string& reduce) {
  STD_TORCH_CHECK(reduce == "mean" || reduce == "max", kOp, ": reduce must be mean or max, got ",
                  reduce);
  return reduce == "max";
}

void check_per_sequence(const char* name, const Tensor& t, int64_t batch, const char* other_name,
                        const Tensor& other) {
  check_shape(kOp, name, t, {batch});
  check_dtype(kOp, name, t, ScalarType::Int);
  check_contiguous(kOp, name, t);
  check_same_device(kOp, name, t, other_name, other);
}

Prepared prepare(const Tensor& chunk_lse, const Tensor& lse, const Tensor& rows,
                 const Tensor& prefix_lens, int64_t chunk_size, const std::string& reduce) {
  check_dim(kOp, "chunk_lse", chunk_lse, 4, "[B, M, Hq, C]");
  check_dtype(kOp, "chunk_lse", chunk_lse, ScalarType::Float);
  check_unit_last_stride(kOp, "chunk_lse", chunk_lse);
  const int64_t batch = chunk_lse.size(0), num_rows = chunk_lse.size(1),
                num_heads = chunk_lse.size(2), num_chunks = chunk_lse.size(3);
  check_range(kOp, "the number of rows M", num_rows, 1, INT32_MAX);
  check_range(kOp, "the number of heads Hq", num_heads, 1, INT32_MAX);
  check_range(kOp, "the number of chunks C", num_chunks, 0, INT32_MAX - 1);
  check_shape(kOp, "lse", lse, {batch, num_rows, num_heads});
  check_dtype(kOp, "lse", lse, ScalarType::Float);
  check_unit_last_stride(kOp, "lse", lse);
  check_same_device(kOp, "lse", lse, "chunk_lse", chunk_lse);
  check_per_sequence("rows", rows, batch, "chunk_lse", chunk_lse);
  check_per_sequence("prefix_lens", prefix_lens, batch, "chunk_lse", chunk_lse);
  check_range(kOp, "chunk_size", chunk_size, 1, INT32_MAX);
  const bool largest = takes_largest(reduce);

  Prepared r{allocate(chunk_lse, {batch, num_chunks}, ScalarType::Float), {}};
  r.params = {chunk_lse.const_data_ptr<float>(),
              lse.const_data_ptr<float>(),
              chunk_lse.stride(0),
              chunk_lse.stride(1),
              chunk_lse.stride(2),
              lse.stride(0),
              lse.stride(1),
              rows.const_data_ptr<int32_t>(),
              prefix_lens.const_data_ptr<int32_t>(),
              r.scores.mutable_data_ptr<float>(),
              int(batch),
              int(num_rows),
              int(num_heads),
              int(num_chunks),
              int(chunk_size),
              largest};
  return r;
}

Tensor chunk_scores_cpu(const Tensor& chunk_lse, const Tensor& lse, const Tensor& rows,
                        const Tensor& prefix_lens, int64_t chunk_size, std::string reduce) {
  Prepared r = prepare(chunk_lse, lse, rows, prefix_lens, chunk_size, reduce);
  cpu::chunk_scores(r.params);
  return r.scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def(
      "chunk_scores(Tensor chunk_lse, Tensor lse, Tensor rows, Tensor prefix_lens, *, "
      "int chunk_size, str reduce=\"mean\") -> Tensor scores");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) {
  m.impl("chunk_scores", TORCH_BOX(&chunk_scores_cpu));
}

}  // namespace specextend
