#pragma once

// Tree attention on tensor cores, for fp16 and bf16 on every GPU from sm_80 on.
//
// The rows of one KV head (tree rows x group) are packed into blocks of 16, 32 or 64, so that each
// key is read once for all of them. A block of four warps walks a contiguous run of key tiles;
// warps that do not share rows share no keys either: each streams its own keys through its own part
// of a ring of tiles in shared memory and waits for nobody until the segment ends, where the
// partial softmaxes of the warps are added. Only tiles that touch the tree, the end or a window
// look at masks.
//
// Few rows make this a race against memory: the ring keeps 64 to 96 KB per block under way.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention_launch.cuh"
#include "kernels/attention_work.cuh"
#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"
#include "params.h"
#include "work_partition.h"

namespace specextend {

// The reference that exponents are taken from follows the largest logit only when that is this much
// (base 2) above it: nearly never after the first keys. fp16 weights then stay below 2^8.
constexpr float kAttentionSlack = 8.f;

// One 16-byte vector to shared memory, zeros if not `valid`; `aligned` says whether `from` is.
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

template <typename T, int kDim, int kRows, bool kChunks>
class AttentionBlock {
 public:
  static constexpr int kRowTiles = attention_row_tiles(kDim, kRows);
  static constexpr int kRowWarps = attention_row_warps(kDim, kRows);
  static constexpr int kTileKeys = attention_tile_keys(kDim, kRows);
  static constexpr int kPartTiles = kAttentionPartKeys / kTileKeys;
  static constexpr int kKeyGroups = 4 / kRowWarps;
  static constexpr int kGroupThreads = 32 * kRowWarps;
  static constexpr AttentionLayout kAt = attention_layout(kDim, kRows, kChunks);
  static_assert(kAt.ahead >= 1);

  __device__ __forceinline__ AttentionBlock(const AttentionCall& call, const SegmentState& state)
      : p_(call), s_(state), lane_(int(threadIdx.x % 32)) {
    const int warp = int(threadIdx.x / 32);
    key_group_ = warp / kRowWarps;
    warp_row_ = warp % kRowWarps * 16 * kRowTiles;
  }

  // What the block has of a unit.
  __device__ __forceinline__ void run() {
    // Keys and values of a tile take turns in the ring, and kAhead half tiles are under way. The
    // first turns, before tile 0, only ask.
    constexpr int kAhead = kAt.ahead;
    request_queries();
    clear();
#pragma unroll 1
    for (int tile = has_values() ? -(kAhead + 1) / 2 : -kAhead; tile < s_.num_tiles; ++tile) {
      uint32_t weights[kRowTiles][4];
      if (tile == 0) take_queries();
      await_half();
      request_half(first_half(tile) + kAhead);
      if (tile >= 0) multiply_keys(ring_slot(first_half(tile)), tile, weights);
      if (kChunks && tile >= 0) chunks_after(tile);
      if (!has_values()) continue;
      await_half();
      if (tile >= 0) multiply_values(ring_slot(first_half(tile) + 1), weights);
      // Now that the weights are not needed any more, there are registers for it.
      request_half(first_half(tile) + kAhead + 1);
    }
    finish();
  }

 private:
  static constexpr int kVectors = kDim / 8;             // of a row
  static constexpr int kAcross = kVectors & -kVectors;  // threads that copy along a row
  static constexpr int kSwizzle = kAcross < 8 ? kAcross : 8;
  static constexpr int kDown = kGroupThreads / kAcross < 16 ? kGroupThreads / kAcross : 16;

  // Rows of vectors, where the places of vectors are exchanged so that eight rows' vectors of one
  // column lie in different banks: offset of the row, and what to exchange with.
  __device__ static __forceinline__ int row_offset(int row) { return row * kDim * 2; }
  __device__ static __forceinline__ int swizzle(int row) {
    return row / (8 / kSwizzle) % kSwizzle * 16;
  }
  // Of vector `vector + lane_vector`, the first known to the compiler and even, the other 0 or 1.
  __device__ static __forceinline__ int vector_offset(int vector, int lane_exchange) {
    const int low = vector % kSwizzle * 16, high = vector * 16 - low;
    return high + (low ^ lane_exchange);
  }

