#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/block.cuh"
#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"
#include "kernels/row_chunks.cuh"
#include "rows.h"

namespace specextend {

constexpr int kNormThreads = 512;    // a row has no more
constexpr int kNormKept = 4;         // chunks that a thread keeps, and does not read again
constexpr int kNormWarpChunks = 64;  // rows of no more chunks have one warp each
constexpr int kNormWarps = 4;        // of such rows in a block

// A row's own threads, one warp or the block, take its chunks in turns, add their squares up in
// order, and then what each has: by warp, then warp after warp. So a row's bits depend on it alone.
// Grid: rows, or groups of blockDim.y of them.
template <typename T, bool kWide, bool kWarp>
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_kernel(const __grid_constant__ RmsNormParams p) {
  constexpr int kElements = RowChunk<T>::kElements;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, length = p.shape.length;
  if (row >= p.shape.num_rows) return;  // all threads of a row do
  const int64_t chunks = (length + kElements - 1) / kElements;
  const T* const x = row_begin<T>(p.shape, p.x, row);
  const bool adds = p.total != nullptr;
  const T* const residual = adds ? row_begin<T>(p.shape, p.residual, row) : nullptr;
  T* const total = static_cast<T*>(p.total) + row * length;
  T* const out = static_cast<T*>(p.out) + row * length;

  float sum = 0.f;
  const auto take = [&](int64_t c) {
    RowChunk<T> chunk = load_chunk<kWide>(x, c, length);
    if (adds) {
      const RowChunk<T> other = load_chunk<kWide>(residual, c, length);
#pragma unroll
      for (int i = 0; i < kElements; ++i) chunk.x[i] = T(float(other.x[i]) + float(chunk.x[i]));
      store_chunk<kWide>(total, c, length, chunk);
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      sum += rounded_product(float(chunk.x[i]), float(chunk.x[i]));
    }
    return chunk;
  };
  const int64_t first = threadIdx.x, step = blockDim.x;
  RowChunk<T> kept[kNormKept];
#pragma unroll
  for (int i = 0; i < kNormKept; ++i) {
    if (first + i * step < chunks) kept[i] = take(first + i * step);
  }
  for (int64_t c = first + kNormKept * step; c < chunks; c += step) take(c);

  if constexpr (kWarp) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, i);
  } else {
    sum = block_reduce(sum, reinterpret_cast<float*>(ptx::shared_memory()),
                       [](float a, float b) { return a + b; });
  }
  const float scale = rsqrtf(sum / float(length) + p.eps);
  const auto give = [&](int64_t c, RowChunk<T> chunk) {
    const RowChunk<T> weight = load_chunk<kWide>(static_cast<const T*>(p.weight), c, length);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float h = rounded_product(float(chunk.x[i]), scale);
      const float w = float(weight.x[i]) + p.offset;
      chunk.x[i] = T(w * (p.round_first ? float(T(h)) : h));
    }
    store_chunk<kWide>(out, c, length, chunk);
  };
#pragma unroll
  for (int i = 0; i < kNormKept; ++i) {
    if (first + i * step < chunks) give(first + i * step, kept[i]);
  }
  for (int64_t c = first + kNormKept * step; c < chunks; c += step) {
    give(c, load_chunk<kWide>(adds ? total : x, c, length));
  }
}

template <typename T, bool kWide>
cudaError_t launch_rms_norm_rows(const RmsNormParams& p, cudaStream_t stream) {
  const int64_t chunks = num_row_chunks<T>(p.shape.length);
  if (chunks <= kNormWarpChunks) {
    const unsigned blocks = unsigned((p.shape.num_rows - 1) / kNormWarps + 1);
    return launch(rms_norm_kernel<T, kWide, true>, blocks, dim3(32, kNormWarps), 0, stream, p);
  }
  return launch(rms_norm_kernel<T, kWide, false>, unsigned(p.shape.num_rows),
                block_threads(chunks, kNormThreads), kMaxWarps * sizeof(float), stream, p);
}

template <typename T>
cudaError_t launch_rms_norm(const RmsNormParams& p, cudaStream_t stream) {
  if (p.shape.num_rows == 0 || p.shape.length == 0) return cudaSuccess;
  constexpr int64_t kSize = int64_t(sizeof(T));
  const uint64_t bits = address_bits(p.x, kSize) | address_bits(p.residual, kSize) |
                        reinterpret_cast<uintptr_t>(p.weight) | reinterpret_cast<uintptr_t>(p.out) |
                        reinterpret_cast<uintptr_t>(p.total) | uint64_t(p.shape.length * kSize);
  return bits % 16 == 0 ? launch_rms_norm_rows<T, true>(p, stream)
                        : launch_rms_norm_rows<T, false>(p, stream);
}

}  // namespace specextend
