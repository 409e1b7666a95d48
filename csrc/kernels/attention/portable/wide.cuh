#pragma once

// Tree attention on tensor cores for wide heads, which are larger than 256, for fp16 and bf16 on
// every GPU from sm_80 on.
//
// A warp's registers do not hold the queries and the outputs of its own rows. So four warps share
// 16 rows and divide dimensions: each multiplies queries and keys over a quarter of D, and weights
// and values for a quarter of Dv. The sums over the quarters meet in shared memory. There the eight
// threads of each row add them up, mask them, and make weights, which all four warps read. A block
// has 16 or 32 rows and takes 16 keys at a time through the ring of portable/tiles.cuh. Values that
// are columns of the keys (latent attention) are read where these lie.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "attention_layout.h"
#include "kernels/attention/chunks.cuh"
#include "kernels/attention/launch.cuh"
#include "kernels/attention/masks.cuh"
#include "kernels/attention/pack.cuh"
#include "kernels/attention/portable/shape.cuh"
#include "kernels/attention/portable/softmax.cuh"
#include "kernels/attention/portable/tiles.cuh"
#include "kernels/attention/segments.cuh"
#include "kernels/attention/softmax.cuh"
#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"
#include "work_partition.h"

namespace specextend {

// Gives the sizes of a block for heads up to kDim and kValueDim.
template <int kDimensions, int kValueDimensions, int kBlockRows>
struct WideShape {
  static constexpr int kDim = kDimensions, kValueDim = kValueDimensions, kRows = kBlockRows;
  static constexpr AttentionDims kDims{kDim, kValueDim};
  static constexpr bool kChunks = true, kLatent = true;  // the call says what of these it is
  static constexpr int kThreads = wide_threads(kRows), kGroupThreads = kThreads;
  static constexpr int kRowWarps = kThreads / 32, kKeyGroups = 1;  // all warps take the same keys
  static constexpr int kRowTiles = 1;                              // a warp's
  static constexpr int kTileKeys = attention_tile_keys(kDims, kRows);
  static constexpr WideLayout kAt = wide_layout(kDims, kRows);
  static_assert(kDim % 64 == 0 && kValueDim % 256 == 0 && kTileKeys == 16 && kAt.ahead >= 1);
};

template <typename T, typename Shape>
class WideBlock {
 public:
  __device__ __forceinline__ WideBlock(const AttentionCall& call, const SegmentState& state)
      : at_(call, state), tiles_(at_) {}

  // Computes the block's segment of a unit.
  __device__ __forceinline__ void run() {
    // As in portable/kernel.cuh, the first turns only ask.
    constexpr int kAhead = Shape::kAt.ahead;
    const bool copies_values = at_.copies_values(), has_chunks = at_.p.chunk_lse != nullptr;
    tiles_.request_queries();
    clear();
#pragma unroll 1
    for (int tile = copies_values ? -(kAhead + 1) / 2 : -kAhead; tile < at_.s.num_tiles; ++tile) {
      if (tile == 0) take_queries();
      tiles_.await_half();
      tiles_.request_half(tiles_.first_half(tile) + kAhead);
      if (tile >= 0) {
        multiply_keys(tile);
        __syncthreads();
        weigh(tile, has_chunks);
      }
      if (copies_values) {
        tiles_.await_half();
      } else {
        __syncthreads();
      }
      if (has_chunks && tile >= 0) emit_chunks_of(tile);
      if (at_.has_values() && tile >= 0) multiply_values(tile);
      if (copies_values) tiles_.request_half(tiles_.first_half(tile) + kAhead + 1);
    }
    finish();
  }

 private:
  using Tiles = PortableTiles<T, Shape>;
  using Keys = typename Tiles::Keys;
  using Values = typename Tiles::Values;
  static constexpr WideLayout kAt = Shape::kAt;
  static constexpr int kRows = Shape::kRows;
  static constexpr int kSteps = Shape::kDim / 64;        // a warp's products of 16 dimensions
  static constexpr int kColumns = Shape::kValueDim / 4;  // a warp has so many of the outputs'
  static constexpr int kOwnKeys = Shape::kTileKeys / kWideRowThreads;  // of a thread, in its row
  static_assert(Keys::kSwizzle == 8 && Values::kSwizzle == 8);
  static_assert(Shape::kValueDim <= Shape::kDim, "values may lie among the columns of the keys");

