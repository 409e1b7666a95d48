#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/isa.h"
#include "cpu/kv_copy.h"
#include "kv_rows.h"

namespace specextend::cpu {
namespace {

// Holds cosines and sines for one distance and one set of frequencies. A chunk needs one table for
// all its rows and heads; neighbouring chunks, and layers of the same frequencies, need the same
// again.
class RotationTable {
 public:
  explicit RotationTable(int pairs) : cos_(size_t(pairs)), sin_(size_t(pairs)) {}

  void prepare(int64_t shift, const float* inv_freq) {
    if (inv_freq_ != nullptr && shift == shift_ &&
        (inv_freq == inv_freq_ ||
         std::memcmp(inv_freq, inv_freq_, cos_.size() * sizeof(float)) == 0)) {
      return;
    }
    for (size_t i = 0; i < cos_.size(); ++i) {
      const Rotation r = rotation(shift, inv_freq[i]);
      cos_[i] = r.cos;
      sin_[i] = r.sin;
    }
    shift_ = shift;
    inv_freq_ = inv_freq;
  }

  const float* cos() const { return cos_.data(); }
  const float* sin() const { return sin_.data(); }

 private:
  std::vector<float> cos_, sin_;
  int64_t shift_ = 0;
  const float* inv_freq_ = nullptr;
};

class Gather {
 public:
  Gather(const GatherChunksParams& p, DType dtype) : p_(p) {
    const RotateKernels& kernels = isa().rotate[int(dtype)];
    rotate_ = p.interleaved ? kernels.neighbours : kernels.halves;
    rotary_bytes_ = int64_t(p.rotary_dim) * (dtype == DType::kFloat32 ? 4 : 2);
  }

  // Gathers one slot of one layer of one sequence.
  void run(int b, int slot, const GatherLayer& layer, RotationTable& table) const {
    const int64_t rows = gather_rows(p_, b, slot);
    if (rows == 0) return;
    const int64_t from = int64_t(p_.ids[int64_t(b) * p_.budget + slot]) * p_.chunk_size;
    const int64_t to = int64_t(slot) * p_.chunk_size, shift = gather_shift(p_, b, slot);
    copy_rows(layer.work[1], to, layer.full[1], from, b, rows, layer.num_kv_heads[1],
              layer.row_bytes[1]);
    if (p_.rotary_dim == 0 || shift == 0) {
      copy_rows(layer.work[0], to, layer.full[0], from, b, rows, layer.num_kv_heads[0],
                layer.row_bytes[0]);
      return;
    }
    table.prepare(shift, layer.inv_freq);
    const int64_t rest = layer.row_bytes[0] - rotary_bytes_;
    for (int64_t row = 0; row < rows; ++row) {
      for (int h = 0; h < layer.num_kv_heads[0]; ++h) {
        const char* source = kv_row(layer.full[0], b, from + row, h);
        char* target = kv_row(layer.work[0], b, to + row, h);
        rotate_(source, target, table.cos(), table.sin(), p_.rotary_dim / 2);
        if (rest > 0) std::memcpy(target + rotary_bytes_, source + rotary_bytes_, size_t(rest));
      }
    }
  }

 private:
  const GatherChunksParams& p_;
  RotateKernel rotate_;
  int64_t rotary_bytes_;
};

}  // namespace

void gather_chunks(const GatherChunksParams& p, DType dtype) {
  for (int b = 0; b < p.batch; ++b) p.work_lens[b] = int32_t(gather_length(p, b));
  const Gather gather(p, dtype);
  int64_t bytes = 0;  // of a row of all layers
  for (int i = 0; i < p.num_layers; ++i) {
    const GatherLayer& layer = p.layers[i];
    bytes +=
        layer.num_kv_heads[0] * layer.row_bytes[0] + layer.num_kv_heads[1] * layer.row_bytes[1];
  }
  const int64_t chunk_bytes = std::min(int64_t(p.chunk_size), p.capacity) * bytes / p.num_layers;
  const int64_t grain = 1 + kCopyGrainBytes / std::max<int64_t>(1, chunk_bytes);
  const int64_t items = int64_t(p.batch) * p.budget * p.num_layers;
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    RotationTable table(p.rotary_dim / 2);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = i / p.num_layers;
      const int b = int(chunk / p.budget), slot = int(chunk % p.budget);
      if (slot < gather_count(p, b)) gather.run(b, slot, p.layers[i % p.num_layers], table);
    }
  });
}

}  // namespace specextend::cpu
