#pragma once

// Tree attention in fp32, without tensor cores: its results are there to compare with, not for
// speed.

#include <cuda_runtime.h>

#include <cstdint>

#include "attention_layout.h"
#include "kernels/attention/chunks.cuh"
#include "kernels/attention/masks.cuh"
#include "kernels/attention/segments.cuh"
#include "kernels/attention/softmax.cuh"
#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"
#include "work_partition.h"

namespace specextend {

// Copies rows of keys or values to shared memory, a warp per row, and writes zeros for those that
// are not readable.
template <int kTileKeys>
__device__ __forceinline__ void load_float_rows(float* to, int pitch, const float* from,
                                                int64_t stride, int dim, uint32_t readable) {
  for (int key = int(threadIdx.x / 32); key < kTileKeys; key += 4) {
    for (int d = int(threadIdx.x % 32); d < dim; d += 32) {
      to[key * pitch + d] = readable >> key & 1 ? from[key * stride + d] : 0.f;
    }
  }
}

// Computes a block's segment of a unit. Eight threads share a row; each has every eighth key of a
// tile and every eighth of the output's columns, of which there are at most kMaxColumns.
template <int kMaxColumns>
class FloatSegment {
 public:
  __device__ __forceinline__ FloatSegment(const AttentionCall& call, const SegmentState& state)
      : c_(call),
        s_(state),
        at_(float_attention_layout(max(call.head_dim, call.out ? call.value_dim : 0))),
        row_(int(threadIdx.x / 8)),
        part_(int(threadIdx.x % 8)),
        packed_(call, state.kv_head, state.first_packed + min(row_, state.num_rows - 1)),
        view_(call, state.b, state.prefix, packed_.row) {}

  // Computes the segment.
  __device__ __forceinline__ void run() {
    load_query();
    const float* const k =
        static_cast<const float*>(c_.k) + s_.b * c_.k_stride_b + s_.kv_head * c_.k_stride_h;
    const float* const v =
        static_cast<const float*>(c_.v) + s_.b * c_.v_stride_b + s_.kv_head * c_.v_stride_h;
    for (int tile = 0; tile < s_.num_tiles; ++tile) {
      const int64_t key = (s_.first_tile + tile) * kTileKeys;
      const uint32_t readable = readable_keys(c_, s_, key);
      __syncthreads();
      load_float_rows<kTileKeys>(tile_rows(), at_.pitch, k + key * c_.k_stride_s, c_.k_stride_s,
                                 c_.head_dim, readable);
      __syncthreads();
      const float rescale = weigh(key);
      __syncthreads();
      if (c_.chunk_lse) emit_chunks_of(tile);
      if (!c_.out) continue;
      load_float_rows<kTileKeys>(tile_rows(), at_.pitch, v + key * c_.v_stride_s, c_.v_stride_s,
                                 c_.value_dim, readable);
      __syncthreads();
      add_values(rescale);
    }
    store();
  }

 private:
  static constexpr int kTileKeys = float_attention_tile_keys(kMaxColumns);
  static constexpr int kOwnKeys = kTileKeys / 8;
  static constexpr int kOwnColumns = kMaxColumns / 8;

  __device__ __forceinline__ static float* shared() {
    return reinterpret_cast<float*>(ptx::shared_memory() + kSegmentStateBytes);
  }
  __device__ __forceinline__ float* query() const {
    return shared() + at_.queries + row_ * at_.pitch;
  }
  // Returns where rows of keys are, then rows of values.
  __device__ __forceinline__ float* tile_rows() const { return shared() + at_.keys; }
  __device__ __forceinline__ float* logits(int row) const {
    return shared() + at_.logits + row * at_.tile_pitch;
  }
  __device__ __forceinline__ float* weights() const {
    return shared() + at_.weights + row_ * at_.tile_pitch;
  }

  __device__ __forceinline__ void load_query() const {
    const float* const q = static_cast<const float*>(c_.q) + s_.b * c_.q_stride_b +
                           packed_.row * c_.q_stride_m + packed_.head * c_.q_stride_h;
    for (int d = part_; d < c_.head_dim; d += 8) query()[d] = q[d];
  }

