#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "check.h"
#include "cpu/cpu.h"
#include "ops/allocate.h"
#include "ops/dtype.h"
#include "tree.h"
#ifdef SPECEXTEND_HAS_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "launch.h"
#include "ops/attention_switches.h"
#include "stream.h"
#endif

namespace specextend {
namespace {

constexpr const char* kOp = "tree_attention";

struct Arguments {
  const Tensor &q, &k, &v, &prefix_lens;
  const std::optional<Tensor>& tree_mask;
  std::optional<int64_t> num_tree_keys;
  std::optional<double> scale;
  double softcap;
  int64_t window, attention_chunk;
  const std::optional<Tensor>&q_depths, &k_depths, &sinks;
  int64_t chunk_size;
};

struct Prepared {
  Tensor out, lse, chunk_lse;
  TreeAttentionParams params;
  DType dtype;
};

// Checks an integer tensor beside q: dtype, shape, device, contiguity.
void check_side(const char* name, const Tensor& t, ScalarType type,
                std::initializer_list<int64_t> shape, const Tensor& q) {
  check_dtype(kOp, name, t, type);
  check_shape(kOp, name, t, shape);
  check_contiguous(kOp, name, t);
  check_same_device(kOp, name, t, "q", q);
}

// Does everything that does not depend on the device: checks, allocation, parameters.
Prepared prepare(const Arguments& a) {
  check_dim(kOp, "q", a.q, 4, "[B, M, Hq, D]");
  check_dim(kOp, "k", a.k, 4, "[B, S, Hkv, D]");
  check_dim(kOp, "v", a.v, 4, "[B, S, Hkv, Dv]");
  check_float(kOp, "q", a.q);
  check_dtype(kOp, "k", a.k, a.q.scalar_type());
  check_dtype(kOp, "v", a.v, a.q.scalar_type());
  const int64_t batch = a.q.size(0), rows = a.q.size(1), heads = a.q.size(2), dim = a.q.size(3);
  const int64_t capacity = a.k.size(1), kv_heads = a.k.size(2), value_dim = a.v.size(3);
  check_shape(kOp, "k", a.k, {batch, capacity, kv_heads, dim});
  check_shape(kOp, "v", a.v, {batch, capacity, kv_heads, value_dim});
  check_head_dim(kOp, "q and k", dim, kMaxHeadDim);
  check_head_dim(kOp, "v", value_dim, kMaxValueDim);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, kOp,
                  ": the heads of q must be a multiple of those of k, got ", heads, " and ",
                  kv_heads);
  constexpr int64_t kIntMax = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(capacity <= kIntMax, kOp, ": k must have at most 2^31 - 1 rows, got ", capacity);
  check_unit_last_stride(kOp, "q", a.q);
  check_unit_last_stride(kOp, "k", a.k);
  check_unit_last_stride(kOp, "v", a.v);
  check_same_device(kOp, "k", a.k, "q", a.q);
  check_same_device(kOp, "v", a.v, "q", a.q);
  check_side("prefix_lens", a.prefix_lens, ScalarType::Int, {batch}, a.q);

  const int64_t keys = a.num_tree_keys.value_or(rows);
  STD_TORCH_CHECK(keys >= 0 && keys <= capacity, kOp, ": num_tree_keys must be between 0 and the ",
                  capacity, " rows of k, got ", keys);
  if (a.tree_mask)
    check_side("tree_mask", *a.tree_mask, ScalarType::Long, {batch, rows, mask_words(int(keys))},
               a.q);
  if (a.q_depths) check_side("q_depths", *a.q_depths, ScalarType::Int, {batch, rows}, a.q);
  if (a.k_depths) check_side("k_depths", *a.k_depths, ScalarType::Int, {batch, keys}, a.q);
  if (a.sinks) check_side("sinks", *a.sinks, ScalarType::Float, {heads}, a.q);
  check_range(kOp, "window", a.window, 0, kIntMax);
  check_range(kOp, "attention_chunk", a.attention_chunk, 0, kIntMax);
  STD_TORCH_CHECK(!a.window || !a.attention_chunk, kOp,
                  ": window and attention_chunk must not be given together, got ", a.window,
                  " and ", a.attention_chunk);
  check_range(kOp, "chunk_size", a.chunk_size, 0, kIntMax);
  STD_TORCH_CHECK(a.softcap >= 0 && std::isfinite(a.softcap), kOp,
                  ": softcap must be finite and not negative, got ", a.softcap);
  const double scale = a.scale.value_or(1 / std::sqrt(double(dim)));
  STD_TORCH_CHECK(std::isfinite(scale), kOp, ": scale must be finite, got ", scale);