  __device__ __forceinline__ bool has_values() const { return !kChunks || p_.out != nullptr; }

  // Of a tile, among the half tiles of the segment.
  __device__ __forceinline__ int first_half(int tile) const {
    return has_values() ? 2 * tile : tile;
  }

  __device__ __forceinline__ unsigned char* ring() const { return ptx::shared_memory() + kAt.ring; }

  // --- copies ---

  __device__ __forceinline__ void request_queries() {
    unsigned char* to = ring() + kAt.ahead * kAt.half;  // behind the slots that are filled first
    const T* q = static_cast<const T*>(p_.q) + s_.b * p_.q_stride_b;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < kRows * kVectors; i += kAttentionThreads) {
      const int row = i / kVectors, vector = i % kVectors;
      const PackedRow at(p_, s_.kv_head, s_.first_packed + row);
      copy_vector(to + row_offset(row) + (vector * 16 ^ swizzle(row)),
                  q + at.row * p_.q_stride_m + at.head * p_.q_stride_h + vector * 8,
                  row < s_.num_rows && vector * 8 < p_.head_dim, p_.q_aligned);
    }
    ptx::cp_async_commit();
  }

  __device__ __forceinline__ void take_queries() {
    ptx::cp_async_wait<kAt.ahead>();
    __syncthreads();
    const unsigned char* from = ring() + kAt.ahead * kAt.half;
    const uint32_t sign = p_.scale < 0 ? 0x80008000u : 0;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const int row = warp_row_ + 16 * i + lane_ % 16;
      const int exchange = lane_ / 16 * 16 ^ swizzle(row);
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        ptx::ldmatrix_x4(q_[i][d], from + row_offset(row) + vector_offset(2 * d, exchange));
#pragma unroll
        for (int j = 0; j < 4; ++j) q_[i][d][j] ^= sign;
      }
    }
    __syncthreads();
  }

  // Where the key group's part of a half tile is.
  __device__ __forceinline__ unsigned char* ring_slot(int half) const {
    return ring() + unsigned(half) % unsigned(kAt.slots) * kAt.half + row_offset(16 * key_group_);
  }

  // Asks for the key group's part of a half tile of the segment; -1: nothing.
  __device__ __forceinline__ void request_half(int half) const {
    const int tile = has_values() ? half >> 1 : half;
    if (half >= 0 && tile < s_.num_tiles) {
      const bool of_values = has_values() && half % 2 == 1;
      const int64_t key = (s_.first_tile + tile) * kTileKeys + 16 * key_group_;
      const int64_t stride = of_values ? p_.v_stride_s : p_.k_stride_s;
      const T* from = static_cast<const T*>(of_values ? p_.v : p_.k) +
                      s_.b * (of_values ? p_.v_stride_b : p_.k_stride_b) +
                      s_.kv_head * (of_values ? p_.v_stride_h : p_.k_stride_h) + key * stride;
      if (key >= s_.keys.begin && key + 16 <= s_.prefix && p_.whole_vectors) {
        copy_keys<true>(ring_slot(half), from, stride, 0);
      } else {
        copy_keys<false>(ring_slot(half), from, stride, readable_keys(p_, s_, key));
      }
    }
    ptx::cp_async_commit();
  }

  // Of 16 rows of keys or values those whose bit in `readable` is set, or all; zeros in
  // place of others.
  template <bool kAll>
  __device__ __forceinline__ void copy_keys(unsigned char* to, const T* from, int64_t stride,
                                            uint32_t readable) const {
    const int thread = int(threadIdx.x) % kGroupThreads;
    const int row = thread / kAcross, vector = thread % kAcross;
    if (kDown * kAcross < kGroupThreads && row >= kDown) return;
    to += row_offset(row);
    from += row * stride + vector * 8;
    readable >>= row;
    // The thread's rows are row + a multiple of kDown, a power of two, so that the exchanges of the
    // two parts add up.
    const int place = vector * 16 ^ swizzle(row);
    if (kAll || p_.kv_aligned) {
#pragma unroll
      for (int i = 0; i < 16 / kDown; ++i, from += kDown * stride) {
#pragma unroll
        for (int j = 0; j < kVectors / kAcross; ++j) {
          const bool valid =
              kAll || ((readable >> (i * kDown) & 1) && (vector + j * kAcross) * 8 < p_.head_dim);
          ptx::cp_async_16(
              to + row_offset(i * kDown) + j * kAcross * 16 + (place ^ swizzle(i * kDown)),
              from + j * kAcross * 8, valid);
        }
      }
    } else {
      copy_unaligned_keys(to, from, stride, readable, vector, place);
    }
  }

  __device__ __forceinline__ void copy_unaligned_keys(unsigned char* to, const T* from,
                                                      int64_t stride, uint32_t readable, int vector,
                                                      int place) const {
#pragma unroll 1
    for (int i = 0; i < 16 / kDown; ++i, from += kDown * stride) {
#pragma unroll 1
      for (int j = 0; j < kVectors / kAcross; ++j) {
        copy_vector(to + row_offset(i * kDown) + j * kAcross * 16 + (place ^ swizzle(i * kDown)),
                    from + j * kAcross * 8,
                    (readable >> (i * kDown) & 1) && (vector + j * kAcross) * 8 < p_.head_dim,
                    false);
      }
    }
  }

  // Until the half tile whose turn it is has come.
  __device__ __forceinline__ void await_half() const {
    ptx::cp_async_wait<kAt.ahead - 1>();
    // What the group's other threads have copied is there too, and nobody reads the slot that is
    // filled next any more.
    if constexpr (kRowWarps == 1) {
      __syncwarp();
    } else {
      ptx::named_barrier(1 + key_group_, kGroupThreads);
    }
  }

  // --- the softmax of one warp's rows over its keys. Thread t has of each 16 x 8 product elements
  // 2 (t % 4) and the next of rows t / 4 and t / 4 + 8 ---

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        limit(i, half) = -INFINITY;
        sum(i, half) = 0.f;
      }
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out_[i][d][j] = 0.f;
      }
    }
  }

  // Of the thread's rows: the largest logit that changes nothing, kAttentionSlack above what
  // exponents are relative to, -inf before the first key; and the thread's part of the sum of
  // weights.
  __device__ __forceinline__ float& limit(int tile, int half) {
    return own_value(limit_, 0, tile, half);
  }
  __device__ __forceinline__ float& sum(int tile, int half) {
    return own_value(sum_, 1, tile, half);
  }
  // With chunks there are no registers left for these.
  __device__ __forceinline__ float& own_value(float (&values)[kRowTiles][2], int which, int tile,
                                              int half) const {
    if constexpr (kChunks) {
      float* const kept = reinterpret_cast<float*>(ptx::shared_memory() + kAt.own_values);
      return kept[((which * kRowTiles + tile) * 2 + half) * kAttentionThreads + int(threadIdx.x)];
    } else {
      return values[tile][half];
    }
  }

  __device__ __forceinline__ float shift(int tile, int half) {
    const float top = limit(tile, half);
    return top == -INFINITY ? 0.f : top - kAttentionSlack;
  }

  // Row of the block, of the thread's rows.
  __device__ __forceinline__ int own_row(int tile, int half) const {
    return warp_row_ + 16 * tile + 8 * half + lane_ / 4;
  }

  __device__ __forceinline__ void multiply_keys(const unsigned char* keys, int tile,
                                                uint32_t (&weights)[kRowTiles][4]) {
    const int64_t key = (s_.first_tile + tile) * kTileKeys + 16 * key_group_;
    const int row = lane_ % 8 + lane_ / 16 * 8;
    const int exchange = lane_ / 8 % 2 * 16 ^ swizzle(row);
    float logits[kRowTiles][2][4] = {};
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t k[4];
      ptx::ldmatrix_x4(k, keys + row_offset(row) + vector_offset(2 * d, exchange));
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        ptx::mma_m16n8k16<T>(logits[i][0], q_[i][d], k[0], k[1]);
        ptx::mma_m16n8k16<T>(logits[i][1], q_[i][d], k[2], k[3]);
      }
    }
    if (key < s_.all_see_from || key + 16 > s_.prefix || p_.softcap > 0) adjust(logits, key);
    if (kChunks) keep_for_chunks(logits, tile);
    soften(logits, weights);
  }

  // Softcap and masks.
  __device__ __forceinline__ void adjust(float (&logits)[kRowTiles][2][4], int64_t key) const {
    // Of the thread's rows four bits each, for its keys: row by row, as what a mask needs would
    // take too many registers for all rows at once.
    uint32_t seen = 0;
#pragma unroll 1
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const PackedRow at(p_, s_.kv_head, s_.first_packed + own_row(i / 2, i % 2));
      const RowView view(p_, s_.b, s_.prefix, at.row);
#pragma unroll 1
      for (int j = 0; j < 4; ++j) {
        const bool sees = view.sees(key + j / 2 * 8 + lane_ % 4 * 2 + j % 2);
        seen |= uint32_t(sees) << (4 * i + j);
      }
    }
    const float inner = fabsf(p_.scale) / p_.softcap, outer = p_.softcap * kLog2E;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float& x = logits[i][j / 2][2 * half + j % 2];
          if (p_.softcap > 0) x = outer * tanhf(x * inner);
          if (!(seen >> (8 * i + 4 * half + j) & 1)) x = -INFINITY;
        }
      }
    }
  }

  // 2^(logit - shift) of 16 keys, as the left operand of the product with the values.
  __device__ __forceinline__ void soften(float (&logits)[kRowTiles][2][4],
                                         uint32_t (&weights)[kRowTiles][4]) {
    float top[kRowTiles][2];
    bool grows = false;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = 2 * half;
        top[i][half] = fmaxf(fmaxf(logits[i][0][j], logits[i][0][j + 1]),
                             fmaxf(logits[i][1][j], logits[i][1][j + 1])) *
                       p_.factor;
        grows |= top[i][half] > limit(i, half);
      }
    }
    if (__any_sync(kAllLanes, grows)) raise(top);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float down = -shift(i, half);
        float w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          w[j] = ptx::exp2_approx(fmaf(logits[i][j / 2][2 * half + j % 2], p_.factor, down));
        }
        sum(i, half) += (w[0] + w[1]) + (w[2] + w[3]);
        weights[i][half] = pack(T{}, w[0], w[1]);
        weights[i][2 + half] = pack(T{}, w[2], w[3]);
      }
    }
  }

  // Rows whose logits have outgrown their reference get a new one.
  __device__ __forceinline__ void raise(const float (&top)[kRowTiles][2]) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = top[i][half];
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
        const float before = limit(i, half);
        if (!(most > before)) continue;
        // What was summed before, if anything, was relative to the old one.
        limit(i, half) = most + kAttentionSlack;
        const float scale =
            before == -INFINITY ? 1.f : ptx::exp2_approx(before - (most + kAttentionSlack));
        sum(i, half) *= scale;
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d) {
          out_[i][d][2 * half] *= scale;
          out_[i][d][2 * half + 1] *= scale;
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_values(const unsigned char* values,
                                                  const uint32_t (&weights)[kRowTiles][4]) {
    const int row = lane_ % 16, exchange = lane_ / 16 * 16 ^ swizzle(row);
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t v[4];
      ptx::ldmatrix_x4_trans(v, values + row_offset(row) + vector_offset(2 * d, exchange));
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        ptx::mma_m16n8k16<T>(out_[i][2 * d], weights[i], v[0], v[1]);
        ptx::mma_m16n8k16<T>(out_[i][2 * d + 1], weights[i], v[2], v[3]);
      }
    }
  }

  // --- log-sum-exps of chunks ---

  // Whether chunk borders are borders of the 16 keys of a group.
  __device__ __forceinline__ bool chunks_of_groups() const { return p_.chunk_size % 16 == 0; }

  __device__ __forceinline__ float* logits_at(int row) const {
    return reinterpret_cast<float*>(ptx::shared_memory() + kAt.logits) + row * kAt.logits_pitch;
  }
  // Of a row and 16 keys of a part, in the same place.
  __device__ __forceinline__ PartialSum& group_sum(int row, int group) const {
    return reinterpret_cast<PartialSum*>(ptx::shared_memory() +
                                         kAt.logits)[row * kAt.part_pitch + group];
  }

  // What chunks need of the warp's keys in a tile.
  __device__ __forceinline__ void keep_for_chunks(const float (&logits)[kRowTiles][2][4],
                                                  int tile) const {
    const int64_t key = (s_.first_tile + tile) * kTileKeys + 16 * key_group_;
    const int prefix_keys = int(clamp_between(s_.prefix - key, 0, 16));
    if (!chunks_of_groups()) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float* const to = logits_at(own_row(i, j % 2)) + 16 * key_group_ + j / 2 * 8;
          *reinterpret_cast<float2*>(to + lane_ % 4 * 2) = make_float2(
              logits[i][j / 2][j % 2 * 2] * p_.factor, logits[i][j / 2][j % 2 * 2 + 1] * p_.factor);
        }
      }
      return;
    }
    const int group = tile % kPartTiles * kKeyGroups + key_group_;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        PartialSum row = no_keys();
        float x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool counts = j / 2 * 8 + lane_ % 4 * 2 + j % 2 < prefix_keys;
          x[j] = counts ? logits[i][j / 2][2 * half + j % 2] * p_.factor : -INFINITY;
          row.max = fmaxf(row.max, x[j]);
        }
        row.max = fmaxf(row.max, __shfl_xor_sync(kAllLanes, row.max, 1));
        row.max = fmaxf(row.max, __shfl_xor_sync(kAllLanes, row.max, 2));
        const float shift = row.max == -INFINITY ? 0.f : row.max;
