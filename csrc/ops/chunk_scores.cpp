#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "check.h"
#include "cpu/cpu.h"
#include "ops/allocate.h"
#include "ops/dtype.h"
#ifdef SPECEXTEND_HAS_CUDA
#include "launch.h"
#include "ops/attention_switches.h"
#include "stream.h"
#endif

namespace specextend {
namespace {

constexpr const char* kOp = "chunk_scores";
constexpr const char* kKeysOp = "chunk_scores.keys";

struct Prepared {
  Tensor scores;
  ChunkScoresParams params;
};

bool takes_largest(const char* op, const std::string& reduce) {
  STD_TORCH_CHECK(reduce == "mean" || reduce == "max", op, ": reduce must be mean or max, got ",
                  reduce);
  return reduce == "max";
}

void check_per_sequence(const char* op, const char* name, const Tensor& t, const char* other_name,
                        const Tensor& other) {
  check_shape(op, name, t, {other.size(0)});
  check_dtype(op, name, t, ScalarType::Int);
  check_contiguous(op, name, t);
  check_same_device(op, name, t, other_name, other);
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
  check_per_sequence(kOp, "rows", rows, "chunk_lse", chunk_lse);
  check_per_sequence(kOp, "prefix_lens", prefix_lens, "chunk_lse", chunk_lse);
  check_range(kOp, "chunk_size", chunk_size, 1, INT32_MAX);
  const bool largest = takes_largest(kOp, reduce);

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
              largest,
              true};
  return r;
}

Tensor chunk_scores_cpu(const Tensor& chunk_lse, const Tensor& lse, const Tensor& rows,
                        const Tensor& prefix_lens, int64_t chunk_size, std::string reduce) {
  Prepared r = prepare(chunk_lse, lse, rows, prefix_lens, chunk_size, reduce);
  cpu::chunk_scores(r.params);
  return r.scores;
}

#ifdef SPECEXTEND_HAS_CUDA
Tensor chunk_scores_cuda(const Tensor& chunk_lse, const Tensor& lse, const Tensor& rows,
                         const Tensor& prefix_lens, int64_t chunk_size, std::string reduce) {
  Prepared r = prepare(chunk_lse, lse, rows, prefix_lens, chunk_size, reduce);
  const int32_t device = chunk_lse.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor partials = allocate(chunk_lse, {chunk_scores_partials(r.params)}, ScalarType::Double);
  check_launch(kOp, launch_chunk_scores(r.params, partials.mutable_data_ptr<double>(),
                                        current_stream(device)));
  return r.scores;
}
#endif

struct KeysArguments {
  const Tensor &q, &k, &rows, &lens;
  int64_t chunk_size;
  std::optional<double> scale;
  double softcap;
  int64_t window;
  const std::string& reduce;
};

struct PreparedKeys {
  Tensor scores;
  ChunkScoresKeysParams params;
  DType dtype;
};

PreparedKeys prepare_keys(const KeysArguments& a) {
  check_dim(kKeysOp, "q", a.q, 4, "[B, M, Hq, D]");
  check_dim(kKeysOp, "k", a.k, 4, "[B, S, Hkv, D]");
  check_float(kKeysOp, "q", a.q);
  check_dtype(kKeysOp, "k", a.k, a.q.scalar_type());
  const int64_t batch = a.q.size(0), num_rows = a.q.size(1), heads = a.q.size(2), dim = a.q.size(3);
  const int64_t capacity = a.k.size(1), kv_heads = a.k.size(2);
  check_shape(kKeysOp, "k", a.k, {batch, capacity, kv_heads, dim});
  check_range(kKeysOp, "the number of rows M", num_rows, 1, INT32_MAX);
  check_head_dim(kKeysOp, "q and k", dim, kMaxHeadDim);
  STD_TORCH_CHECK(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, kKeysOp,
                  ": the heads of q must be a multiple of those of k, got ", heads, " and ",
                  kv_heads);
  check_range(kKeysOp, "the number of keys S", capacity, 0, INT32_MAX);
  check_unit_last_stride(kKeysOp, "q", a.q);
  check_unit_last_stride(kKeysOp, "k", a.k);
  check_same_device(kKeysOp, "k", a.k, "q", a.q);
  check_per_sequence(kKeysOp, "rows", a.rows, "q", a.q);
  check_per_sequence(kKeysOp, "lens", a.lens, "q", a.q);
  check_range(kKeysOp, "chunk_size", a.chunk_size, 1, INT32_MAX);
  check_range(kKeysOp, "window", a.window, 0, INT32_MAX);
  STD_TORCH_CHECK(a.softcap >= 0 && std::isfinite(a.softcap), kKeysOp,
                  ": softcap must be finite and not negative, got ", a.softcap);
  const double scale = a.scale.value_or(1 / std::sqrt(double(dim)));
  STD_TORCH_CHECK(std::isfinite(scale), kKeysOp, ": scale must be finite, got ", scale);
  const bool largest = takes_largest(kKeysOp, a.reduce);

  const int64_t num_chunks = (capacity + a.chunk_size - 1) / a.chunk_size;
  PreparedKeys r{
      allocate(a.q, {batch, num_chunks}, ScalarType::Float), {}, to_dtype(a.q.scalar_type())};
  TreeAttentionParams& p = r.params.attention;
  p.q = a.q.const_data_ptr();
  p.k = a.k.const_data_ptr();
  p.q_stride_b = a.q.stride(0), p.q_stride_m = a.q.stride(1), p.q_stride_h = a.q.stride(2);
  p.k_stride_b = a.k.stride(0), p.k_stride_s = a.k.stride(1), p.k_stride_h = a.k.stride(2);
  p.prefix_lens = a.lens.const_data_ptr<int32_t>();
  p.capacity = capacity;
  p.batch = int(batch), p.num_rows = int(num_rows), p.num_tree_keys = 0;
  p.num_heads = int(heads), p.num_kv_heads = int(kv_heads), p.head_dim = int(dim);
  p.value_dim = int(std::min<int64_t>(dim, kMaxValueDim));  // some size that kernels have
  p.chunk_size = int(a.chunk_size), p.num_chunks = int(num_chunks);
  p.window = int(a.window);
  p.scale = float(scale), p.softcap = float(a.softcap);
  r.params.rows = a.rows.const_data_ptr<int32_t>();
  r.params.scores = r.scores.mutable_data_ptr<float>();
  r.params.largest = largest;
  return r;
}

Tensor chunk_scores_keys_cpu(const Tensor& q, const Tensor& k, const Tensor& rows,
                             const Tensor& lens, int64_t chunk_size, std::optional<double> scale,
                             double softcap, int64_t window, std::string reduce) {
  PreparedKeys r = prepare_keys({q, k, rows, lens, chunk_size, scale, softcap, window, reduce});
  cpu::chunk_scores_keys(r.params, r.dtype);
  return r.scores;
}

#ifdef SPECEXTEND_HAS_CUDA
// Launches three things: the device picks the row of each sequence; tree attention takes it, with
// no tree and no values; and the log-sum-exps that this gives become scores.
Tensor chunk_scores_keys_cuda(const Tensor& q, const Tensor& k, const Tensor& rows,
                              const Tensor& lens, int64_t chunk_size, std::optional<double> scale,
                              double softcap, int64_t window, std::string reduce) {
  PreparedKeys r = prepare_keys({q, k, rows, lens, chunk_size, scale, softcap, window, reduce});
  TreeAttentionParams& p = r.params.attention;
  if (p.batch == 0 || p.num_chunks == 0) return r.scores;
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);