  const int64_t chunks = a.chunk_size ? (capacity + a.chunk_size - 1) / a.chunk_size : 0;
  Prepared r{allocate(a.q, {batch, rows, heads, value_dim}, a.q.scalar_type()),
             allocate(a.q, {batch, rows, heads}, ScalarType::Float),
             a.chunk_size ? allocate(a.q, {batch, rows, heads, chunks}, ScalarType::Float)
                          : allocate(a.q, {0}, ScalarType::Float),
             {},
             to_dtype(a.q.scalar_type())};
  TreeAttentionParams& p = r.params;
  p.q = a.q.const_data_ptr();
  p.k = a.k.const_data_ptr();
  p.v = a.v.const_data_ptr();
  p.q_stride_b = a.q.stride(0), p.q_stride_m = a.q.stride(1), p.q_stride_h = a.q.stride(2);
  p.k_stride_b = a.k.stride(0), p.k_stride_s = a.k.stride(1), p.k_stride_h = a.k.stride(2);
  p.v_stride_b = a.v.stride(0), p.v_stride_s = a.v.stride(1), p.v_stride_h = a.v.stride(2);
  p.prefix_lens = a.prefix_lens.const_data_ptr<int32_t>();
  p.mask = a.tree_mask ? static_cast<const uint64_t*>(a.tree_mask->const_data_ptr()) : nullptr;
  p.q_depths = a.q_depths ? a.q_depths->const_data_ptr<int32_t>() : nullptr;
  p.k_depths = a.k_depths ? a.k_depths->const_data_ptr<int32_t>() : nullptr;
  p.sinks = a.sinks ? a.sinks->const_data_ptr<float>() : nullptr;
  p.out = r.out.mutable_data_ptr();
  p.lse = r.lse.mutable_data_ptr<float>();
  p.chunk_lse = a.chunk_size ? r.chunk_lse.mutable_data_ptr<float>() : nullptr;
  p.capacity = capacity;
  p.batch = int(batch), p.num_rows = int(rows), p.num_tree_keys = int(keys);
  p.num_heads = int(heads), p.num_kv_heads = int(kv_heads), p.head_dim = int(dim);
  p.value_dim = int(value_dim);
  p.chunk_size = int(a.chunk_size), p.num_chunks = int(chunks);
  p.window = int(a.window), p.attention_chunk = int(a.attention_chunk);
  p.scale = float(scale), p.softcap = float(a.softcap);
  return r;
}

std::tuple<Tensor, Tensor, Tensor> tree_attention_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_lens,
    const std::optional<Tensor>& tree_mask, std::optional<int64_t> num_tree_keys,
    std::optional<double> scale, double softcap, int64_t window, int64_t attention_chunk,
    const std::optional<Tensor>& q_depths, const std::optional<Tensor>& k_depths,
    const std::optional<Tensor>& sinks, int64_t chunk_size) {
  Prepared r = prepare({q, k, v, prefix_lens, tree_mask, num_tree_keys, scale, softcap, window,
                        attention_chunk, q_depths, k_depths, sinks, chunk_size});
  cpu::tree_attention(r.params, r.dtype);
  return {r.out, r.lse, r.chunk_lse};
}

#ifdef SPECEXTEND_HAS_CUDA
// Holds the functions of one family of kernels.
struct Family {
  decltype(&plan_tree_attention) plan;
  decltype(&launch_tree_attention) launch;
};

// Returns Hopper's own kernels where there are any for the call, else the portable ones; or those
// that were asked for.
Family choose_family([[maybe_unused]] const Prepared& r, [[maybe_unused]] int32_t device) {
  const AttentionFamily wanted = attention_family(kOp);
#ifdef SPECEXTEND_HAS_SM90A
  if (wanted != AttentionFamily::kPortable && tree_attention_sm90_serves(r.params, r.dtype) &&
      has_compute_capability(device, 9, 0)) {
    return {plan_tree_attention_sm90, launch_tree_attention_sm90};
  }
#endif
  STD_TORCH_CHECK(
      wanted != AttentionFamily::kHopper, kOp,
      ": SPECEXTEND_ATTENTION=hopper, but the Hopper kernels do not serve this call; they "
      "want a build for sm_90a, compute capability 9.0, 16-bit floats, more than 64 rows "
      "of a KV head, no softcap, keys and values of one size of at most 256, chunks of 32 if "
      "any and then of at most 192, and tensors aligned to 16 bytes");
  return {plan_tree_attention, launch_tree_attention};
}

std::tuple<Tensor, Tensor, Tensor> tree_attention_cuda(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_lens,
    const std::optional<Tensor>& tree_mask, std::optional<int64_t> num_tree_keys,
    std::optional<double> scale, double softcap, int64_t window, int64_t attention_chunk,
    const std::optional<Tensor>& q_depths, const std::optional<Tensor>& k_depths,
    const std::optional<Tensor>& sinks, int64_t chunk_size) {
  Prepared r = prepare({q, k, v, prefix_lens, tree_mask, num_tree_keys, scale, softcap, window,
                        attention_chunk, q_depths, k_depths, sinks, chunk_size});
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Family family = choose_family(r, device);
  AttentionPlan plan;
  check_launch(kOp, family.plan(r.params, r.dtype, device, &plan));
  plan.early_combine &= programmatic_launch(kOp);
  const Tensor workspace = allocate(q, {int64_t(plan.workspace_bytes)}, ScalarType::Byte);
  check_launch(kOp, family.launch(r.params, r.dtype, plan, workspace.mutable_data_ptr(),
                                  current_stream(device)));
  return {r.out, r.lse, r.chunk_lse};
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def(
      "tree_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_lens, Tensor? tree_mask=None, *, "
      "int? num_tree_keys=None, float? scale=None, float softcap=0.0, int window=0, "
      "int attention_chunk=0, Tensor? q_depths=None, Tensor? k_depths=None, Tensor? sinks=None, "
      "int chunk_size=0) "
      "-> (Tensor out, Tensor lse, Tensor chunk_lse)");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) {
  m.impl("tree_attention", TORCH_BOX(&tree_attention_cpu));
}
#ifdef SPECEXTEND_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(specextend, CUDA, m) {
  m.impl("tree_attention", TORCH_BOX(&tree_attention_cuda));
}
#endif

}  // namespace specextend