#pragma unroll
        for (int j = 0; j < 4; ++j) row.sum += ptx::exp2_approx(x[j] - shift);
        row.sum += __shfl_xor_sync(kAllLanes, row.sum, 1);
        row.sum += __shfl_xor_sync(kAllLanes, row.sum, 2);
        if (lane_ % 4 == 0) group_sum(own_row(i, half), group) = row;
      }
    }
  }

  // Of keys [begin, end) of the part.
  __device__ __forceinline__ PartialSum sum_keys(int row, int begin, int end) const {
    if (!chunks_of_groups()) return sum_logits(logits_at(row), begin, end);
    PartialSum total = no_keys();
    for (int group = begin / 16; group * 16 < end; ++group) {
      total = add_partial_sums(total, group_sum(row, group));
    }
    return total;
  }

  // When a part is complete, its chunks.
  __device__ __forceinline__ void chunks_after(int tile) const {
    const int part_tiles = chunks_of_groups() ? kPartTiles : 1;
    if ((tile + 1) % part_tiles != 0 && tile + 1 < s_.num_tiles) return;
    __syncthreads();
    emit_chunks(p_, s_, tile / part_tiles, part_tiles * kTileKeys,
                reinterpret_cast<PartialSum*>(ptx::shared_memory() + kAt.carry),
                [&](int row, int begin, int end) { return sum_keys(row, begin, end); });
    __syncthreads();
  }

  // --- the end of a segment ---

  // Adds the parts of the key groups; the unit's result, or a partial for the combine.
  __device__ __forceinline__ void finish() {
    PartialSum* const sums = reinterpret_cast<PartialSum*>(ptx::shared_memory() + kAt.sums);
    float* const outputs = reinterpret_cast<float*>(ring());
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = sum(i, half);
        total += __shfl_xor_sync(kAllLanes, total, 1);
        total += __shfl_xor_sync(kAllLanes, total, 2);
        if (lane_ % 4 == 0) {
          sums[key_group_ * kRows + own_row(i, half)] =
              total == 0.f ? no_keys() : PartialSum{shift(i, half), total};
        }
      }
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // nobody reads the ring any more
    if (has_values()) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const to = outputs + (key_group_ * kRows + own_row(i, half)) * kAt.output_pitch;
