#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/cpu.h"
#include "ops/kv.h"
#ifdef SPECEXTEND_HAS_CUDA
#include "kv_rows.h"
#include "launch.h"
#include "stream.h"
#endif

namespace specextend {
namespace {

constexpr const char* kOp = "compact_kv";

// Checks that no memory is given twice, as where layers share keys or values are columns of keys:
// rows would move twice.
void check_distinct(const std::vector<Tensor>& caches) {
  std::vector<std::pair<const void*, size_t>> starts;
  for (size_t i = 0; i < caches.size(); ++i) {
    if (caches[i].numel() > 0) starts.emplace_back(caches[i].const_data_ptr(), i);
  }
  std::sort(starts.begin(), starts.end());
  for (size_t i = 1; i < starts.size(); ++i) {
    STD_TORCH_CHECK(starts[i - 1].first != starts[i].first, kOp, ": caches[", starts[i].second,
                    "] must not share memory with caches[", starts[i - 1].second, "]");
  }
}

void check(const std::vector<Tensor>& caches, const Tensor& prefix_lens, const Tensor& path,
           const Tensor& num_accepted) {
  STD_TORCH_CHECK(!caches.empty(), kOp,
                  ": caches must hold at least one tensor, got an empty list");
  for (size_t i = 0; i < caches.size(); ++i) {
    const std::string name = "caches[" + std::to_string(i) + "]";
    const Tensor &t = caches[i], &first = caches[0];
    check_kv(kOp, name.c_str(), t, "[B, S, Hkv, D]");
    check_shape(kOp, name.c_str(), t, {first.size(0), first.size(1), t.size(2), t.size(3)});
    check_not_expanded(kOp, name.c_str(), t);
    check_same_device(kOp, name.c_str(), t, "caches[0]", first);
  }
  check_distinct(caches);
  const int64_t batch = caches[0].size(0);
  check_dim(kOp, "path", path, 2, "[B, N]");
  check_range(kOp, "the length of the path N", path.size(1), 0, INT32_MAX);
  check_ints(kOp, "path", path, {batch, path.size(1)}, "caches[0]", caches[0]);
  check_ints(kOp, "prefix_lens", prefix_lens, {batch}, "caches[0]", caches[0]);
  check_ints(kOp, "num_accepted", num_accepted, {batch}, "caches[0]", caches[0]);
}

bool is_alike(const CompactKvParams& a, const CompactKvParams& b) {
  return a.stride_b == b.stride_b && a.stride_s == b.stride_s && a.stride_h == b.stride_h &&
         a.row_bytes == b.row_bytes && a.num_kv_heads == b.num_kv_heads;
}

// One launch serves all caches of one shape with the same strides: those of most models.
std::vector<CompactKvParams> group(const std::vector<Tensor>& caches, const Tensor& prefix_lens,
                                   const Tensor& path, const Tensor& num_accepted) {
  std::vector<CompactKvParams> groups;
  for (const Tensor& t : caches) {
    const KvRows rows = kv_rows(t);
    CompactKvParams p{{},
                      prefix_lens.const_data_ptr<int32_t>(),
                      path.const_data_ptr<int32_t>(),
                      num_accepted.const_data_ptr<int32_t>(),
                      rows.stride_b,
                      rows.stride_s,
                      rows.stride_h,
                      kv_row_bytes(t),
                      t.size(1),
                      0,
                      int(t.size(0)),
                      int(path.size(1)),
                      int(t.size(2))};
    if (p.stride_h == p.row_bytes) {  // heads that lie side by side move as one
      p.row_bytes *= p.num_kv_heads;
      p.num_kv_heads = 1;
    }
    if (p.num_kv_heads == 1) p.stride_h = 0;
    auto g = std::find_if(groups.begin(), groups.end(), [&p](const CompactKvParams& other) {
      return other.num_caches < kMaxCaches && is_alike(p, other);
    });
    if (g == groups.end()) g = groups.insert(groups.end(), p);
    g->caches[g->num_caches++] = rows.data;
  }
  return groups;
}

void compact_kv_cpu(const std::vector<Tensor>& caches, const Tensor& prefix_lens,
                    const Tensor& path, const Tensor& num_accepted) {
  check(caches, prefix_lens, path, num_accepted);
  for (const CompactKvParams& p : group(caches, prefix_lens, path, num_accepted)) {
    cpu::compact_kv(p);
  }
}

#ifdef SPECEXTEND_HAS_CUDA
cudaError_t launch(const CompactKvParams& p, [[maybe_unused]] int32_t device, cudaStream_t stream) {
#ifdef SPECEXTEND_HAS_SM90A
  if (compact_alignment(p) == 16 && has_compute_capability(device, 9, 0)) {
    return launch_compact_kv_sm90(p, stream);
  }
#endif
  return launch_compact_kv(p, stream);
}

void compact_kv_cuda(const std::vector<Tensor>& caches, const Tensor& prefix_lens,
                     const Tensor& path, const Tensor& num_accepted) {
  check(caches, prefix_lens, path, num_accepted);
  const int32_t device = caches[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  for (const CompactKvParams& p : group(caches, prefix_lens, path, num_accepted)) {
    check_launch(kOp, launch(p, device, stream));
  }
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def(
      "compact_kv(Tensor(a!)[] caches, Tensor prefix_lens, Tensor path, Tensor num_accepted) -> "
      "()");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) { m.impl("compact_kv", TORCH_BOX(&compact_kv_cpu)); }
#ifdef SPECEXTEND_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(specextend, CUDA, m) {
  m.impl("compact_kv", TORCH_BOX(&compact_kv_cuda));
}
#endif

}  // namespace specextend
