#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/cpu.h"
#include "ops/allocate.h"
#include "ops/dtype.h"
#include "ops/kv.h"
#ifdef SPECEXTEND_HAS_CUDA
#include "launch.h"
#include "stream.h"
#endif

namespace specextend {
namespace {

constexpr const char* kOp = "gather_chunks";

using Tensors = std::vector<Tensor>;

// Returns the layers of k_full, which the other lists are compared with, or of another list.
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
    check_row_size(kOp, label.c_str(), t);
    check_shape(kOp, label.c_str(), t,
                {k_full[0].size(0), layers[0].size(1), t.size(2), t.size(3)});
    check_same_device(kOp, label.c_str(), t, "k_full[0]", k_full[0]);
  }
}

// Checks that the working caches have the heads of the full ones and memory of their own.
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
  check_range(kOp, "the rotated pairs R / 2", inv_freq->size(1), 0, kMaxRotatedPairs);
  for (size_t i = 0; i < k_full.size(); ++i) {
    STD_TORCH_CHECK(2 * inv_freq->size(1) <= k_full[i].size(3), kOp,
                    ": inv_freq [L, R / 2] must rotate at most the D = ", k_full[i].size(3),
                    " dimensions of k_full[", i, "], got R = ", 2 * inv_freq->size(1));
  }
}

struct Arguments {
  const Tensors &k_full, &v_full, &k_work, &v_work;
  const Tensor &ids, &counts, &lens;
  const std::optional<Tensor>& inv_freq;
  int64_t chunk_size;
  bool interleaved, right_aligned;
};

struct Prepared {
  Tensor work_lens;
  std::vector<GatherLayer> layers;
  GatherChunksParams params;  // points to the layers
  DType dtype;
};

// Does everything that does not depend on the device: checks, allocation, parameters.
Prepared prepare(const Arguments& a) {
  check(a.k_full, a.v_full, a.k_work, a.v_work, a.ids, a.counts, a.lens, a.inv_freq, a.chunk_size);
  const int64_t pairs = a.inv_freq ? a.inv_freq->size(1) : 0;
  Prepared r{allocate(a.ids, {a.ids.size(0)}, ScalarType::Int),
             {},
             {},
             to_dtype(a.k_full[0].scalar_type())};
  r.layers.reserve(a.k_full.size());
  for (size_t i = 0; i < a.k_full.size(); ++i) {
    const Tensor &k = a.k_full[i], &v = a.v_full[i];
    r.layers.push_back(
        {{kv_rows(k), kv_rows(v)},
         {kv_rows(a.k_work[i]), kv_rows(a.v_work[i])},
         {kv_row_bytes(k), kv_row_bytes(v)},
         {int(k.size(2)), int(v.size(2))},
         pairs ? a.inv_freq->const_data_ptr<float>() + int64_t(i) * pairs : nullptr});
  }
  r.params = {r.layers.data(),
              a.ids.const_data_ptr<int32_t>(),
              a.counts.const_data_ptr<int32_t>(),
              a.lens.const_data_ptr<int32_t>(),
              r.work_lens.mutable_data_ptr<int32_t>(),
              a.k_full[0].size(1),
              a.k_work[0].size(1),
              int(r.layers.size()),
              int(a.ids.size(0)),
              int(a.ids.size(1)),
              int(a.chunk_size),
              int(2 * pairs),
              a.interleaved,
              a.right_aligned};
  return r;
}

Tensor gather_chunks_cpu(const Tensors& k_full, const Tensors& v_full, const Tensors& k_work,
                         const Tensors& v_work, const Tensor& ids, const Tensor& counts,
                         const Tensor& lens, const std::optional<Tensor>& inv_freq,
                         int64_t chunk_size, bool interleaved, bool right_aligned) {
  Prepared r = prepare({k_full, v_full, k_work, v_work, ids, counts, lens, inv_freq, chunk_size,
                        interleaved, right_aligned});
  cpu::gather_chunks(r.params, r.dtype);
  return r.work_lens;
}

#ifdef SPECEXTEND_HAS_CUDA
Tensor gather_chunks_cuda(const Tensors& k_full, const Tensors& v_full, const Tensors& k_work,
                          const Tensors& v_work, const Tensor& ids, const Tensor& counts,
                          const Tensor& lens, const std::optional<Tensor>& inv_freq,
                          int64_t chunk_size, bool interleaved, bool right_aligned) {
  Prepared r = prepare({k_full, v_full, k_work, v_work, ids, counts, lens, inv_freq, chunk_size,
                        interleaved, right_aligned});
  const int32_t device = ids.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  check_launch(kOp, by_device_type(r.dtype, [&](auto x) {
                 return launch_gather_chunks<decltype(x)>(r.params, stream);
               }));
  return r.work_lens;
}
#endif

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
#ifdef SPECEXTEND_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(specextend, CUDA, m) {
  m.impl("gather_chunks", TORCH_BOX(&gather_chunks_cuda));
}
#endif

}  // namespace specextend
