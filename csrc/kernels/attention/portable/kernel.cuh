#pragma once

// Tree attention on tensor cores, for fp16 and bf16 on every GPU from sm_80 on.
//
// The rows of one KV head (tree rows x group) are packed into blocks of 16, 32 or 64, so that each
// key is read once for all of them. A block of four warps walks a contiguous run of key tiles.
// Warps that do not share rows share no keys either: each streams its own keys through its own part
// of a ring of tiles in shared memory and waits for nobody until the segment ends, where the split
// softmaxes of the warps become one. Only tiles that touch the tree, the end or a window look at
// masks.
//
// Few rows make this a race against memory: the ring keeps 64 to 96 KB per block under way.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention/launch.cuh"
#include "kernels/attention/portable/chunks.cuh"
#include "kernels/attention/portable/groups.cuh"
#include "kernels/attention/portable/masks.cuh"
#include "kernels/attention/portable/shape.cuh"
#include "kernels/attention/portable/softmax.cuh"
#include "kernels/attention/portable/tiles.cuh"
#include "kernels/attention/segments.cuh"
#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"

namespace specextend {

template <typename T, typename Shape>
class AttentionBlock {
 public:
  __device__ __forceinline__ AttentionBlock(const AttentionCall& call, const SegmentState& state)
      : at_(call, state), tiles_(at_), chunks_(at_) {}

  // Computes the block's segment of a unit.
  __device__ __forceinline__ void run() {
    // Keys and values of a tile take turns in the ring, and kAhead half tiles are under way. The
    // first turns, before tile 0, only ask.
    constexpr int kAhead = Shape::kAt.ahead;
    tiles_.request_queries();
    clear();
#pragma unroll 1
    for (int tile = at_.has_values() ? -(kAhead + 1) / 2 : -kAhead; tile < at_.s.num_tiles;
         ++tile) {
      typename Shape::Weights weights;
      if (tile == 0) tiles_.take_queries(q_);
      tiles_.await_half();
      tiles_.request_half(tiles_.first_half(tile) + kAhead);
      if (tile >= 0) multiply_keys(tile, weights);
      if (Shape::kChunks && tile >= 0) chunks_.emit_after(tile);
      if (!at_.has_values()) continue;
      tiles_.await_half();
      if (tile >= 0) multiply_values(tile, weights);
      // Now that the weights are not needed any more, there are registers for it.
      tiles_.request_half(tiles_.first_half(tile) + kAhead + 1);
    }
    finish();
  }

 private:
  using Tiles = PortableTiles<T, Shape>;
  using Keys = typename Tiles::Keys;
  using Values = typename Tiles::Values;
  static constexpr int kDim = Shape::kDim, kValueDim = Shape::kValueDim;

  __device__ __forceinline__ void clear() {
    softmax_.clear();
#pragma unroll
    for (int i = 0; i < Shape::kRowTiles; ++i) {
#pragma unroll
      for (int d = 0; d < kValueDim / 8; ++d) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out_[i][d][j] = 0.f;
      }
    }
  }

  // Makes weights of the warp's keys in a tile: product, mask, softmax.
  __device__ __forceinline__ void multiply_keys(int tile, typename Shape::Weights& weights) {
    const unsigned char* keys = tiles_.slot(tiles_.first_half(tile));
    const int64_t key = at_.first_key(tile);
    const int row = at_.lane % 8 + at_.lane / 16 * 8;
    const int exchange = at_.lane / 8 % 2 * 16 ^ Keys::swizzle(row);
    typename Shape::Logits logits = {};
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t k[4];
      ptx::ldmatrix_x4(k, keys + Keys::offset(row) + Keys::vector_offset(2 * d, exchange));
#pragma unroll
      for (int i = 0; i < Shape::kRowTiles; ++i) {
        ptx::mma_m16n8k16<T>(logits[i][0], q_[i][d], k[0], k[1]);
        ptx::mma_m16n8k16<T>(logits[i][1], q_[i][d], k[2], k[3]);
      }
    }
    if (key < at_.s.all_see_from || key + 16 > at_.s.prefix || at_.p.softcap > 0) {
      cap_and_mask(at_, logits, key);
    }
    if (Shape::kChunks) chunks_.keep(logits, tile);
    softmax_.add_keys(logits, at_, weights, out_);
  }

  // Adds the warp's values in a tile to the outputs.
  __device__ __forceinline__ void multiply_values(int tile,
                                                  const typename Shape::Weights& weights) {
    const unsigned char* values = tiles_.slot(tiles_.first_half(tile) + 1);
    const int row = at_.lane % 16, exchange = at_.lane / 16 * 16 ^ Values::swizzle(row);
#pragma unroll
    for (int d = 0; d < kValueDim / 16; ++d) {
      uint32_t v[4];
      ptx::ldmatrix_x4_trans(v,
                             values + Values::offset(row) + Values::vector_offset(2 * d, exchange));
#pragma unroll
      for (int i = 0; i < Shape::kRowTiles; ++i) {
        ptx::mma_m16n8k16<T>(out_[i][2 * d], weights[i], v[0], v[1]);
        ptx::mma_m16n8k16<T>(out_[i][2 * d + 1], weights[i], v[2], v[3]);
      }
    }
  }

  // Adds the parts of the key groups, and writes the unit's result or a partial for the combine.
  __device__ __forceinline__ void finish() {
    const PortableGroups<T, Shape> groups(at_);
    groups.share_sums(softmax_);
    ptx::cp_async_wait<0>();
    __syncthreads();  // nobody reads the ring any more
    if (at_.has_values()) groups.share_outputs(out_);
    groups.merge_sums();
    __syncthreads();
    if (at_.has_values()) groups.merge_outputs();
  }

  const PortableThread<Shape> at_;
  const Tiles tiles_;
  const PortableChunks<Shape> chunks_;
  PortableSoftmax<T, Shape> softmax_;
  uint32_t q_[Shape::kRowTiles][kDim / 16][4];
  typename Shape::Outputs out_;
};

template <typename T, int kDim, int kValueDim, int kRows, bool kChunks>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocksPerSm)
    tree_attention_kernel(const __grid_constant__ AttentionCall call) {
  ptx::let_successors_begin();
  SegmentState& state = *reinterpret_cast<SegmentState*>(ptx::shared_memory());
  AttentionBlock<T, PortableShape<kDim, kValueDim, kRows, kChunks>> block(call, state);
  for_each_segment(call, state, [&] { block.run(); });
}

template <typename T, int kDim, int kValueDim, int kRows, bool kChunks>
cudaError_t launch_attention_rows(const AttentionCall& call, cudaStream_t stream) {
  return launch(tree_attention_kernel<T, kDim, kValueDim, kRows, kChunks>, unsigned(call.cut.grid),
                kAttentionThreads,
                size_t(attention_layout({kDim, kValueDim}, kRows, kChunks).bytes), stream, call);
}

template <typename T, int kDim, int kValueDim, bool kChunks>
cudaError_t launch_attention(const AttentionCall& call, cudaStream_t stream) {
  switch (call.cut.rows_per_block) {
    case 16:
      return launch_attention_rows<T, kDim, kValueDim, 16, kChunks>(call, stream);
    case 32:
      return launch_attention_rows<T, kDim, kValueDim, 32, kChunks>(call, stream);
    default:
      return launch_attention_rows<T, kDim, kValueDim, 64, kChunks>(call, stream);
  }
}

}  // namespace specextend
