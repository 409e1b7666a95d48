#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/cpu.h"
#include "ops/allocate.h"
#include "ops/dtype.h"
#include "ops/kv.h"

namespace specextend {
namespace {

constexpr const char* kOp = "gather_chunks";

using Tensors = std::vector<Tensor>;

// Layers of k_full, which the other lists are compared with, or of another list.
void check_layers(const char* name, const Tensors& layers, const Tensors& k_full,
                  const char* letters) {
  STD_TORCH_CHECK(layers.size() == k_full.size(), kOp, ": ", name,
                  " must have one tensor per layer ", "as k_full has (", k_full.size(), "), got ",
                  layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    const std::string label = name + ("[" + std::to_string(i) + "]");
    const Tensor& t = layers[i];
    check_kv(kOp, label.c_str(), t, letters);
    check_float(kOp, label.c_str(), t);
    check_dtype(kOp, label.c_str(), t, k_full[0].scalar_type());
    check_shape(kOp, label.c_str(), t,
                {k_full[0].size(0), layers[0].size(1), t.size(2), t.size(3)});
    check_same_device(kOp, label.c_str(), t, "k_full[0]", k_full[0]);
  }
}

// The working caches have the heads of the full ones and memory of their own.
void check_work(const char* name, const Tensors& work, const Tensors& full) {
  for (size_t i = 0; i < work.size(); ++i) {
    const std::string label = name + ("[" + std::to_string(i) + "]");
    const Tensor &w = work[i], &f = full[i];
    check_shape(kOp, label.c_str(), w, {w.size(0), w.size(1), f.size(2), f.size(3)});
    check_not_expanded(kOp, label.c_str(), w);
    STD_TORCH_CHECK(w.numel() == 0 || w.const_data_ptr() != f.const_data_ptr(), kOp, ": ", label,
                    " must not share memory with the full cache");
  }
}

void check(const Tensors& k_full, const Tensors& v_full, const Tensors& k_work,
           const Tensors& v_work, const Tensor& ids, const Tensor& counts, const Tensor& lens,
           const std::optional<Tensor>& inv_freq, int64_t chunk_size) {
  STD_TORCH_CHECK(!k_full.empty(), kOp, ": k_full must hold at least one layer, got an empty list");
  check_layers("k_full", k_full, k_full, "[B, S, Hkv, D]");
  check_layers("v_full", v_full, k_full, "[B, S, Hkv, D]");
  check_layers("k_work", k_work, k_full, "[B, Sw, Hkv, D]");
  check_layers("v_work", v_work, k_full, "[B, Sw, Hkv, D]");
  check_work("k_work", k_work, k_full);
  check_work("v_work", v_work, v_full);
  const Tensor &k = k_full[0], &v = v_full[0];
  check_shape(kOp, "v_full[0]", v, {k.size(0), k.size(1), v.size(2), v.size(3)});
  check_shape(kOp, "v_work[0]", v_work[0], {k.size(0), k_work[0].size(1), v.size(2), v.size(3)});
  check_dim(kOp, "ids", ids, 2, "[B, budget]");
  check_range(kOp, "the budget", ids.size(1), 0, INT32_MAX);
  check_ints(kOp, "ids", ids, {k.size(0), ids.size(1)}, "k_full[0]", k);
  check_ints(kOp, "counts", counts, {k.size(0)}, "k_full[0]", k);
  check_ints(kOp, "lens", lens, {k.size(0)}, "k_full[0]", k);
  check_range(kOp, "chunk_size", chunk_size, 1, INT32_MAX);
  if (!inv_freq) return;
  check_dim(kOp, "inv_freq", *inv_freq, 2, "[L, R / 2]");
  check_shape(kOp, "inv_freq", *inv_freq, {int64_t(k_full.size()), inv_freq->size(1)});
  check_dtype(kOp, "inv_freq", *inv_freq, ScalarType::Float);
  check_contiguous(kOp, "inv_freq", *inv_freq);
  check_same_device(kOp, "inv_freq", *inv_freq, "k_full[0]", k);
  for (size_t i = 0; i < k_full.size(); ++i) {
    STD_TORCH_CHECK(2 * inv_freq->size(1) <= k_full[i].size(3), kOp,
                    ": inv_freq [L, R / 2] must rotate at most the D = ", k_full[i].size(3),
                    " dimensions of k_full[", i, "], got R = ", 2 * inv_freq->size(1));
  }
}

Tensor gather_chunks_cpu(const Tensors& k_full, const Tensors& v_full, const Tensors& k_work,
                         const Tensors& v_work, const Tensor& ids, const Tensor& counts,
                         const Tensor& lens, const std::optional<Tensor>& inv_freq,
                         int64_t chunk_size, bool interleaved, bool right_aligned) {
  check(k_full, v_full, k_work, v_work, ids, counts, lens, inv_freq, chunk_size);
  const int64_t pairs = inv_freq ? inv_freq->size(1) : 0;
  std::vector<GatherLayer> layers;
  layers.reserve(k_full.size());
  for (size_t i = 0; i < k_full.size(); ++i) {
    layers.push_back({{kv_rows(k_full[i]), kv_rows(v_full[i])},
                      {kv_rows(k_work[i]), kv_rows(v_work[i])},
                      {kv_row_bytes(k_full[i]), kv_row_bytes(v_full[i])},
                      {int(k_full[i].size(2)), int(v_full[i].size(2))},
                      pairs ? inv_freq->const_data_ptr<float>() + int64_t(i) * pairs : nullptr});
  }
  Tensor work_lens = allocate(ids, {ids.size(0)}, ScalarType::Int);
  const GatherChunksParams p{layers.data(),
                             ids.const_data_ptr<int32_t>(),
                             counts.const_data_ptr<int32_t>(),
                             lens.const_data_ptr<int32_t>(),
                             work_lens.mutable_data_ptr<int32_t>(),
                             k_full[0].size(1),
                             k_work[0].size(1),
                             int(layers.size()),
                             int(ids.size(0)),
                             int(ids.size(1)),
                             int(chunk_size),
                             int(2 * pairs),
                             interleaved,
                             right_aligned};
  cpu::gather_chunks(p, to_dtype(k_full[0].scalar_type()));
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
