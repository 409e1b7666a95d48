#pragma once

// Tiles of queries, keys and values in shared memory, and the asynchronous copies that bring them.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention/masks.cuh"
#include "kernels/attention/portable/shape.cuh"
#include "kernels/attention/segments.cuh"
#include "kernels/ptx.cuh"

namespace specextend {

// Copies a 16-byte vector to shared memory, or zeros if it is not `valid`; `aligned` says whether
// `from` is.
template <typename T>
__device__ __forceinline__ void copy_vector(void* to, const T* from, bool valid, bool aligned) {
  if (aligned) return ptx::cp_async_16(to, from, valid);
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = valid ? halves[2 * i] | uint32_t(halves[2 * i + 1]) << 16 : 0;
  }
  *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// How rows of kDim elements lie in a half tile: one behind the other; in a row, vectors of 16 bytes
// are exchanged (swizzled), so that eight rows' vectors of one column lie in different banks.
template <int kDim>
struct TileRows {
  static constexpr int kVectors = kDim / 8;  // vectors of a row
  // So many threads copy along a row. In wide rows they are few, so that a thread has one row:
  // places in further rows would take registers.
  static constexpr int kAcross = kVectors > 32 ? 8 : kVectors & -kVectors;
  static constexpr int kSwizzle = kAcross < 8 ? kAcross : 8;

  // Returns where a row begins, and what the places of its vectors are exchanged with.
  __device__ static __forceinline__ int offset(int row) { return row * kDim * 2; }
  __device__ static __forceinline__ int swizzle(int row) {
    return row / (8 / kSwizzle) % kSwizzle * 16;
  }
  // Returns where vector `vector + lane_vector` lies in a row. The compiler knows the first, which
  // is even; the other, 0 or 1, is in lane_exchange.
  __device__ static __forceinline__ int vector_offset(int vector, int lane_exchange) {
    const int low = vector % kSwizzle * 16, high = vector * 16 - low;
    return high + (low ^ lane_exchange);
  }
};

// The ring of half tiles (pipeline stages): keys and values of a tile take turns in it.
template <typename T, typename Shape>
class PortableTiles {
 public:
  static constexpr int kDim = Shape::kDim;
  static constexpr auto kAt = Shape::kAt;
  using Keys = TileRows<kDim>;  // and queries
  using Values = TileRows<Shape::kValueDim>;

  __device__ __forceinline__ explicit PortableTiles(const PortableThread<Shape>& at) : at_(at) {}

  __device__ __forceinline__ unsigned char* ring() const { return ptx::shared_memory() + kAt.ring; }

  // Returns a tile's first half, counted among the half tiles of the segment.
  __device__ __forceinline__ int first_half(int tile) const {
    return at_.copies_values() ? 2 * tile : tile;
  }

  // Returns where the key group's part of a half tile is.
  __device__ __forceinline__ unsigned char* slot(int half) const {
    return ring() + unsigned(half) % unsigned(kAt.slots) * kAt.half +
           at_.key_group * (kAt.half / Shape::kKeyGroups);
  }

  // Asks for the block's queries. They come behind the slots that are filled first.
  __device__ __forceinline__ void request_queries() const {
    unsigned char* to = ring() + kAt.ahead * kAt.half;
    const T* q = static_cast<const T*>(at_.p.q) + at_.s.b * at_.p.q_stride_b;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < Shape::kRows * Keys::kVectors; i += Shape::kThreads) {
      const int row = i / Keys::kVectors, vector = i % Keys::kVectors;
      const PackedRow from(at_.p, at_.s.kv_head, at_.s.first_packed + row);
      copy_vector(to + Keys::offset(row) + (vector * 16 ^ Keys::swizzle(row)),
                  q + from.row * at_.p.q_stride_m + from.head * at_.p.q_stride_h + vector * 8,
                  row < at_.s.num_rows && vector * 8 < at_.p.head_dim, at_.p.q_aligned);
    }
    ptx::cp_async_commit();
  }

