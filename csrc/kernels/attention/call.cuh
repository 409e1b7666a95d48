#pragma once

// What the attention kernels are called with, and the scratch memory of a launch.

#include <cstddef>
#include <cstdint>

#include "attention_layout.h"
#include "kernels/attention/softmax.cuh"
#include "params.h"
#include "work_partition.h"

namespace specextend {

// Holds the scratch memory of a launch. A partial is a block's result for a unit that is split
// between blocks (partial_of); the combine adds the partials of a unit up.
struct AttentionWorkspace {
  int64_t* lines;    // [B + 1]: where the units of each sequence begin on the line
  PartialSum* sums;  // [partials, rows_per_block]
  // [partials, 2, rows_per_block]: the softmax of the chunks that its begin and its end cut.
  PartialSum* edges;
  float* values;  // [partials, rows_per_block, Dv]: weighted sums of values, times 2^-max
};

// Sets `w` into the memory at `base`, which may be null, and returns the bytes that it takes.
inline size_t lay_out_workspace(const TreeAttentionParams& p, const WorkCut& cut, void* base,
                                AttentionWorkspace* w) {
  size_t bytes = 0;
  const auto take = [&](size_t size) {
    char* const at = static_cast<char*>(base) + bytes;
    bytes += (size + 15) / 16 * 16;
    return static_cast<void*>(at);
  };
  const size_t rows = size_t(cut.grid) * kPartialsPerBlock * size_t(cut.rows_per_block);
  w->lines = static_cast<int64_t*>(take((size_t(cut.batch) + 1) * sizeof(int64_t)));
  w->sums = static_cast<PartialSum*>(take(rows * sizeof(PartialSum)));
  w->edges = static_cast<PartialSum*>(take(p.chunk_lse ? 2 * rows * sizeof(PartialSum) : 0));
  w->values = static_cast<float*>(take(p.out ? rows * size_t(p.value_dim) * sizeof(float) : 0));
  return bytes;
}

// Holds the parameters of an attention kernel.
struct AttentionCall : TreeAttentionParams {
  WorkCut cut;
  AttentionWorkspace workspace;
  bool q_aligned, kv_aligned;  // 16-byte copies may take all vectors of 8 elements
  bool whole_vectors;          // these are aligned, and D and Dv are what the kernel is for
  bool latent;                 // values are the first columns of the keys, in the same memory
  // The scale of the softmax, times log2(e): it makes logits base 2. The sign of the scale and the
  // softcap are applied apart, so that it is positive; it is not 0, which would make NaN of masked
  // logits.
  float factor;
};

// Completes the parameters for a kernel of heads of `dims`, which are no smaller than D and Dv.
inline AttentionCall attention_call(const TreeAttentionParams& p, const WorkCut& cut,
                                    AttentionDims dims, void* workspace) {
  AttentionCall c{};
  static_cast<TreeAttentionParams&>(c) = p;
  c.cut = cut;
  lay_out_workspace(p, cut, workspace, &c.workspace);
  const auto aligned = [](const void* data, int64_t stride_a, int64_t stride_b, int64_t stride_c) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (stride_a | stride_b | stride_c) % 8 == 0;
  };
  c.q_aligned = aligned(p.q, p.q_stride_b, p.q_stride_m, p.q_stride_h);
  c.kv_aligned = aligned(p.k, p.k_stride_b, p.k_stride_s, p.k_stride_h) &&
                 (!p.out || aligned(p.v, p.v_stride_b, p.v_stride_s, p.v_stride_h));
  c.whole_vectors =
      c.kv_aligned && p.head_dim == dims.keys && (!p.out || p.value_dim == dims.values);
  c.latent = p.v == p.k && p.value_dim <= p.head_dim && p.v_stride_b == p.k_stride_b &&
             p.v_stride_s == p.k_stride_s && p.v_stride_h == p.k_stride_h;
  const float factor = (p.scale < 0 ? -p.scale : p.scale) * kLog2E;
  c.factor = p.softcap > 0 ? 1.f : factor > 0x1p-126f ? factor : 0x1p-126f;
  return c;
}

}  // namespace specextend
