#pragma once

// Masks and softcap of the portable kernel, for tiles that touch the tree, the end or a window.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention/masks.cuh"
#include "kernels/attention/portable/shape.cuh"
#include "kernels/attention/softmax.cuh"

namespace specextend {

// Applies the softcap to the logits of 16 keys from `key` on, and makes those -inf that a row does
// not see.
template <typename Shape>
__device__ __forceinline__ void cap_and_mask(const PortableThread<Shape>& at,
                                             typename Shape::Logits& logits, int64_t key) {
  const AttentionCall& p = at.p;
  // Each of the thread's rows has four bits, for its keys. They are made row by row, as what a mask
  // needs would take too many registers for all rows at once.
  uint32_t seen = 0;
#pragma unroll 1
  for (int i = 0; i < 2 * Shape::kRowTiles; ++i) {
    const PackedRow packed(p, at.s.kv_head, at.s.first_packed + at.own_row(i / 2, i % 2));
    const RowView view(p, at.s.b, at.s.prefix, packed.row);
#pragma unroll 1
    for (int j = 0; j < 4; ++j) {
      const bool sees = view.sees(key + j / 2 * 8 + at.lane % 4 * 2 + j % 2);
      seen |= uint32_t(sees) << (4 * i + j);
    }
  }
  const float inner = fabsf(p.scale) / p.softcap, outer = p.softcap * kLog2E;
#pragma unroll
  for (int i = 0; i < Shape::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& x = logits[i][j / 2][2 * half + j % 2];
        if (p.softcap > 0) x = outer * tanhf(x * inner);
        if (!(seen >> (8 * i + 4 * half + j) & 1)) x = -INFINITY;
      }
    }
  }
}

}  // namespace specextend