  // Makes logits and weights of the keys from `key` on, and adds them to the row's softmax. Returns
  // what earlier outputs are rescaled with.
  __device__ __forceinline__ float weigh(int64_t key) {
    float x[kOwnKeys], most = -INFINITY;
#pragma unroll
    for (int i = 0; i < kOwnKeys; ++i) {
      const int j = part_ + 8 * i;
      float sum = 0.f;
      for (int d = 0; d < c_.head_dim; ++d) {
        sum = fmaf(query()[d], tile_rows()[j * at_.pitch + d], sum);
      }
      sum *= c_.scale;
      if (c_.softcap > 0) sum = c_.softcap * tanhf(sum / c_.softcap);
      x[i] = view_.sees(key + j) ? sum * kLog2E : -INFINITY;
      most = fmaxf(most, x[i]);
      logits(row_)[j] = x[i];
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
    }
    most = fmaxf(most, total_.max);
    const float shift = most == -INFINITY ? 0.f : most;
    const float rescale = total_.max == -INFINITY ? 0.f : exp2f(total_.max - shift);
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kOwnKeys; ++i) {
      const float weight = exp2f(x[i] - shift);
      weights()[part_ + 8 * i] = weight;
      sum += weight;
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    total_ = {most, total_.sum * rescale + sum};
    return rescale;
  }

  __device__ __forceinline__ void emit_chunks_of(int tile) const {
    emit_chunks(c_, s_, tile, kTileKeys, reinterpret_cast<PartialSum*>(shared() + at_.carry),
                [&](int r, int begin, int end) { return sum_logits(logits(r), begin, end); });
  }

  __device__ __forceinline__ void add_values(float rescale) {
#pragma unroll
    for (int i = 0; i < kOwnColumns; ++i) {
      const int d = part_ + 8 * i;
      if (d >= c_.value_dim) break;
      float sum = out_[i] * rescale;
      for (int j = 0; j < kTileKeys; ++j) {
        sum = fmaf(weights()[j], tile_rows()[j * at_.pitch + d], sum);
      }
      out_[i] = sum;
    }
  }

  // Writes the row of a whole unit, or of a partial for the combine.
  __device__ __forceinline__ void store() const {
    if (row_ >= s_.num_rows) return;
    const int dim = c_.value_dim;
    const bool whole = s_.segment.opens && s_.segment.closes;
    const int64_t output = packed_.output(c_, s_.b);
    const int64_t partial = partial_of(blockIdx.x, s_.segment.opens) * kFloatAttentionRows + row_;
    const float scale = whole ? output_scale(c_, total_, packed_.head) : 1.f;
    if (part_ == 0) {
      if (whole) c_.lse[output] = natural_lse(total_);
      if (!whole) c_.workspace.sums[partial] = total_;
    }
    float* const to =
        whole ? static_cast<float*>(c_.out) + output * dim : c_.workspace.values + partial * dim;
#pragma unroll
    for (int i = 0; i < kOwnColumns; ++i) {
      if (c_.out && part_ + 8 * i < dim) to[part_ + 8 * i] = out_[i] * scale;
    }
  }

  const AttentionCall& c_;
  const SegmentState& s_;
  const FloatAttentionLayout at_;
  const int row_, part_;  // the thread's row, and which of its eight threads it is
  const PackedRow packed_;
  const RowView view_;
  PartialSum total_ = no_keys();  // the row's softmax, the same in its eight threads
  float out_[kOwnColumns] = {};
};

template <int kMaxColumns>
__global__ void __launch_bounds__(kFloatAttentionThreads)
    tree_attention_float_kernel(const __grid_constant__ AttentionCall call) {
  ptx::let_successors_begin();
  SegmentState& state = *reinterpret_cast<SegmentState*>(ptx::shared_memory());
  for_each_segment(call, state, [&] { FloatSegment<kMaxColumns>(call, state).run(); });
}

}  // namespace specextend