#pragma unroll
          for (int d = 0; d < kDim / 8; ++d) {
            *reinterpret_cast<float2*>(to + 8 * d + lane_ % 4 * 2) =
                make_float2(out_[i][d][2 * half], out_[i][d][2 * half + 1]);
          }
        }
      }
    }
    const bool whole = s_.segment.opens && s_.segment.closes;
    const int64_t partial = partial_of(blockIdx.x, s_.segment.opens);
    if (int(threadIdx.x) < s_.num_rows) {
      const int row = int(threadIdx.x);
      PartialSum total = no_keys();
#pragma unroll
      for (int g = 0; g < kKeyGroups; ++g) total = add_partial_sums(total, sums[g * kRows + row]);
      float scale = 1.f;
      if (whole) {
        const PackedRow at(p_, s_.kv_head, s_.first_packed + row);
        scale = output_scale(p_, total, at.head);
        p_.lse[at.output(p_, s_.b)] = natural_lse(total);
      } else {
        p_.workspace.sums[partial * kRows + row] = total;
      }
      // In place of its part, what each group's output is multiplied with.
#pragma unroll
      for (int g = 0; g < kKeyGroups; ++g) {
        PartialSum& part = sums[g * kRows + row];
        part.sum = part.max == -INFINITY ? 0.f : exp2f(part.max - total.max) * scale;
      }
    }
    __syncthreads();
    for (int i = int(threadIdx.x); has_values() && i < s_.num_rows * (kDim / 4);
         i += kAttentionThreads) {
      const int row = i / (kDim / 4), column = i % (kDim / 4) * 4;
      if (column >= p_.head_dim) continue;
      float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int g = 0; g < kKeyGroups; ++g) {
        const float scale = sums[g * kRows + row].sum;
        const float4 part = *reinterpret_cast<const float4*>(
            outputs + (g * kRows + row) * kAt.output_pitch + column);
        x.x += scale * part.x, x.y += scale * part.y;
        x.z += scale * part.z, x.w += scale * part.w;
      }
      if (whole) {
        const int64_t at = PackedRow(p_, s_.kv_head, s_.first_packed + row).output(p_, s_.b);
        store4(static_cast<T*>(p_.out) + at * p_.head_dim + column, x);
      } else {
        store4(p_.workspace.values + (partial * kRows + row) * p_.head_dim + column, x);
      }
    }
  }

  const AttentionCall& p_;
  const SegmentState& s_;
  const int lane_;
  int key_group_, warp_row_;  // of the warp: its keys of a tile, its first row

  uint32_t q_[kRowTiles][kDim / 16][4];
  // Of the thread's rows: the largest logit that changes nothing, kAttentionSlack above what
  // exponents are relative to, -inf before the first key.
  float limit_[kRowTiles][2], sum_[kRowTiles][2];
  float out_[kRowTiles][kDim / 8][4];
};

