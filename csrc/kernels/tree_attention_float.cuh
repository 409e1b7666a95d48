#pragma once

// Tree attention in fp32, without tensor cores: for results to compare with, not for speed.

#include <cuda_runtime.h>

#include <cstdint>

#include "attention_layout.h"
#include "kernels/attention_work.cuh"
#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"

namespace specextend {

// Rows of keys or values to shared memory, a warp per row; zeros for those that are not readable.
__device__ __forceinline__ void load_float_rows(float* to, int pitch, const float* from,
                                                int64_t stride, int dim, uint32_t readable) {
  for (int key = int(threadIdx.x / 32); key < kFloatAttentionTileKeys; key += 4) {
    for (int d = int(threadIdx.x % 32); d < dim; d += 32) {
      to[key * pitch + d] = readable >> key & 1 ? from[key * stride + d] : 0.f;
    }
  }
}

__device__ __forceinline__ void run_float_segment(const AttentionCall& c, const SegmentState& s) {
  const FloatAttentionLayout at = float_attention_layout(c.head_dim);
  float* const shared = reinterpret_cast<float*>(ptx::shared_memory() + kSegmentStateBytes);
  const int row = int(threadIdx.x / 8), part = int(threadIdx.x % 8), dim = c.head_dim;
  float* const queries = shared + at.queries;
  float* const tile_rows = shared + at.keys;
  float* const logits = shared + at.logits + row * kFloatAttentionTilePitch;
  float* const weights = shared + at.weights + row * kFloatAttentionTilePitch;
  const PackedRow packed(c, s.kv_head, s.first_packed + min(row, s.num_rows - 1));
  const RowView view(c, s.b, s.prefix, packed.row);
  const float* const q = static_cast<const float*>(c.q) + s.b * c.q_stride_b +
                         packed.row * c.q_stride_m + packed.head * c.q_stride_h;
  for (int d = part; d < dim; d += 8) queries[row * at.pitch + d] = q[d];
  const float* const k =
      static_cast<const float*>(c.k) + s.b * c.k_stride_b + s.kv_head * c.k_stride_h;
  const float* const v =
      static_cast<const float*>(c.v) + s.b * c.v_stride_b + s.kv_head * c.v_stride_h;

  // Of the row: its eight threads have the same.
  PartialSum total = no_keys();
  float out[kFloatAttentionMaxDim / 8] = {};
  for (int tile = 0; tile < s.num_tiles; ++tile) {
    const int64_t key = (s.first_tile + tile) * kFloatAttentionTileKeys;
    const uint32_t readable = readable_keys(c, s, key);
    __syncthreads();
    load_float_rows(tile_rows, at.pitch, k + key * c.k_stride_s, c.k_stride_s, dim, readable);
    __syncthreads();
    float x[kFloatAttentionTileKeys / 8], most = -INFINITY;
#pragma unroll
    for (int i = 0; i < kFloatAttentionTileKeys / 8; ++i) {
      const int j = part + 8 * i;
      float sum = 0.f;
      for (int d = 0; d < dim; ++d) {
        sum = fmaf(queries[row * at.pitch + d], tile_rows[j * at.pitch + d], sum);
      }
      sum *= c.scale;
      if (c.softcap > 0) sum = c.softcap * tanhf(sum / c.softcap);
      x[i] = view.sees(key + j) ? sum * kLog2E : -INFINITY;
      most = fmaxf(most, x[i]);
      logits[j] = x[i];
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
    }
    most = fmaxf(most, total.max);
    const float shift = most == -INFINITY ? 0.f : most;
    const float before = total.max == -INFINITY ? 0.f : exp2f(total.max - shift);
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kFloatAttentionTileKeys / 8; ++i) {
      const float weight = exp2f(x[i] - shift);
      weights[part + 8 * i] = weight;
      sum += weight;
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    total = {most, total.sum * before + sum};
    __syncthreads();
    if (c.chunk_lse) {
      emit_chunks(c, s, tile, kFloatAttentionTileKeys,
                  reinterpret_cast<PartialSum*>(shared + at.carry), [&](int r, int begin, int end) {
                    return sum_logits(shared + at.logits + r * kFloatAttentionTilePitch, begin,
                                      end);
                  });
    }
    if (!c.out) continue;
    load_float_rows(tile_rows, at.pitch, v + key * c.v_stride_s, c.v_stride_s, dim, readable);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kFloatAttentionMaxDim / 8; ++i) {
      const int d = part + 8 * i;
      if (d >= dim) break;
      float sum = out[i] * before;
      for (int j = 0; j < kFloatAttentionTileKeys; ++j) {
        sum = fmaf(weights[j], tile_rows[j * at.pitch + d], sum);
      }
      out[i] = sum;
    }
  }

  if (row >= s.num_rows) return;
  const bool whole = s.segment.opens && s.segment.closes;
  const int64_t output = packed.output(c, s.b);
  const int64_t partial = partial_of(blockIdx.x, s.segment.opens) * kFloatAttentionRows + row;
  const float scale = whole ? output_scale(c, total, packed.head) : 1.f;
  if (part == 0) {
    if (whole) c.lse[output] = natural_lse(total);
    if (!whole) c.workspace.sums[partial] = total;
  }
  float* const to =
      whole ? static_cast<float*>(c.out) + output * dim : c.workspace.values + partial * dim;
#pragma unroll
  for (int i = 0; i < kFloatAttentionMaxDim / 8; ++i) {
    if (c.out && part + 8 * i < dim) to[part + 8 * i] = out[i] * scale;
  }
}

__global__ void __launch_bounds__(kFloatAttentionThreads)
    tree_attention_float_kernel(const __grid_constant__ AttentionCall call) {
  ptx::let_successors_begin();
  SegmentState& state = *reinterpret_cast<SegmentState*>(ptx::shared_memory());
  for_each_segment(call, state, [&] { run_float_segment(call, state); });
}

}  // namespace specextend
