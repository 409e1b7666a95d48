#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/cpu.h"
#include "ops/allocate.h"
#include "ops/dtype.h"

namespace specextend {
namespace {

constexpr const char* kOp = "gather_chunks";

struct Arguments {
  const std::vector<Tensor>&k_full, &v_full, &k_work, &v_work;
  const Tensor &ids, &counts, &lens;
  const std::optional<Tensor>& inv_freq;
  int64_t chunk_size;
  bool interleaved, right_aligned;
};

void check_layers(const char* name, const std::vector<Tensor>& layers, const Arguments& a,
                  const std::vector<Tensor>* like, const char* like_name) {
  STD_TORCH_CHECK(layers.size() == a.k_full.size(), kOp, ": ", name, " must hold ", a.k_full.size(),
                  " layers as k_full, got ", layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    const std::string label = std::string(name) + "[" + std::to_string(i) + "]";
    const Tensor& t = layers[i];
    check_dim(kOp, label.c_str(), t, 4, "[B, S, Hkv, D]");
    check_float(kOp, label.c_str(), t);
    check_dtype(kOp, label.c_str(), t, a.k_full[0].scalar_type());
    check_unit_last_stride(kOp, label.c_str(), t);
    check_same_device(kOp, label.c_str(), t, "k_full[0]", a.k_full[0]);
    STD_TORCH_CHECK(t.size(0) == a.ids.size(0), kOp, ": ", label, " must have ", a.ids.size(0),
                    " sequences as ids, got ", shape_string(t));
    STD_TORCH_CHECK(t.size(1) == layers[0].size(1), kOp, ": ", label, " must have ", layers[0].size(1),
                    " rows as ", name, "[0], got ", shape_string(t));
    if (like)
      STD_TORCH_CHECK(t.size(2) == (*like)[i].size(2) && t.size(3) == (*like)[i].size(3), kOp, ": ",
                      label, " must have the heads and head dimension of ", like_name, "[", i, "] ",
                      shape_string((*like)[i]), ", got ", shape_string(t));
  }
}

void check(const Arguments& a) {
  STD_TORCH_CHECK(!a.k_full.empty(), kOp, ": k_full must hold at least one layer, got none");
  check_dim(kOp, "ids", a.ids, 2, "[B, budget]");
  check_layers("k_full", a.k_full, a, nullptr, "");
  check_layers("v_full", a.v_full, a, nullptr, "");
  check_layers("k_work", a.k_work, a, &a.k_full, "k_full");
  check_layers("v_work", a.v_work, a, &a.v_full, "v_full");
  STD_TORCH_CHECK(a.v_full[0].size(1) == a.k_full[0].size(1), kOp, ": v_full[0] must have ",
                  a.k_full[0].size(1), " rows as k_full[0], got ", shape_string(a.v_full[0]));
  STD_TORCH_CHECK(a.v_work[0].size(1) == a.k_work[0].size(1), kOp, ": v_work[0] must have ",
                  a.k_work[0].size(1), " rows as k_work[0], got ", shape_string(a.v_work[0]));
  const int64_t batch = a.ids.size(0);
  check_shape(kOp, "counts", a.counts, {batch});
  check_shape(kOp, "lens", a.lens, {batch});
  const std::pair<const char*, const Tensor*> small[] = {
      {"ids", &a.ids}, {"counts", &a.counts}, {"lens", &a.lens}};
  for (const auto& [name, t] : small) {
    check_dtype(kOp, name, *t, ScalarType::Int);
    check_contiguous(kOp, name, *t);
    check_same_device(kOp, name, *t, "k_full[0]", a.k_full[0]);
  }
  check_range(kOp, "chunk_size", a.chunk_size, 1, INT32_MAX);
  if (!a.inv_freq) return;
  const Tensor& f = *a.inv_freq;
  check_dim(kOp, "inv_freq", f, 2, "[L, R / 2]");
  check_shape(kOp, "inv_freq", f, {int64_t(a.k_full.size()), f.size(1)});
  check_dtype(kOp, "inv_freq", f, ScalarType::Float);
  check_contiguous(kOp, "inv_freq", f);
  check_same_device(kOp, "inv_freq", f, "k_full[0]", a.k_full[0]);
  for (size_t i = 0; i < a.k_full.size(); ++i)
    STD_TORCH_CHECK(2 * f.size(1) <= a.k_full[i].size(3), kOp, ": inv_freq must rotate at most the ",
                    a.k_full[i].size(3), " dimensions of k_full[", i, "], got ", 2 * f.size(1));
}

RowCopy row_copy(const Tensor& from, const Tensor& to) {
  return {from.const_data_ptr(), to.mutable_data_ptr(), from.stride(0), from.stride(1),
          from.stride(2),        to.stride(0),          to.stride(1),   to.stride(2),
          int(to.size(2)),       int(to.size(3) * to.element_size())};
}

Tensor gather_chunks_cpu(std::vector<Tensor> k_full, std::vector<Tensor> v_full,
                         std::vector<Tensor> k_work, std::vector<Tensor> v_work, const Tensor& ids,
                         const Tensor& counts, const Tensor& lens,
                         const std::optional<Tensor>& inv_freq, int64_t chunk_size, bool interleaved,
                         bool right_aligned) {
  check({k_full, v_full, k_work, v_work, ids, counts, lens, inv_freq, chunk_size, interleaved,
         right_aligned});
  Tensor work_lens = allocate(ids, {ids.size(0)}, ScalarType::Int);
  GatherChunksParams p{};
  p.ids = ids.const_data_ptr<int32_t>();
  p.counts = counts.const_data_ptr<int32_t>();
  p.lens = lens.const_data_ptr<int32_t>();
  p.work_lens = work_lens.mutable_data_ptr<int32_t>();
  p.full_capacity = k_full[0].size(1), p.work_capacity = k_work[0].size(1);
  p.batch = int(ids.size(0)), p.budget = int(ids.size(1)), p.chunk_size = int(chunk_size);
  p.num_pairs = inv_freq ? int(inv_freq->size(1)) : 0;
  p.element_bytes = int(k_full[0].element_size());
  p.interleaved = interleaved, p.right_aligned = right_aligned;
  for (size_t i = 0; i < k_full.size(); ++i) {
    p.k = row_copy(k_full[i], k_work[i]);
    p.v = row_copy(v_full[i], v_work[i]);
    p.inv_freq = inv_freq ? inv_freq->const_data_ptr<float>() + i * p.num_pairs : nullptr;
    cpu::gather_chunks(p, to_dtype(k_full[0].scalar_type()));
  }
  return work_lens;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specextend, m) {
  m.def(
      "gather_chunks(Tensor[] k_full, Tensor[] v_full, Tensor(a!)[] k_work, Tensor(b!)[] v_work, "
      "Tensor ids, Tensor counts, Tensor lens, Tensor? inv_freq, *, int chunk_size, "
      "bool interleaved=False, bool right_aligned=False) -> Tensor work_lens");
}
STABLE_TORCH_LIBRARY_IMPL(specextend, CPU, m) {
  m.impl("gather_chunks", TORCH_BOX(&gather_chunks_cpu));
}

}  // namespace specextend