  Tensor picked = allocate(q, {p.batch, 1, p.num_heads, p.head_dim}, q.scalar_type());
  check_launch(kKeysOp,
               launch_pick_rows(p, r.dtype, r.params.rows, picked.mutable_data_ptr(), stream));
  Tensor lse = allocate(q, {p.batch, 1, p.num_heads}, ScalarType::Float);
  Tensor chunk_lse = allocate(q, {p.batch, 1, p.num_heads, p.num_chunks}, ScalarType::Float);
  p.q = picked.const_data_ptr();
  p.q_stride_b = p.q_stride_m = int64_t(p.num_heads) * p.head_dim;
  p.q_stride_h = p.head_dim;
  p.num_rows = 1;
  p.lse = lse.mutable_data_ptr<float>();
  p.chunk_lse = chunk_lse.mutable_data_ptr<float>();
  AttentionPlan plan;
  check_launch(kKeysOp, plan_tree_attention(p, r.dtype, device, &plan));
  plan.early_combine &= programmatic_launch(kKeysOp);
  Tensor workspace = allocate(q, {int64_t(plan.workspace_bytes)}, ScalarType::Byte);
  check_launch(kKeysOp,
               launch_tree_attention(p, r.dtype, plan, workspace.mutable_data_ptr(), stream));

  const ChunkScoresParams scores{p.chunk_lse,
                                 p.lse,
                                 chunk_lse.stride(0),
                                 0,
                                 p.num_chunks,
                                 p.num_heads,
                                 0,
                                 r.params.rows,
                                 p.prefix_lens,
                                 r.params.scores,
                                 p.batch,
                                 1,
                                 p.num_heads,
                                 p.num_chunks,
                                 p.chunk_size,
                                 r.params.largest,
                                 false};
  check_launch(kKeysOp, launch_chunk_scores(scores, nullptr, stream));
  return r.scores;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def(
      "chunk_scores(Tensor chunk_lse, Tensor lse, Tensor rows, Tensor prefix_lens, *, "
      "int chunk_size, str reduce=\"mean\") -> Tensor scores");
  m.def(
      "chunk_scores.keys(Tensor q, Tensor k, Tensor rows, Tensor lens, *, int chunk_size, "
      "float? scale=None, float softcap=0.0, int window=0, str reduce=\"mean\") -> Tensor scores");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) {
  m.impl("chunk_scores", TORCH_BOX(&chunk_scores_cpu));
  m.impl("chunk_scores.keys", TORCH_BOX(&chunk_scores_keys_cpu));
}
#ifdef SPECEXTEND_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(specextend, CUDA, m) {
  m.impl("chunk_scores", TORCH_BOX(&chunk_scores_cuda));
  m.impl("chunk_scores.keys", TORCH_BOX(&chunk_scores_keys_cuda));
}
#endif

}  // namespace specextend