  struct alignas(4 * kOwnKeys) Logits {
    float x[kOwnKeys];
  };

  // Return the first of the warp's 16 rows, and which quarter of the dimensions it has.
  __device__ __forceinline__ static int warp_row() { return int(threadIdx.x / 128) * 16; }
  __device__ __forceinline__ static int quarter() { return int(threadIdx.x / 32 % 4); }
  // Returns one of the two rows whose outputs the thread has.
  __device__ __forceinline__ int output_row(int half) const {
    return warp_row() + 8 * half + at_.lane / 4;
  }
  // Return the row whose weights the thread makes, and its first key of a tile.
  __device__ __forceinline__ static int own_row() { return int(threadIdx.x) / kWideRowThreads; }
  __device__ __forceinline__ static int first_own_key() {
    return int(threadIdx.x) % kWideRowThreads * kOwnKeys;
  }

  // Returns where a row's sums over a quarter of the dimensions are.
  __device__ __forceinline__ static float* sums(int quarter, int row) {
    return reinterpret_cast<float*>(ptx::shared_memory() + kAt.sums) +
           (quarter * kRows + row) * Shape::kTileKeys;
  }
  __device__ __forceinline__ static float* logits(int row) {
    return reinterpret_cast<float*>(ptx::shared_memory() + kAt.logits) + row * kAt.logits_pitch;
  }
  __device__ __forceinline__ static unsigned char* weights(int row) {
    return ptx::shared_memory() + kAt.weights + row * kAt.weights_pitch * 2;
  }
  // Returns what the row's outputs are multiplied with.
  __device__ __forceinline__ static float& rescale(int row) {
    return reinterpret_cast<float*>(ptx::shared_memory() + kAt.rescale)[row];
  }
  // Returns where a lane reads the warp's dimensions of step `d` in a row of queries or keys: the
  // quarters take turns, 16 dimensions each. `exchange` is the swizzle, and which half of the 16.
  __device__ __forceinline__ static int step_offset(int row, int d, int exchange) {
    return Keys::offset(row) + d * 128 + (quarter() * 32 ^ exchange);
  }

  __device__ __forceinline__ void clear() {
    limit_ = -INFINITY;
    sum_ = 0.f;
#pragma unroll
    for (int d = 0; d < kColumns / 8; ++d) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out_[d][j] = 0.f;
    }
  }

  // Takes the warp's dimensions of its queries into registers.
  __device__ __forceinline__ void take_queries() {
    ptx::cp_async_wait<kAt.ahead>();
    __syncthreads();
    const unsigned char* from = tiles_.ring() + kAt.ahead * kAt.half;
    const int row = warp_row() + at_.lane % 16;
    const int exchange = at_.lane / 16 * 16 ^ Keys::swizzle(row);
#pragma unroll
    for (int d = 0; d < kSteps; ++d) ptx::ldmatrix_x4(q_[d], from + step_offset(row, d, exchange));
    __syncthreads();
  }

