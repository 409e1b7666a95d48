#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/cpu.h"
#include "merge.h"

namespace specextend::cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements; fewer are not worth waking a thread for

template <typename T>
void run(const MergeStatesParams& p) {
  const int64_t grain = 1 + kGrain / (p.head_dim + 1);
  torch::stable::parallel_for(0, p.num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const MergeWeights w = merge_weights(p.lse_a[row], p.lse_b[row]);
      const T* a = static_cast<const T*>(p.o_a) + row * p.head_dim;
      const T* b = static_cast<const T*>(p.o_b) + row * p.head_dim;
      T* o = static_cast<T*>(p.o) + row * p.head_dim;
      for (int d = 0; d < p.head_dim; ++d) o[d] = T(merge_values(w, float(a[d]), float(b[d])));
      p.lse[row] = w.lse;
    }
  });
}

}  // namespace

void merge_states(const MergeStatesParams& p, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return run<float>(p);
    case DType::kFloat16:
      return run<c10::Half>(p);
    case DType::kBFloat16:
      return run<c10::BFloat16>(p);
  }
}

}  // namespace specextend::cpu
