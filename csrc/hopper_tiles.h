#pragma once

// Where elements lie in the Hopper family of tree_attention. Host and device code share this.

#include <cstdint>

#include "host_device.h"

namespace specextend {

constexpr int kHopperWarpgroupRows = 64;  // rows of one product of a warpgroup
constexpr int kHopperBlockRows = 128;     // rows of a block: two warpgroups multiply
constexpr int kHopperMinRows = 64;        // the family takes KV heads of more rows
constexpr int kHopperMaxDim = 256;        // the largest heads, of keys and values alike
constexpr int kHopperChunkDim = 192;      // above it sums of chunks would not fit into registers
constexpr int kHopperChunk = 32;          // keys; kernels are made for this size of chunks alone
constexpr int kHopperMinRun = 4;          // positions: a tile costs less than a partial of its rows

// Returns the head dimension of the kernel that serves D.
constexpr int hopper_dim(int head_dim) { return (head_dim + 63) / 64 * 64; }

// Returns the keys of a tile. Sums, logits and weights of a product have to fit into 240 registers.
constexpr int hopper_tile_keys(int dim) { return dim <= 128 ? 128 : 64; }

// Returns the index of an element in a tile of `rows` rows in shared memory. The tile is panels of
// 64 columns, in which the eight 16-byte vectors of a row change places with the row (the 128-byte
// swizzle of tensor copies).
SPECEXTEND_HOST_DEVICE int shared_index(int rows, int row, int column) {
  return (column / 64 * rows + row) * 64 + ((column / 8 ^ row) & 7) * 8 + column % 8;
}

// Return where element i of a product [64, n] is that thread `thread` of the warpgroup has in its
// registers.
SPECEXTEND_HOST_DEVICE int fragment_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}

SPECEXTEND_HOST_DEVICE int fragment_column(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

}  // namespace specextend
