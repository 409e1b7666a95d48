#pragma once

// Tree attention on one work item, compiled once per instruction set by table.h.
//
// The rows of a KV head (tree rows x group) are packed together. For a row, the keys that it may
// see lie on a line: prefix key j at j, and the tree keys of its mask, in the order of their slots,
// at P, P + 1, ... The line is cut at fixed places into blocks of kAttentionBlock positions,
// between which the running maximum is updated, and into segments of kAttentionSegment, which are
// summed apart and merged from left to right. All sums over the keys of a block take the keys one
// after the other, a key that a row does not see adding exactly 0. So the bits of a row depend on
// its line alone: not on the other rows, the number of splits, or on where in the tree its
// ancestors stand.

#include "cpu/isa/attention/row_block.h"
#include "cpu/isa/attention/vector_blocks.h"
#if defined(__AVX512BF16__)
#include "cpu/isa/attention/math_bf16.h"
#endif
#if defined(__AMX_BF16__)
#include "cpu/isa/attention/tile_blocks.h"
#endif

namespace specextend::cpu {
namespace {
namespace attention {

// How elements of type T are multiplied: widened to floats, but where the instruction set does
// better.
template <typename T>
struct MathOf {
  using Type = Float32Math;
};
#if defined(__AVX512BF16__)
template <>
struct MathOf<BFloat16> {
  using Type = BFloat16Math;
};
#endif

// How blocks of keys of type T are multiplied.
template <typename T>
struct BlocksOf {
  using Type = VectorBlocks<typename MathOf<T>::Type, T>;
};
#if defined(__AMX_BF16__)
template <>
struct BlocksOf<BFloat16> {
  using Type = TileBlocks;
};
#endif

template <typename T>
constexpr AttentionKernels kernels() {
  using Block = RowBlock<typename BlocksOf<T>::Type>;
  return {Block::scratch_floats, [](const AttentionItem& item) { Block(item).run(); },
          [](const AttentionItem& item) { Block(item).combine(); }, kLanes};
}

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
