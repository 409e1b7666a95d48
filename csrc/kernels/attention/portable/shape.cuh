#pragma once

// The sizes of a block of the portable kernel, and which rows and keys a thread has of it.

#include <cuda_runtime.h>

#include <cstdint>

#include "attention_layout.h"
#include "kernels/attention/call.cuh"
#include "kernels/attention/segments.cuh"

namespace specextend {

// Gives the sizes of a block, its rows, keys of a tile and warps, for heads up to kDim and
// kValueDim.
template <int kDimensions, int kValueDimensions, int kBlockRows, bool kWithChunks>
struct PortableShape {
  static constexpr int kDim = kDimensions, kValueDim = kValueDimensions, kRows = kBlockRows;
  static constexpr AttentionDims kDims{kDim, kValueDim};
  static constexpr bool kChunks = kWithChunks, kLatent = false;
  static constexpr int kRowTiles = attention_row_tiles(kDims, kRows);
  static constexpr int kRowWarps = attention_row_warps(kDims, kRows);
  static constexpr int kTileKeys = attention_tile_keys(kDims, kRows);
  static constexpr int kPartTiles = kAttentionPartKeys / kTileKeys;
  static constexpr int kKeyGroups = 4 / kRowWarps;
  static constexpr int kThreads = kAttentionThreads, kGroupThreads = 32 * kRowWarps;
  static constexpr AttentionLayout kAt = attention_layout(kDims, kRows, kChunks);
  static_assert(kAt.ahead >= 1);

  // Holds the logits of a warp's rows and 16 keys. Thread t has elements 2 (t % 4) and the next of
  // rows t / 4 and t / 4 + 8 of each 16 x 8 product.
  using Logits = float[kRowTiles][2][4];
  // Holds the weights of the same keys: they are the left operand of the product with the values.
  using Weights = uint32_t[kRowTiles][4];
  // Holds the sums of weighted values of the warp's rows, likewise.
  using Outputs = float[kRowTiles][kValueDim / 8][4];
};

// What a thread works on.
template <typename Shape>
struct PortableThread {
  const AttentionCall& p;
  const SegmentState& s;
  int lane, key_group, warp_row;  // the warp's keys of a tile, and its first row

  __device__ __forceinline__ PortableThread(const AttentionCall& call, const SegmentState& state)
      : p(call), s(state), lane(int(threadIdx.x % 32)) {
    const int warp = int(threadIdx.x / 32);
    key_group = Shape::kKeyGroups == 1 ? 0 : warp / Shape::kRowWarps;
    warp_row = warp % Shape::kRowWarps * 16 * Shape::kRowTiles;
  }

  __device__ __forceinline__ bool has_values() const { return !Shape::kChunks || p.out != nullptr; }
  // Returns whether values are copied besides keys.
  __device__ __forceinline__ bool copies_values() const {
    return has_values() && !(Shape::kLatent && p.latent);
  }

  // Returns one of the thread's rows, as a row of the block.
  __device__ __forceinline__ int own_row(int tile, int half) const {
    return warp_row + 16 * tile + 8 * half + lane / 4;
  }

  // Returns the first of the warp's 16 keys in a tile.
  __device__ __forceinline__ int64_t first_key(int tile) const {
    return (s.first_tile + tile) * Shape::kTileKeys + 16 * key_group;
  }
};

}  // namespace specextend