  // Takes the warp's queries into registers, with the sign of the scale.
  __device__ __forceinline__ void take_queries(
      uint32_t (&q)[Shape::kRowTiles][kDim / 16][4]) const {
    ptx::cp_async_wait<kAt.ahead>();
    __syncthreads();
    const unsigned char* from = ring() + kAt.ahead * kAt.half;
    const uint32_t sign = at_.p.scale < 0 ? 0x80008000u : 0;
#pragma unroll
    for (int i = 0; i < Shape::kRowTiles; ++i) {
      const int row = at_.warp_row + 16 * i + at_.lane % 16;
      const int exchange = at_.lane / 16 * 16 ^ Keys::swizzle(row);
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        ptx::ldmatrix_x4(q[i][d], from + Keys::offset(row) + Keys::vector_offset(2 * d, exchange));
#pragma unroll
        for (int j = 0; j < 4; ++j) q[i][d][j] ^= sign;
      }
    }
    __syncthreads();
  }

  // Asks for the key group's part of a half tile of the segment; for nothing if it is negative.
  __device__ __forceinline__ void request_half(int half) const {
    const AttentionCall& p = at_.p;
    const int tile = at_.copies_values() ? half >> 1 : half;
    if (half >= 0 && tile < at_.s.num_tiles) {
      const bool of_values = at_.copies_values() && half % 2 == 1;
      const int64_t key = at_.first_key(tile);
      const int64_t stride = of_values ? p.v_stride_s : p.k_stride_s;
      const T* from = static_cast<const T*>(of_values ? p.v : p.k) +
                      at_.s.b * (of_values ? p.v_stride_b : p.k_stride_b) +
                      at_.s.kv_head * (of_values ? p.v_stride_h : p.k_stride_h) + key * stride;
      if (kDim == Shape::kValueDim || !of_values) {
        copy_half<Keys>(slot(half), from, stride, key, of_values ? p.value_dim : p.head_dim);
      } else {
        copy_half<Values>(slot(half), from, stride, key, p.value_dim);
      }
    }
    ptx::cp_async_commit();
  }

  // Waits until the half tile whose turn it is has come.
  __device__ __forceinline__ void await_half() const {
    ptx::cp_async_wait<kAt.ahead - 1>();
    // What the group's other threads have copied is there too, and nobody reads the slot that is
    // filled next any more.
    if constexpr (Shape::kRowWarps == 1) {
      __syncwarp();
    } else {
      ptx::named_barrier(1 + at_.key_group, Shape::kGroupThreads);
    }
  }

 private:
  static constexpr int kGroupThreads = Shape::kGroupThreads;
  // So many rows of 16 are copied at a time.
  template <typename Rows>
  static constexpr int kDown =
      kGroupThreads / Rows::kAcross < 16 ? kGroupThreads / Rows::kAcross : 16;

  // Copies the group's 16 rows of keys or values, of which `key` is the first and of which each has
  // `dim` elements.
  template <typename Rows>
  __device__ __forceinline__ void copy_half(unsigned char* to, const T* from, int64_t stride,
                                            int64_t key, int dim) const {
    const AttentionCall& p = at_.p;
    if (key >= at_.s.keys.begin && key + 16 <= at_.s.prefix && p.whole_vectors) {
      copy_keys<Rows, true>(to, from, stride, 0, dim);
    } else {
      copy_keys<Rows, false>(to, from, stride, readable_keys(p, at_.s, key), dim);
    }
  }

  // Copies those of 16 rows of keys or values whose bit in `readable` is set, or all; zeros take
  // the place of others, and of what a row has not.
  template <typename Rows, bool kAll>
  __device__ __forceinline__ void copy_keys(unsigned char* to, const T* from, int64_t stride,
                                            uint32_t readable, int dim) const {
    constexpr int kAcross = Rows::kAcross, kDown = PortableTiles::template kDown<Rows>;
    const int thread = int(threadIdx.x) % kGroupThreads;
    const int row = thread / kAcross, vector = thread % kAcross;
    if (kDown * kAcross < kGroupThreads && row >= kDown) return;
    to += Rows::offset(row);
    from += row * stride + vector * 8;
    readable >>= row;
    // The thread's rows are row + a multiple of kDown, a power of two, so that the exchanges of the
    // two parts add up.
    const int place = vector * 16 ^ Rows::swizzle(row);
    if (kAll || at_.p.kv_aligned) {
#pragma unroll
      for (int i = 0; i < 16 / kDown; ++i, from += kDown * stride) {
#pragma unroll
        for (int j = 0; j < Rows::kVectors / kAcross; ++j) {
          const bool valid =
              kAll || ((readable >> (i * kDown) & 1) && (vector + j * kAcross) * 8 < dim);
          ptx::cp_async_16(
              to + Rows::offset(i * kDown) + j * kAcross * 16 + (place ^ Rows::swizzle(i * kDown)),
              from + j * kAcross * 8, valid);
        }
      }
    } else {
      copy_unaligned_keys<Rows>(to, from, stride, readable, dim, vector, place);
    }
  }

  template <typename Rows>
  __device__ __forceinline__ void copy_unaligned_keys(unsigned char* to, const T* from,
                                                      int64_t stride, uint32_t readable, int dim,
                                                      int vector, int place) const {
    constexpr int kAcross = Rows::kAcross, kDown = PortableTiles::template kDown<Rows>;
#pragma unroll 1
    for (int i = 0; i < 16 / kDown; ++i, from += kDown * stride) {
#pragma unroll 1
      for (int j = 0; j < Rows::kVectors / kAcross; ++j) {
        copy_vector(
            to + Rows::offset(i * kDown) + j * kAcross * 16 + (place ^ Rows::swizzle(i * kDown)),
            from + j * kAcross * 8,
            (readable >> (i * kDown) & 1) && (vector + j * kAcross) * 8 < dim, false);
      }
    }
  }

  const PortableThread<Shape> at_;
};

}  // namespace specextend
