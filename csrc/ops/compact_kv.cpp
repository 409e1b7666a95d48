#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/cpu.h"
#include "ops/kv.h"

namespace specextend {
namespace {

constexpr const char* kOp = "compact_kv";

void check(const std::vector<Tensor>& caches, const Tensor& prefix_lens, const Tensor& path,
           const Tensor& num_accepted) {
  STD_TORCH_CHECK(!caches.empty(), kOp, ": caches must hold at least one tensor, got an empty list");
  for (size_t i = 0; i < caches.size(); ++i) {
    const std::string name = "caches[" + std::to_string(i) + "]";
    const Tensor& t = caches[i];
    check_kv(kOp, name.c_str(), t);
    check_shape(kOp, name.c_str(), t,
                {caches[0].size(0), caches[0].size(1), t.size(2), t.size(3)});
    check_not_expanded(kOp, name.c_str(), t);
    check_same_device(kOp, name.c_str(), t, "caches[0]", caches[0]);
  }
  const int64_t batch = caches[0].size(0);
  check_dim(kOp, "path", path, 2, "[B, N]");
  check_shape(kOp, "path", path, {batch, path.size(1)});
  check_range(kOp, "the length of the path N", path.size(1), 0, INT32_MAX);
  check_dtype(kOp, "path", path, ScalarType::Int);
  check_contiguous(kOp, "path", path);
  check_lens(kOp, "prefix_lens", prefix_lens, batch);
  check_lens(kOp, "num_accepted", num_accepted, batch);
  check_same_device(kOp, "path", path, "caches[0]", caches[0]);
  check_same_device(kOp, "prefix_lens", prefix_lens, "caches[0]", caches[0]);
  check_same_device(kOp, "num_accepted", num_accepted, "caches[0]", caches[0]);
}

// One launch serves all caches of one shape and one set of strides; models have one or two of those.
std::vector<CompactKvParams> group(const std::vector<Tensor>& caches, const Tensor& prefix_lens,
                                   const Tensor& path, const Tensor& num_accepted) {
  std::vector<CompactKvParams> groups;
  for (const Tensor& t : caches) {
    KvRows rows = kv_rows(t);
    int64_t heads = t.size(2), row_bytes = kv_row_bytes(t);
    if (rows.stride_h == row_bytes) {  // heads side by side move as one
      row_bytes *= heads;
      heads = 1;
      rows.stride_h = 0;
    }
    auto fits = [&](const CompactKvParams& g) {
      return g.num_caches < kMaxCaches && g.stride_b == rows.stride_b &&
             g.stride_s == rows.stride_s && g.stride_h == rows.stride_h &&
             g.row_bytes == row_bytes && g.num_kv_heads == heads;
    };
    auto g = std::find_if(groups.begin(), groups.end(), fits);
    if (g == groups.end()) {
      groups.push_back({{},
                        prefix_lens.const_data_ptr<int32_t>(),
                        path.const_data_ptr<int32_t>(),
                        num_accepted.const_data_ptr<int32_t>(),
                        rows.stride_b,
                        rows.stride_s,
                        rows.stride_h,
                        row_bytes,
                        t.size(1),
                        0,
                        int(t.size(0)),
                        int(path.size(1)),
                        int(heads)});
      g = groups.end() - 1;
    }
    g->caches[g->num_caches++] = rows.data;
  }
  return groups;
}

void compact_kv_cpu(std::vector<Tensor> caches, const Tensor& prefix_lens, const Tensor& path,
                    const Tensor& num_accepted) {
  check(caches, prefix_lens, path, num_accepted);
  for (const CompactKvParams& p : group(caches, prefix_lens, path, num_accepted)) {
    cpu::compact_kv(p);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def(
      "compact_kv(Tensor(a!)[] caches, Tensor prefix_lens, Tensor path, Tensor num_accepted) -> "
      "()");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) { m.impl("compact_kv", TORCH_BOX(&compact_kv_cpu)); }

}  // namespace specextend