template <typename T, int kDim, int kRows, bool kChunks>
__global__ void __launch_bounds__(kAttentionThreads, kAttentionBlocksPerSm)
    tree_attention_kernel(const __grid_constant__ AttentionCall call) {
  ptx::let_successors_begin();
  SegmentState& state = *reinterpret_cast<SegmentState*>(ptx::shared_memory());
  AttentionBlock<T, kDim, kRows, kChunks> block(call, state);
  for_each_segment(call, state, [&] { block.run(); });
}

template <typename T, int kDim, int kRows, bool kChunks>
cudaError_t launch_attention_rows(const AttentionCall& call, cudaStream_t stream) {
  return launch(tree_attention_kernel<T, kDim, kRows, kChunks>, unsigned(call.cut.grid),
                kAttentionThreads, size_t(attention_layout(kDim, kRows, kChunks).bytes), stream,
                call);
}

template <typename T, int kDim, bool kChunks>
cudaError_t launch_attention(const AttentionCall& call, cudaStream_t stream) {
  switch (call.cut.rows_per_block) {
    case 16:
      return launch_attention_rows<T, kDim, 16, kChunks>(call, stream);
    case 32:
      return launch_attention_rows<T, kDim, 32, kChunks>(call, stream);
    default:
      return launch_attention_rows<T, kDim, 64, kChunks>(call, stream);
  }
}

}  // namespace specextend
