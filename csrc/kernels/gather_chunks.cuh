#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/grid.cuh"
#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"
#include "kv_rows.h"
#include "params.h"

namespace specextend {

constexpr int kGatherThreads = 128;
constexpr int kGatherInFlight =
    4;  // a thread has read so many pairs of vectors, and not yet written
constexpr int kGatherLayers = 24;  // one launch serves so many: they fit 4 KB of parameters

struct GatherLaunch {
  GatherChunksParams params;  // work_lens is null after the first launch; layers is not read
  GatherLayer layers[kGatherLayers];
  unsigned num_groups;  // the rows of a slot are so many groups
  int rows_per_block;   // a group has so many rows
};
static_assert(sizeof(GatherLaunch) <= 4096, "more than a kernel's parameters may take");

template <typename T, int kElements>
struct alignas(sizeof(T) * kElements) GatherVector {
  T x[kElements];
};

// An item is two vectors of a row of one head. With pair >= 0 they are the pairs [pair, pair +
// kElements).
struct GatherItem {
  const char* from;
  char* to;
  int64_t second;  // bytes from the first vector to the second; 0: there is one only
  int pair;
};

// Cuts some rows of one slot of one layer, keys or values, into items. Each head has the rotated
// pairs, then the rest, which is cut in halves so that threads side by side touch vectors side by
// side.
template <typename T, int kElements>
class GatherRows {
 public:
  using Vector = GatherVector<T, kElements>;

  __device__ GatherRows(const GatherChunksParams& p, const GatherLayer& layer, int which, int b,
                        int slot, int64_t first, int64_t rows, bool rotated)
      : full_(layer.full[which]), work_(layer.work[which]), b_(b), interleaved_(p.interleaved) {
    from_ = int64_t(p.ids[int64_t(b) * p.budget + slot]) * p.chunk_size + first;
    to_ = int64_t(slot) * p.chunk_size + first;
    vectors_ = unsigned(layer.row_bytes[which] / int64_t(sizeof(Vector)));
    rotated_ = rotated ? unsigned(p.rotary_dim / 2) / kElements : 0;
    half_ = (vectors_ - 2 * rotated_ + 1) / 2;
    per_row_ = (rotated_ + half_) * unsigned(layer.num_kv_heads[which]);
    count_ = unsigned(rows) * per_row_;
  }

  __device__ unsigned count() const { return count_; }

  // Returns item n, n < count().
  __device__ GatherItem item(unsigned n) const {
    const unsigned per_head = rotated_ + half_;
    const unsigned row = n / per_row_, head = n % per_row_ / per_head, i = n % per_head;
    unsigned first, step;
    if (i >= rotated_) {
      first = rotated_ + i;
      step = first + half_ < vectors_ ? half_ : 0;
    } else if (interleaved_) {
      first = 2 * i;
      step = 1;
    } else {
      first = i;
      step = rotated_;
    }
    const int64_t offset = int64_t(first) * int64_t(sizeof(Vector));
    return {kv_row(full_, b_, from_ + row, head) + offset,
            kv_row(work_, b_, to_ + row, head) + offset, int64_t(step) * int64_t(sizeof(Vector)),
            i < rotated_ ? int(i) * kElements : -1};
  }

 private:
  const KvRows &full_, &work_;
  int b_;
  bool interleaved_;
  int64_t from_, to_;
  unsigned vectors_, rotated_, half_, per_row_, count_;
};

// Rotates the pairs of an item: neighbours, or element i of one vector and of the other.
template <bool kInterleaved, typename T, int kElements>
__device__ __forceinline__ void rotate_item(GatherVector<T, kElements> (&v)[2],
                                            const Rotation* table) {
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const int n = kInterleaved ? 2 * i : i, m = kInterleaved ? n + 1 : n + kElements;
    T &first = v[n / kElements].x[n % kElements], &second = v[m / kElements].x[m % kElements];
    float a = float(first), b = float(second);
    rotate_pair(table[i], a, b);
    first = T(a);
    second = T(b);
  }
}

