#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/grid.cuh"
#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"
#include "params.h"

namespace specextend {

constexpr int kScoreWarps = 8;
constexpr int kScoreTile = 32;     // a block has so many chunks, one per lane
constexpr int kScoreInFlight = 4;  // a warp has read a tile of so many heads and not yet added it
constexpr int kTreeMassWarps = 32;

inline int64_t score_tiles(int num_chunks) {
  return (int64_t(num_chunks) + kScoreTile - 1) / kScoreTile;
}

// A sequence's row of log-sum-exps, and which of its chunks hold prefix alone. The next one is that
// of the first tree key, if there are tree keys and that chunk is below C.
struct ScoreRow {
  const float* chunk_lse;
  const float* lse;
  int num_whole;

  __device__ ScoreRow(const ChunkScoresParams& p, int64_t b) {
    const int64_t row = max(0, min(p.rows[b], p.num_rows - 1));
    chunk_lse = p.chunk_lse + b * p.chunk_stride_b + row * p.chunk_stride_m;
    lse = p.lse + b * p.lse_stride_b + row * p.lse_stride_m;
    const int prefix = max(p.prefix_lens[b], 0);
    const int begun = !p.tree && prefix % p.chunk_size != 0 ? 1 : 0;
    num_whole = min(prefix / p.chunk_size + begun, p.num_chunks);
  }
};

// Returns whether a head's log-sum-exp is neither infinite nor NaN.
__device__ __forceinline__ bool sees_keys(float lse) { return fabsf(lse) < INFINITY; }

__device__ __forceinline__ double sum_of_warp(double x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

template <bool kLargest>
__device__ __forceinline__ void add_mass(double& to, double mass) {
  to = kLargest ? fmax(to, mass) : to + mass;
}

// Writes the scores of the whole chunks, 0 for the others; and, if there is a tree, the mass of
// each head in this tile: partials [B, Hq, tiles]. Each warp adds up its heads, then warps are
// added, in order. Grid: tiles, 1, sequences.
template <bool kLargest>
__global__ void __launch_bounds__(32 * kScoreWarps)
    chunk_mass_kernel(const __grid_constant__ ChunkScoresParams p, double* partials) {
  double* const masses = reinterpret_cast<double*>(ptx::shared_memory());  // [warps, tile]
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int64_t chunk = int64_t(blockIdx.x) * kScoreTile + lane;
  for (int b = int(blockIdx.z); b < p.batch; b += int(gridDim.z)) {
    const ScoreRow row(p, b);
    const bool is_whole = chunk < row.num_whole;
    double total = 0.;
    if (int64_t(blockIdx.x) * kScoreTile < row.num_whole) {
      for (int first = warp; first < p.num_heads; first += kScoreWarps * kScoreInFlight) {
        float lse[kScoreInFlight], chunk_lse[kScoreInFlight];
#pragma unroll
        for (int i = 0; i < kScoreInFlight; ++i) {
          const int h = first + i * kScoreWarps;
          const bool is_head = h < p.num_heads;
          lse[i] = is_head ? __ldg(row.lse + h) : INFINITY;
          chunk_lse[i] =
              is_head && is_whole ? __ldg(row.chunk_lse + h * p.chunk_stride_h + chunk) : -INFINITY;
        }
#pragma unroll
        for (int i = 0; i < kScoreInFlight; ++i) {
          const int h = first + i * kScoreWarps;
          if (h >= p.num_heads) continue;
          // NaN and +inf count as -inf.
          const bool counts = sees_keys(lse[i]) && chunk_lse[i] < INFINITY;
          const double mass = counts ? double(expf(chunk_lse[i] - lse[i])) : 0.;
          add_mass<kLargest>(total, mass);
          if (!p.tree) continue;
          const double sum = sum_of_warp(mass);
          if (lane == 0) partials[(int64_t(b) * p.num_heads + h) * gridDim.x + blockIdx.x] = sum;
        }
      }
    }
    masses[warp * kScoreTile + lane] = total;
    __syncthreads();
    if (warp == 0 && chunk < p.num_chunks) {
      for (int i = 1; i < kScoreWarps; ++i) {
        add_mass<kLargest>(total, masses[i * kScoreTile + lane]);
      }
      const double scale = kLargest ? 1. : 1. / p.num_heads;
      p.scores[int64_t(b) * p.num_chunks + chunk] = float(total * scale);
    }
    __syncthreads();
  }
}

// Writes the score of the chunk that the first tree key falls into. Each head gives what the whole
// chunks leave of its mass, or the chunk's own mass if rounding left less. Grid: sequences.
template <bool kLargest>
__global__ void __launch_bounds__(32 * kTreeMassWarps)
    tree_mass_kernel(const __grid_constant__ ChunkScoresParams p, const double* partials,
                     int64_t num_tiles) {
  double* const masses = reinterpret_cast<double*>(ptx::shared_memory());  // [warps]
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int64_t b = blockIdx.x;
  const ScoreRow row(p, b);
  if (row.num_whole >= p.num_chunks) return;
  const int64_t tiles = (int64_t(row.num_whole) + kScoreTile - 1) / kScoreTile;
  double total = 0.;
  for (int h = warp; h < p.num_heads; h += kTreeMassWarps) {
    const float lse = __ldg(row.lse + h);
    const float chunk_lse = __ldg(row.chunk_lse + h * p.chunk_stride_h + row.num_whole);
    double before = 0.;
#pragma unroll 4
    for (int64_t tile = lane; tile < tiles; tile += 32) {
      before += __ldg(partials + (b * p.num_heads + h) * num_tiles + tile);
    }
    before = sum_of_warp(before);
    const double own = exp(double(chunk_lse) - double(lse));
    const double rest = fmax(own < double(INFINITY) ? own : 0., 1. - before);
    if (sees_keys(lse)) add_mass<kLargest>(total, rest);
  }
  if (lane == 0) masses[warp] = total;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < kTreeMassWarps; ++i) add_mass<kLargest>(total, masses[i]);
  const double scale = kLargest ? 1. : 1. / p.num_heads;
  p.scores[b * p.num_chunks + row.num_whole] = float(total * scale);
}

// Copies the query rows of [B, M, Hq, D] at the device's indices to [B, Hq, D]. Grid: heads, 1,
// sequences.
template <typename Element>
__global__ void pick_rows_kernel(const __grid_constant__ TreeAttentionParams p, const int32_t* rows,
                                 Element* picked) {
  for (int b = int(blockIdx.z); b < p.batch; b += int(gridDim.z)) {
    const int64_t row = max(0, min(rows[b], p.num_rows - 1));
    const Element* const from = static_cast<const Element*>(p.q) + b * p.q_stride_b +
                                row * p.q_stride_m + blockIdx.x * p.q_stride_h;
    Element* const to = picked + (int64_t(b) * p.num_heads + blockIdx.x) * p.head_dim;
    for (int i = int(threadIdx.x); i < p.head_dim; i += int(blockDim.x)) to[i] = from[i];
  }
}

template <bool kLargest>
cudaError_t launch_chunk_scores_of(const ChunkScoresParams& p, double* partials,
                                   cudaStream_t stream) {
  const int64_t tiles = score_tiles(p.num_chunks);
  const cudaError_t error =
      launch(chunk_mass_kernel<kLargest>, dim3(unsigned(tiles), 1, grid_z(p.batch)),
             32 * kScoreWarps, kScoreWarps * kScoreTile * sizeof(double), stream, p, partials);
  if (error != cudaSuccess || !p.tree) return error;
  return launch(tree_mass_kernel<kLargest>, unsigned(p.batch), 32 * kTreeMassWarps,
                kTreeMassWarps * sizeof(double), stream, p, partials, tiles);
}

}  // namespace specextend