  // Multiplies the warp's queries and the keys of a tile, over its dimensions.
  __device__ __forceinline__ void multiply_keys(int tile) const {
    const unsigned char* keys = tiles_.slot(tiles_.first_half(tile));
    const int row = at_.lane % 8 + at_.lane / 16 * 8;
    const int exchange = at_.lane / 8 % 2 * 16 ^ Keys::swizzle(row);
    float sum[2][4] = {};
#pragma unroll
    for (int d = 0; d < kSteps; ++d) {
      uint32_t k[4];
      ptx::ldmatrix_x4(k, keys + step_offset(row, d, exchange));
      ptx::mma_m16n8k16<T>(sum[0], q_[d], k[0], k[1]);
      ptx::mma_m16n8k16<T>(sum[1], q_[d], k[2], k[3]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* const to = sums(quarter(), output_row(half)) + at_.lane % 4 * 2;
      *reinterpret_cast<float2*>(to) = make_float2(sum[0][2 * half], sum[0][2 * half + 1]);
      *reinterpret_cast<float2*>(to + 8) = make_float2(sum[1][2 * half], sum[1][2 * half + 1]);
    }
  }

  // Returns the thread's logits of a tile, in base 2: the sums over all quarters, capped and
  // masked.
  __device__ __forceinline__ Logits own_logits(int tile) const {
    const AttentionCall& p = at_.p;
    Logits own{};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Logits part = *reinterpret_cast<const Logits*>(sums(i, own_row()) + first_own_key());
#pragma unroll
      for (int j = 0; j < kOwnKeys; ++j) own.x[j] += part.x[j];
    }
#pragma unroll
    for (int j = 0; j < kOwnKeys; ++j) {
      own.x[j] *= p.scale;
      if (p.softcap > 0) own.x[j] = p.softcap * tanhf(own.x[j] / p.softcap);
      own.x[j] *= kLog2E;
    }
    const int64_t key = at_.first_key(tile);
    if (key < at_.s.all_see_from || key + Shape::kTileKeys > at_.s.prefix) {
      const PackedRow packed(p, at_.s.kv_head, at_.s.first_packed + own_row());
      const RowView view(p, at_.s.b, at_.s.prefix, packed.row);
#pragma unroll
      for (int j = 0; j < kOwnKeys; ++j) {
        if (!view.sees(key + first_own_key() + j)) own.x[j] = -INFINITY;
      }
    }
    return own;
  }

  // Makes weights of a tile's logits, 2^(logit - shift), and says what earlier outputs are rescaled
  // with. A row's reference follows as in portable/softmax.cuh.
  __device__ __forceinline__ void weigh(int tile, bool has_chunks) {
    const Logits own = own_logits(tile);
    float top = -INFINITY;
#pragma unroll
    for (int j = 0; j < kOwnKeys; ++j) {
      if (has_chunks) logits(own_row())[first_own_key() + j] = own.x[j];
      top = fmaxf(top, own.x[j]);
    }
#pragma unroll
    for (int step = 1; step < kWideRowThreads; step *= 2) {
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
    }
    float scale = 1.f;
    if (top > limit_) {
      const float before = limit_;
      limit_ = top + kAttentionSlack;
      if (before > -INFINITY) scale = ptx::exp2_approx(before - limit_);
      sum_ *= scale;
    }
    if (first_own_key() == 0) rescale(own_row()) = scale;
    uint32_t* const to = reinterpret_cast<uint32_t*>(weights(own_row())) + first_own_key() / 2;
#pragma unroll
    for (int j = 0; j < kOwnKeys; j += 2) {
      const float a = ptx::exp2_approx(own.x[j] - shift());
      const float b = ptx::exp2_approx(own.x[j + 1] - shift());
      sum_ += a + b;
      to[j / 2] = pack(T{}, a, b);
    }
  }

  // Returns the reference of the thread's own row: what exponents are relative to.
  __device__ __forceinline__ float shift() const {
    return limit_ == -INFINITY ? 0.f : limit_ - kAttentionSlack;
  }

  __device__ __forceinline__ void emit_chunks_of(int tile) const {
    emit_chunks(at_.p, at_.s, tile, Shape::kTileKeys,
                reinterpret_cast<PartialSum*>(ptx::shared_memory() + kAt.carry),
                [](int row, int begin, int end) { return sum_logits(logits(row), begin, end); });
  }