// A block moves some rows of one slot of one layer, either keys or values. Reading begins before
// the block computes its table of rotations, which takes about as long as a read. Threads without
// an item read the last one, so that no read waits for a branch. Grid: keys and values of groups of
// rows of slots; layers; sequences.
template <typename T, int kElements>
__global__ void __launch_bounds__(kGatherThreads)
    gather_chunks_kernel(const __grid_constant__ GatherLaunch g) {
  using Vector = GatherVector<T, kElements>;
  const GatherChunksParams& p = g.params;
  const GatherLayer& layer = g.layers[blockIdx.y];
  Rotation* const table = reinterpret_cast<Rotation*>(ptx::shared_memory());
  const int which = int(blockIdx.x % 2);
  const int slot = int(blockIdx.x / 2 / g.num_groups);
  const int64_t first = int64_t(blockIdx.x / 2 % g.num_groups) * g.rows_per_block;
  for (int b = int(blockIdx.z); b < p.batch; b += int(gridDim.z)) {
    if (p.work_lens != nullptr && blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
      p.work_lens[b] = int32_t(gather_length(p, b));
    }
    if (slot >= gather_count(p, b)) continue;
    const int64_t rows = min(gather_rows(p, b, slot) - first, int64_t(g.rows_per_block));
    if (rows <= 0) continue;
    const int64_t shift = which == 0 && p.rotary_dim > 0 ? gather_shift(p, b, slot) : 0;
    const GatherRows<T, kElements> all(p, layer, which, b, slot, first, rows, shift != 0);
    if (all.count() == 0) continue;

    GatherItem items[kGatherInFlight];
    Vector values[kGatherInFlight][2];
    const auto read = [&](unsigned done) {
#pragma unroll
      for (int i = 0; i < kGatherInFlight; ++i) {
        const unsigned n = done + i * kGatherThreads + threadIdx.x;
        items[i] = all.item(min(n, all.count() - 1));
        values[i][0] = *reinterpret_cast<const Vector*>(items[i].from);
        values[i][1] = *reinterpret_cast<const Vector*>(items[i].from + items[i].second);
      }
    };
    read(0);
    if (shift != 0) {
      __syncthreads();  // the table of an earlier slot is no longer read
      for (int i = int(threadIdx.x); i < p.rotary_dim / 2; i += kGatherThreads) {
        table[i] = rotation(shift, layer.inv_freq[i]);
      }
      __syncthreads();
    }
    for (unsigned done = 0; done < all.count(); done += kGatherThreads * kGatherInFlight) {
      if (done > 0) read(done);
#pragma unroll
      for (int i = 0; i < kGatherInFlight; ++i) {
        if (done + i * kGatherThreads + threadIdx.x >= all.count()) continue;
        if (items[i].pair >= 0 && p.interleaved) {
          rotate_item<true>(values[i], table + items[i].pair);
        } else if (items[i].pair >= 0) {
          rotate_item<false>(values[i], table + items[i].pair);
        }
        *reinterpret_cast<Vector*>(items[i].to) = values[i][0];
        if (items[i].second != 0) {
          *reinterpret_cast<Vector*>(items[i].to + items[i].second) = values[i][1];
        }
      }
    }
  }
}

// Launches for layers [begin, end), at most kGatherLayers of them.
template <typename T, int kElements>
cudaError_t launch_gather_layers(const GatherChunksParams& p, int begin, int end,
                                 cudaStream_t stream) {
  GatherLaunch g{p, {}, 1, 1};
  std::copy(p.layers + begin, p.layers + end, g.layers);
  if (begin > 0) g.params.work_lens = nullptr;
  int64_t vectors = 1;  // a row of all heads has at most so many
  for (int i = begin; i < end; ++i) {
    for (int which = 0; which < 2; ++which) {
      const GatherLayer& layer = p.layers[i];
      vectors = std::max(vectors, layer.row_bytes[which] / int64_t(sizeof(T) * kElements) *
                                      layer.num_kv_heads[which]);
    }
  }
  g.rows_per_block = int(std::max<int64_t>(1, 2 * kGatherThreads * kGatherInFlight / vectors));
  const int64_t rows = std::min({int64_t(p.chunk_size), p.capacity, p.work_capacity});
  g.num_groups = unsigned(std::max<int64_t>(1, (rows + g.rows_per_block - 1) / g.rows_per_block));
  const int64_t filled = (p.work_capacity + p.chunk_size - 1) / p.chunk_size;
  const int64_t slots = std::clamp<int64_t>(p.budget, 1, std::max<int64_t>(filled, 1));
  const dim3 grid(unsigned(2 * g.num_groups * slots), unsigned(end - begin), grid_z(p.batch));
  return launch(gather_chunks_kernel<T, kElements>, grid, kGatherThreads,
                size_t(p.rotary_dim / 2) * sizeof(Rotation), stream, g);
}

template <typename T>
cudaError_t launch_gather_chunks(const GatherChunksParams& p, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  constexpr int kElements = 16 / sizeof(T);
  const bool wide = gather_alignment(p, int64_t(sizeof(T))) == 16;
  for (int begin = 0; begin < p.num_layers; begin += kGatherLayers) {
    const int end = std::min(begin + kGatherLayers, p.num_layers);
    const cudaError_t error = wide ? launch_gather_layers<T, kElements>(p, begin, end, stream)
                                   : launch_gather_layers<T, 1>(p, begin, end, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace specextend