  // Adds the values of a tile to the warp's columns of its outputs.
  __device__ __forceinline__ void multiply_values(int tile) {
    const float scale[2] = {rescale(output_row(0)), rescale(output_row(1))};
    if (__any_sync(kAllLanes, scale[0] != 1.f || scale[1] != 1.f)) {
#pragma unroll
      for (int d = 0; d < kColumns / 8; ++d) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out_[d][j] *= scale[j / 2];
      }
    }
    uint32_t w[4];
    ptx::ldmatrix_x4(w, weights(warp_row() + at_.lane % 16) + at_.lane / 16 * 16);
    const int row = at_.lane % 16, exchange = at_.lane / 16 * 16 ^ Values::swizzle(row);
    const unsigned char* values = tiles_.slot(tiles_.first_half(tile) + at_.copies_values()) +
                                  (at_.copies_values() ? Values::offset(row) : Keys::offset(row)) +
                                  quarter() * kColumns * 2;
#pragma unroll
    for (int d = 0; d < kColumns / 16; ++d) {
      uint32_t v[4];
      ptx::ldmatrix_x4_trans(v, values + Values::vector_offset(2 * d, exchange));
      ptx::mma_m16n8k16<T>(out_[2 * d], w, v[0], v[1]);
      ptx::mma_m16n8k16<T>(out_[2 * d + 1], w, v[2], v[3]);
    }
  }

  // Writes the unit's result, or a partial for the combine.
  __device__ __forceinline__ void finish() {
    const AttentionCall& p = at_.p;
    const bool whole = at_.s.segment.opens && at_.s.segment.closes;
    const int64_t partial = partial_of(blockIdx.x, at_.s.segment.opens) * kRows;
    ptx::cp_async_wait<0>();
    __syncthreads();  // nobody reads the ring, or what outputs are rescaled with, any more
#pragma unroll
    for (int step = 1; step < kWideRowThreads; step *= 2) {
      sum_ += __shfl_xor_sync(kAllLanes, sum_, step);
    }
    if (first_own_key() == 0 && own_row() < at_.s.num_rows) {
      const PartialSum total = sum_ == 0.f ? no_keys() : PartialSum{shift(), sum_};
      const PackedRow packed(p, at_.s.kv_head, at_.s.first_packed + own_row());
      rescale(own_row()) = whole ? output_scale(p, total, packed.head) : 1.f;
      if (whole) p.lse[packed.output(p, at_.s.b)] = natural_lse(total);
      if (!whole) p.workspace.sums[partial + own_row()] = total;
    }
    if (!at_.has_values()) return;
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = output_row(half);
      if (row >= at_.s.num_rows) continue;
      const PackedRow packed(p, at_.s.kv_head, at_.s.first_packed + row);
      store_row(half, rescale(row), whole, whole ? packed.output(p, at_.s.b) : partial + row);
    }
  }

  // Writes the warp's columns of one of the thread's rows to the outputs, or to the partials.
  __device__ __forceinline__ void store_row(int half, float scale, bool whole, int64_t to) const {
    const AttentionCall& p = at_.p;
    const int first = quarter() * kColumns + at_.lane % 4 * 2;
#pragma unroll
    for (int d = 0; d < kColumns / 8; ++d) {
      if (first + 8 * d >= p.value_dim) continue;
      const int64_t at = to * p.value_dim + first + 8 * d;
      const float a = out_[d][2 * half] * scale, b = out_[d][2 * half + 1] * scale;
      if (whole) {
        *reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + at) = pack(T{}, a, b);
      } else {
        *reinterpret_cast<float2*>(p.workspace.values + at) = make_float2(a, b);
      }
    }
  }

  const PortableThread<Shape> at_;
  const Tiles tiles_;
  float limit_, sum_;  // of the thread's own row, as in PortableSoftmax; the sum is of its keys
  uint32_t q_[kSteps][4];
  float out_[kColumns / 8][4];  // as in PortableShape::Outputs
};

template <typename T, int kDim, int kValueDim, int kRows>
__global__ void __launch_bounds__(wide_threads(kRows), wide_blocks_per_sm(kRows))
    wide_attention_kernel(const __grid_constant__ AttentionCall call) {
  ptx::let_successors_begin();
  SegmentState& state = *reinterpret_cast<SegmentState*>(ptx::shared_memory());
  WideBlock<T, WideShape<kDim, kValueDim, kRows>> block(call, state);
  for_each_segment(call, state, [&] { block.run(); });
}

template <typename T, int kDim, int kValueDim, int kRows>
cudaError_t launch_wide_attention_rows(const AttentionCall& call, cudaStream_t stream) {
  return launch(wide_attention_kernel<T, kDim, kValueDim, kRows>, unsigned(call.cut.grid),
                unsigned(wide_threads(kRows)), size_t(wide_layout({kDim, kValueDim}, kRows).bytes),
                stream, call);
}

template <typename T, int kDim, int kValueDim>
cudaError_t launch_wide_attention(const AttentionCall& call, cudaStream_t stream) {
  return call.cut.rows_per_block == 16
             ? launch_wide_attention_rows<T, kDim, kValueDim, 16>(call, stream)
             : launch_wide_attention_rows<T, kDim, kValueDim, 32>(call, stream);
}

}  // namespace specextend
