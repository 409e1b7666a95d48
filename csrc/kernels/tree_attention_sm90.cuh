#pragma once

// tree_attention for more than 64 rows of a KV head, on Hopper.
//
// A block holds 128 rows (tree rows x group), 64 in each of two warpgroups that multiply: logits of
// a tile of keys and values of the tile before at once, the softmax of the one while the other goes
// on. Of a third warpgroup, warp 0 walks the block's part of the work and copies tiles of keys and
// values to shared memory, as far ahead as there is room; warp 1 prepares tiles of which not every
// row sees every key, so that the others have no registers to spend on masks. With more than 128
// rows two blocks are a cluster over the same keys: each copies half of every tile to both.
//
// Who waits for whom. All but the last two are mbarriers in shared memory; a phase ends with all
// its arrivals and bytes. Waits for full, posted and seen_ready begin with parity 0; those for
// empty, taken and seen_read with parity 1, which is over at once: the places are free. Everybody
// takes all jobs, and all their tiles, in order, so that nobody is two phases from a barrier that
// it waits at.
//   full_k, full_v  1 arrival, by the copying thread of the block, with the bytes of the whole
//                   tile. In a cluster half of them come from the other block, perhaps before it.
//   empty_k         8 arrivals from each block of the cluster, one per multiplying warp when its
//                   product has ended (wait_products): only then may any block copy to the place.
//   empty_v         9 likewise: warp 1 reads values, too, and arrives for every tile.
//   posted, taken   jobs, in a ring of two: 1 arrival by the copying thread; 9 by the readers,
//                   after their last look at the job. Tiles of -1 end them; nobody takes that.
//   seen_ready      1 arrival by warp 1 for every tile with a mask, when the mask is written and
//                   unread values are cleared (generic writes, then a proxy fence of every lane).
//   seen_read       8 arrivals, by the multiplying warps when they have used the mask.
//   named barriers  of each multiplying warpgroup, around the writing of its queries.
//   cluster barrier all threads of the cluster, after the barriers are made, and at the end: no
//                   block may end while another still writes to it or arrives at it. All bytes
//                   that a block was sent have been waited for by then.
// Both blocks of a cluster have the same tiles, and one without rows goes through them as well. A
// block without any posts the end at once. A unit without tiles is a job of 0 tiles.

#include <cuda_runtime.h>

#include <cstdint>

#include "hopper_tiles.h"
#include "kernels/attention_work.cuh"
#include "kernels/hopper.cuh"
#include "kernels/launch.cuh"
#include "kernels/ptx.cuh"
#include "params.h"

namespace specextend {

constexpr int kHopperThreads = 384;  // a warpgroup that copies, two that multiply
constexpr int kHopperReaders = 8;    // warps that multiply
constexpr int kHopperProducerRegisters = 72, kHopperConsumerRegisters = 216;  // of a thread
// A thread begins with its share of the multiprocessor's 64 K. Whoever asks for more waits until it
// is there: for ever, unless others give up as much.
constexpr int kHopperRegisters = 65536 / kHopperThreads / 8 * 8;
static_assert(128 * kHopperProducerRegisters + 256 * kHopperConsumerRegisters <=
              kHopperThreads * kHopperRegisters);
static_assert(kHopperProducerRegisters % 8 == 0 && kHopperProducerRegisters >= 24 &&
              kHopperConsumerRegisters % 8 == 0 && kHopperConsumerRegisters <= 256);
constexpr int kHopperSharedBytes = 227 * 1024;  // that a block can have

constexpr int kOwnRowsBarrier = 1;  // and the next: of each warpgroup that multiplies

struct HopperCall {
  AttentionCall attention;  // a block of its cut is a cluster here
  hopper::TensorMap k, v;
  int cluster;  // blocks: 1 or 2
};

// Tiles for head dimensions up to kDim, a multiple of 64; columns behind the head dimension are 0.
template <int kDim>
struct HopperShape {
  static constexpr int kKeys = hopper_tile_keys(kDim);
  static constexpr int kTile = kKeys * kDim;  // elements
  static constexpr int kQueryBytes = kHopperBlockRows * kDim * 2;
  static constexpr int kBarrierBytes = 3072;
  static constexpr int kStages =
      (kHopperSharedBytes - kBarrierBytes - kQueryBytes) / (2 * kTile * 2);
  static constexpr int kSharedBytes = kQueryBytes + kStages * 2 * kTile * 2 + kBarrierBytes;
  static_assert(kStages >= 2);
};

// What a block has of a unit, as the warp that copies tells the others. Keys are below 2^31.
struct HopperJob {
  SegmentState at;
  int row_begin;               // the block's first row of the KV head
  int key, tiles;              // the first key, and how many tiles; -1: there is no more to do
  int plain_begin, plain_end;  // those of the tiles of which every row sees every key
};

template <int kDim>
struct HopperShared {
  using Shape = HopperShape<kDim>;
  static constexpr int kJobs = 2;
  struct Barriers {
    uint64_t full_k[Shape::kStages], full_v[Shape::kStages];
    uint64_t empty_k[Shape::kStages], empty_v[Shape::kStages];
    uint64_t posted[kJobs], taken[kJobs];
    uint64_t seen_ready, seen_read;
    HopperJob jobs[kJobs];
    SegmentState state;                                  // of the warp that copies
    uint64_t seen[kHopperBlockRows][Shape::kKeys / 64];  // which keys of a tile each row sees
  };
  static_assert(sizeof(Barriers) <= Shape::kBarrierBytes);
  unsigned char* const base = ptx::shared_memory();

  template <typename T>
  __device__ __forceinline__ T* queries(int warpgroup) const {
    return reinterpret_cast<T*>(base) + warpgroup * kHopperWarpgroupRows * kDim;
  }
  template <typename T>
  __device__ __forceinline__ T* keys(int stage) const {
    return reinterpret_cast<T*>(base + Shape::kQueryBytes) + stage * Shape::kTile;
  }
  template <typename T>
  __device__ __forceinline__ T* values(int stage) const {
    return keys<T>(Shape::kStages + stage);
  }
  __device__ __forceinline__ Barriers& barriers() const {
    return *reinterpret_cast<Barriers*>(base + Shape::kSharedBytes - Shape::kBarrierBytes);
  }
};

// Where in its places the next tile is.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

__device__ __forceinline__ void wait_for(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// The warp has read a tile: told to all blocks that copied parts of it.
__device__ __forceinline__ void release(uint64_t* empty, int cluster) {
  __syncwarp();
  const int lane = int(threadIdx.x % 32);
  if (lane < cluster) hopper::arrive_in_cluster(empty, lane);
}

// The tile's rows [first, first + rows) of [kKeys, kDim], in a cluster half of them, to all its
// blocks.
template <int kDim, typename T>
__device__ __forceinline__ void copy_tile(const HopperCall& c, const hopper::TensorMap& map,
                                          T* tile, uint64_t* full, int rank, int key, int kv_head,
                                          int b) {
  using Shape = HopperShape<kDim>;
  // Keys that one cluster alone reads need not stay in the L2 cache.
  const hopper::Keep keep =
      c.attention.cut.row_blocks == 1 ? hopper::Keep::kFirstToGo : hopper::Keep::kNormal;
  const int first = rank * (Shape::kKeys / 2);
  ptx::mbarrier_arrive_expect_tx(full, Shape::kTile * 2);
#pragma unroll
  for (int column = 0; column < kDim; column += 64) {
    T* const to = tile + shared_index(Shape::kKeys, first, column);
    const int row = key + first;
    if (c.cluster == 1) {
      hopper::copy_box(to, map, full, keep, column, row, kv_head, b);
    } else {
      hopper::copy_box_to_both(to, map, full, keep, column, row, kv_head, b);
    }
  }
}

// The job that the warp that copies is at.
template <int kDim>
__device__ __forceinline__ HopperJob describe_job(const SegmentState& state, int rank) {
  constexpr int kKeys = hopper_tile_keys(kDim);
  const auto tile = [&](int64_t key) {  // of the job, at or behind `key`
    return int(clamp_between(key - state.first_tile, 0, state.num_tiles));
  };
  return {state,
          state.first_packed + rank * kHopperBlockRows,
          int(state.first_tile * kKeys),
          state.done ? -1 : state.num_tiles,
          tile(divide_up(state.all_see_from, kKeys)),
          tile(state.prefix / kKeys)};
}

// By the first warp, of which one thread copies and tells the others what.
template <typename T, int kDim>
__device__ __forceinline__ void copy_tiles(const HopperCall& c, const HopperShared<kDim>& shared,
                                           int rank) {
  using Shape = HopperShape<kDim>;
  auto& barriers = shared.barriers();
  SegmentState& state = barriers.state;
  Ring<HopperShared<kDim>::kJobs> jobs;
  Ring<Shape::kStages> ring;
  state.begin(c.attention, int(blockIdx.x) / c.cluster);
  for (;; jobs.advance()) {
    state.advance(c.attention);
    __syncwarp();
    const bool done = state.done;
    if (threadIdx.x == 0) {
      wait_for(&barriers.taken[jobs.stage], jobs.parity ^ 1);
      HopperJob& job = barriers.jobs[jobs.stage];
      job = describe_job<kDim>(state, rank);
      ptx::mbarrier_arrive(&barriers.posted[jobs.stage]);
      for (int t = 0; t < job.tiles; ++t, ring.advance()) {
        const int key = job.key + t * Shape::kKeys;
        wait_for(&barriers.empty_k[ring.stage], ring.parity ^ 1);
        copy_tile<kDim>(c, c.k, shared.template keys<T>(ring.stage), &barriers.full_k[ring.stage],
                        rank, key, state.kv_head, state.b);
        wait_for(&barriers.empty_v[ring.stage], ring.parity ^ 1);
        copy_tile<kDim>(c, c.v, shared.template values<T>(ring.stage), &barriers.full_v[ring.stage],
                        rank, key, state.kv_head, state.b);
      }
    }
    __syncwarp();
    if (done) return;
  }
}

// --- tiles of which not every row sees all keys ---

// Of the 64 keys from `key` on, those that a row sees: bit i for key + i.
__device__ __forceinline__ uint64_t visible_keys(const RowView& view, int64_t key) {
  uint64_t bits = low_bits(view.prefix - key) & ~low_bits(view.first - key);
  const int64_t slot = key - view.prefix;
  if (slot <= -64 || slot >= view.num_tree_keys) return bits;
  uint64_t tree = view.mask ? mask_bits(view.mask, view.num_tree_keys, slot)
                            : low_bits(view.last + 1 - slot) & low_bits(view.num_tree_keys - slot) &
                                  ~low_bits(-slot);
  for (uint64_t rest = view.window ? tree : 0; rest != 0; rest &= rest - 1) {
    const int i = __ffsll(static_cast<long long>(rest)) - 1;
    if (!view.sees(key + i)) tree &= ~(uint64_t(1) << i);
  }
  return bits | tree;
}

// Zeros in the place of values that no row of the unit sees: they may be anything, and a weight of
// 0 would not undo a NaN. By one warp.
template <int kDim, typename T>
__device__ __forceinline__ void clear_unread(const TreeAttentionParams& p, const SegmentState& at,
                                             int64_t key, T* values) {
  constexpr int kKeys = hopper_tile_keys(kDim);
  for (int first = 0; first < kKeys; first += 32) {
    for (uint32_t rest = ~readable_keys(p, at, key + first); rest != 0; rest &= rest - 1) {
      const int row = first + __ffs(int(rest)) - 1;
      for (int column = int(threadIdx.x % 32) * 8; column < kDim; column += 32 * 8) {
        *reinterpret_cast<uint4*>(values + shared_index(kKeys, row, column)) =
            make_uint4(0, 0, 0, 0);
      }
    }
  }
}

// By one warp, which tells the others which keys each row sees.
template <typename T, int kDim>
__device__ __forceinline__ void prepare_masks(const HopperCall& c,
                                              const HopperShared<kDim>& shared) {
  using Shape = HopperShape<kDim>;
  constexpr int kWords = Shape::kKeys / 64;
  const TreeAttentionParams& p = c.attention;
  const int lane = int(threadIdx.x % 32), group = p.num_heads / p.num_kv_heads;
  auto& barriers = shared.barriers();
  Ring<HopperShared<kDim>::kJobs> jobs;
  Ring<Shape::kStages> ring;
  Ring<1> seen;
  for (;; jobs.advance()) {
    wait_for(&barriers.posted[jobs.stage], jobs.parity);
    const HopperJob& job = barriers.jobs[jobs.stage];
    if (job.tiles < 0) return;
    for (int t = 0; t < job.tiles; ++t, ring.advance()) {
      const int64_t key = job.key + int64_t(t) * Shape::kKeys;
      const bool plain = t >= job.plain_begin && t < job.plain_end;
      if (!plain) {
        wait_for(&barriers.seen_read, seen.parity ^ 1);
        for (int i = lane; i < kHopperBlockRows * kWords; i += 32) {
          const int row = i / kWords, word = i % kWords;
          const RowView view(p, job.at.b, job.at.prefix, (job.row_begin + row) / group);
          barriers.seen[row][word] = visible_keys(view, key + word * 64);
        }
      }
      wait_for(&barriers.full_v[ring.stage], ring.parity);
      if (!plain) {
        clear_unread<kDim>(p, job.at, key, shared.template values<T>(ring.stage));
        hopper::publish_shared();
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&barriers.seen_ready);
        seen.advance();
      }
      release(&barriers.empty_v[ring.stage], c.cluster);
    }
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&barriers.taken[jobs.stage]);
  }
}

// --- softmax of the two rows that a thread has a part of ---

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// Of a tile's logits a thread has those of fragment_row and fragment_column (hopper_tiles.h): row r
// of two at i / 2 % 2 == r. `scale` > 0 makes base-2 exponents of logits.
struct OnlineSoftmax {
  float scale;
  float max[2] = {-INFINITY, -INFINITY};  // of the logits
  float sum[2] = {0.f, 0.f};              // of the thread's columns
  float correction[2];                    // of what was summed before the last tile

  // In base 2; 0 for a row that has seen nothing, so that no exponent is -inf + inf.
  __device__ __forceinline__ float offset(int r) const {
    return max[r] == -INFINITY ? 0.f : max[r] * scale;
  }

  __device__ __forceinline__ void raise(int r, float to) {
    const float before = max[r] * scale;
    max[r] = fmaxf(max[r], to);
    correction[r] = ptx::exp2_approx(before - offset(r));
    sum[r] *= correction[r];
  }

  // Logits to weights.
  template <int kN>
  __device__ __forceinline__ void add_tile(float (&s)[kN]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m = -INFINITY;
#pragma unroll
      for (int i = 2 * r; i < kN; i += 4) m = fmaxf(m, fmaxf(s[i], s[i + 1]));
      raise(r, quad_max(m));
      const float x = offset(r);
#pragma unroll
      for (int i = 2 * r; i < kN; i += 4) {
        s[i] = ptx::exp2_approx(fmaf(s[i], scale, -x));
        s[i + 1] = ptx::exp2_approx(fmaf(s[i + 1], scale, -x));
        sum[r] += s[i] + s[i + 1];
      }
    }
  }

  // The same for a tile of the prefix, with the log-sum-exp of each chunk of kChunk keys to
  // chunk_lse[r], null for a row that is none. Exponents are taken once, from the chunk's maximum.
  template <int kChunk, int kN>
  __device__ __forceinline__ void add_tile_of_chunks(float (&s)[kN], float* const (&chunk_lse)[2]) {
    constexpr int kSpan = kChunk / 2, kCount = kN / kSpan;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float m[kCount], all = -INFINITY;
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        m[c] = -INFINITY;
#pragma unroll
        for (int i = c * kSpan + 2 * r; i < (c + 1) * kSpan; i += 4) {
          m[c] = fmaxf(m[c], fmaxf(s[i], s[i + 1]));
        }
        m[c] = quad_max(m[c]);
        all = fmaxf(all, m[c]);
      }
      raise(r, all);
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        const float x = m[c] * scale;
        float total = 0.f;
#pragma unroll
        for (int i = c * kSpan + 2 * r; i < (c + 1) * kSpan; i += 4) {
          s[i] = ptx::exp2_approx(fmaf(s[i], scale, -x));
          s[i + 1] = ptx::exp2_approx(fmaf(s[i + 1], scale, -x));
          total += s[i] + s[i + 1];
        }
        const float factor = ptx::exp2_approx(x - offset(r));
        sum[r] += total * factor;
#pragma unroll
        for (int i = c * kSpan + 2 * r; i < (c + 1) * kSpan; i += 4) {
          s[i] *= factor;
          s[i + 1] *= factor;
        }
        store_chunk(chunk_lse[r], c, {x, quad_sum(total)});
      }
    }
  }

  // Of a tile that may hold other keys too: chunks of its first `columns` columns. Changes nothing.
  template <int kChunk, int kN>
  __device__ __forceinline__ void store_chunks(const float (&s)[kN], int thread, int columns,
                                               float* const (&chunk_lse)[2]) const {
    constexpr int kSpan = kChunk / 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < kN / kSpan; ++c) {
        if (c * kChunk >= columns) continue;
        float m = -INFINITY, total = 0.f;
#pragma unroll
        for (int i = c * kSpan; i < (c + 1) * kSpan; ++i) {
          if (i / 2 % 2 == r && fragment_column(thread, i) < columns) m = fmaxf(m, s[i]);
        }
        m = quad_max(m);
        const float x = m == -INFINITY ? 0.f : m * scale;
#pragma unroll
        for (int i = c * kSpan; i < (c + 1) * kSpan; ++i) {
          if (i / 2 % 2 != r || fragment_column(thread, i) >= columns) continue;
          total += ptx::exp2_approx(fmaf(s[i], scale, -x));
        }
        total = quad_sum(total);
        store_chunk(chunk_lse[r], c, m == -INFINITY ? no_keys() : PartialSum{x, total});
      }
    }
  }

  // By one of the four threads that know it.
  __device__ __forceinline__ static void store_chunk(float* to, int c, PartialSum s) {
    if (to && int(threadIdx.x) % 4 == c % 4) to[c] = natural_lse(s);
  }

  // Over all keys seen so far. By whole warps.
  __device__ __forceinline__ PartialSum total(int r) const {
    const float all = quad_sum(sum[r]);
    return max[r] == -INFINITY ? no_keys() : PartialSum{offset(r), all};
  }
};

// --- the warpgroups that multiply ---

// The warpgroup's 64 rows of q to shared memory, zeros where there are none.
template <typename T, int kDim>
__device__ __forceinline__ void load_queries(const TreeAttentionParams& p, int b, int kv_head,
                                             int row_begin, int thread, T* queries) {
  const uint32_t sign = p.scale < 0 ? 0x80008000u : 0;  // AttentionCall::factor is without it
#pragma unroll 4
  for (int i = thread; i < kHopperWarpgroupRows * kDim / 8; i += 128) {
    const int row = i / (kDim / 8), column = i % (kDim / 8) * 8;
    const PackedRow from(p, kv_head, row_begin + row);
    uint4 x = make_uint4(0, 0, 0, 0);
    if (from.row < p.num_rows && column < p.head_dim) {
      x = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.q) + b * p.q_stride_b +
                                          from.row * p.q_stride_m + from.head * p.q_stride_h +
                                          column);
      x.x ^= sign, x.y ^= sign, x.z ^= sign, x.w ^= sign;
    }
    *reinterpret_cast<uint4*>(queries + shared_index(kHopperWarpgroupRows, row, column)) = x;
  }
}

// Logits become -inf where a row does not see the key.
template <int kWords>
__device__ __forceinline__ void mask_logits(const uint64_t (&seen)[kHopperBlockRows][kWords],
                                            int first_row, int thread, float (&s)[32 * kWords]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const uint64_t bits =
          seen[first_row + fragment_row(thread, 2 * r)][word] >> fragment_column(thread, 0);
#pragma unroll
      for (int i = 2 * r; i < 32; i += 4) {
        const int bit = fragment_column(0, i);
        if (!(bits >> bit & 1)) s[32 * word + i] = -INFINITY;
        if (!(bits >> (bit + 1) & 1)) s[32 * word + i + 1] = -INFINITY;
      }
    }
  }
}

// The outputs of a whole unit, or the block's part of one to its place for the combine. The
// warpgroup's rows begin at `unit_row` of the unit and at `row_begin` of the KV head.
template <typename T, int kDim>
__device__ __forceinline__ void store_rows(const HopperCall& c, const HopperJob& job, int unit_row,
                                           int row_begin, const OnlineSoftmax& softmax, int thread,
                                           const float (&o)[kDim / 2]) {
  const AttentionCall& p = c.attention;
  const Segment segment = job.at.segment;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const PartialSum sum = softmax.total(r);
    const int row = fragment_row(thread, 2 * r);
    const PackedRow packed(p, job.at.kv_head, row_begin + row);
    if (packed.row >= p.num_rows) continue;
    const bool notes = thread % 4 == 0;
    if (segment.opens && segment.closes) {
      const int64_t to = packed.output(p, job.at.b);
      if (notes) p.lse[to] = natural_lse(sum);
      const float scale = output_scale(p, sum, packed.head);
      T* const out = static_cast<T*>(p.out) + to * p.head_dim;
#pragma unroll
      for (int i = 2 * r; i < kDim / 2; i += 4) {
        const int column = fragment_column(thread, i);
        if (column >= p.head_dim) continue;
        *reinterpret_cast<uint32_t*>(out + column) = pack(T{}, o[i] * scale, o[i + 1] * scale);
      }
    } else {
      const int block = int(blockIdx.x) / c.cluster;
      const int64_t to = partial_of(block, segment.opens) * p.cut.rows_per_block + unit_row + row;
      if (notes) p.workspace.sums[to] = sum;
      float* const values = p.workspace.values + to * p.head_dim;
#pragma unroll
      for (int i = 2 * r; i < kDim / 2; i += 4) {
        const int column = fragment_column(thread, i);
        if (column >= p.head_dim) continue;
        *reinterpret_cast<float2*>(values + column) = make_float2(o[i], o[i + 1]);
      }
    }
  }
}

template <typename T, int kDim, int kChunk>
__device__ __forceinline__ void multiply_tiles(const HopperCall& c,
                                               const HopperShared<kDim>& shared, int rank,
                                               int warpgroup) {
  using Shape = HopperShape<kDim>;
  constexpr int kKeys = Shape::kKeys;
  const AttentionCall& p = c.attention;
  auto& barriers = shared.barriers();
  const int thread = int(threadIdx.x) % 128, lane = int(threadIdx.x) % 32;
  const int own_rows = warpgroup * kHopperWarpgroupRows;
  T* const queries = shared.template queries<T>(warpgroup);
  Ring<HopperShared<kDim>::kJobs> jobs;
  Ring<Shape::kStages> ring;
  Ring<1> seen;
  float o[kDim / 2], s[kKeys / 2];
  uint32_t w[kKeys / 4];
  for (;; jobs.advance()) {
    wait_for(&barriers.posted[jobs.stage], jobs.parity);
    const HopperJob& job = barriers.jobs[jobs.stage];        // not in registers, which are scarce
    const int tiles = __shfl_sync(kAllLanes, job.tiles, 0);  // which the compiler takes for uniform
    if (tiles < 0) return;
    const int plain_begin = __shfl_sync(kAllLanes, job.plain_begin, 0);
    const int plain_end = __shfl_sync(kAllLanes, job.plain_end, 0);

    ptx::named_barrier(kOwnRowsBarrier + warpgroup, 128);  // nobody reads the last ones any more
    load_queries<T, kDim>(p, job.at.b, job.at.kv_head, job.row_begin + own_rows, thread, queries);
    hopper::publish_shared();
    ptx::named_barrier(kOwnRowsBarrier + warpgroup, 128);

    OnlineSoftmax softmax;
    softmax.scale = p.factor;
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) o[i] = 0.f;
    float* chunk_lse[2] = {};  // of the tile
    if constexpr (kChunk > 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const PackedRow packed(p, job.at.kv_head,
                               job.row_begin + own_rows + fragment_row(thread, 2 * r));
        if (packed.row >= p.num_rows) continue;
        chunk_lse[r] = p.chunk_lse + packed.output(p, job.at.b) * p.num_chunks + job.key / kChunk;
      }
    }

    // Logits of tile t to weights.
    const auto weigh = [&](int t) {
      if (t >= plain_begin && t < plain_end) {
        if constexpr (kChunk > 0) {
          softmax.template add_tile_of_chunks<kChunk>(s, chunk_lse);
        } else {
          softmax.add_tile(s);
        }
      } else {
        wait_for(&barriers.seen_ready, seen.parity);
        mask_logits(barriers.seen, own_rows, thread, s);
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&barriers.seen_read);
        seen.advance();
        if constexpr (kChunk > 0) {
          softmax.template store_chunks<kChunk>(s, thread, job.at.prefix - job.key - t * kKeys,
                                                chunk_lse);
        }
        softmax.add_tile(s);
      }
      if constexpr (kChunk > 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (chunk_lse[r]) chunk_lse[r] += kKeys / kChunk;
        }
      }
    };

    if (tiles > 0) {
      wait_for(&barriers.full_k[ring.stage], ring.parity);
      hopper::multiply_queries<kKeys, kDim>(s, queries, shared.template keys<T>(ring.stage));
      hopper::wait_products<0>();
      hopper::fence_registers(s);
      release(&barriers.empty_k[ring.stage], c.cluster);
      weigh(0);
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) w[i] = pack(T{}, s[2 * i], s[2 * i + 1]);
      Ring<Shape::kStages> before = ring;
      ring.advance();
      for (int t = 1; t < tiles; ++t) {
        wait_for(&barriers.full_k[ring.stage], ring.parity);
        hopper::multiply_queries<kKeys, kDim>(s, queries, shared.template keys<T>(ring.stage));
        wait_for(&barriers.full_v[before.stage], before.parity);
        hopper::multiply_values<kKeys, kDim>(o, w, shared.template values<T>(before.stage));
        hopper::wait_products<1>();
        hopper::fence_registers(s);
        release(&barriers.empty_k[ring.stage], c.cluster);
        weigh(t);
        hopper::wait_products<0>();
        hopper::fence_registers(o);
        release(&barriers.empty_v[before.stage], c.cluster);
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) o[i] *= softmax.correction[i / 2 % 2];
#pragma unroll
        for (int i = 0; i < kKeys / 4; ++i) w[i] = pack(T{}, s[2 * i], s[2 * i + 1]);
        before = ring;
        ring.advance();
      }
      wait_for(&barriers.full_v[before.stage], before.parity);
      hopper::multiply_values<kKeys, kDim>(o, w, shared.template values<T>(before.stage));
      hopper::wait_products<0>();
      hopper::fence_registers(o);
      release(&barriers.empty_v[before.stage], c.cluster);
    }
    store_rows<T, kDim>(c, job, rank * kHopperBlockRows + own_rows, job.row_begin + own_rows,
                        softmax, thread, o);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&barriers.taken[jobs.stage]);
  }
}

template <typename T, int kDim, int kChunk>
__global__ void __launch_bounds__(kHopperThreads, 1)
    tree_attention_sm90_kernel(const __grid_constant__ HopperCall c) {
  const HopperShared<kDim> shared;
  auto& barriers = shared.barriers();
  if (threadIdx.x == 0) {
    const uint32_t blocks = uint32_t(c.cluster);
    for (int i = 0; i < HopperShape<kDim>::kStages; ++i) {
      ptx::mbarrier_init(&barriers.full_k[i], 1);
      ptx::mbarrier_init(&barriers.full_v[i], 1);
      ptx::mbarrier_init(&barriers.empty_k[i], kHopperReaders * blocks);
      ptx::mbarrier_init(&barriers.empty_v[i], (kHopperReaders + 1) * blocks);
    }
    for (int i = 0; i < HopperShared<kDim>::kJobs; ++i) {
      ptx::mbarrier_init(&barriers.posted[i], 1);
      ptx::mbarrier_init(&barriers.taken[i], kHopperReaders + 1);
    }
    ptx::mbarrier_init(&barriers.seen_ready, 1);
    ptx::mbarrier_init(&barriers.seen_read, kHopperReaders);
    ptx::fence_mbarrier_init();
    hopper::prefetch_map(c.k);
    hopper::prefetch_map(c.v);
  }
  hopper::cluster_barrier();
  const int rank = c.cluster == 1 ? 0 : hopper::cluster_rank();
  // The same for all threads of a warp, and known to be.
  const int warp = __shfl_sync(kAllLanes, int(threadIdx.x) / 32, 0);
  if (warp < 4) {
    hopper::give_registers_up_to<kHopperProducerRegisters>();
    if (warp == 0) copy_tiles<T, kDim>(c, shared, rank);
    if (warp == 1) prepare_masks<T, kDim>(c, shared);
  } else {
    hopper::take_registers_up_to<kHopperConsumerRegisters>();
    multiply_tiles<T, kDim, kChunk>(c, shared, rank, warp / 4 - 1);
  }
  ptx::let_successors_begin();
  hopper::cluster_barrier();
}

// The head dimensions above kDim - 64 up to kDim.
template <typename T, int kDim, int kChunk>
cudaError_t launch_hopper_attention(const AttentionCall& call, int cluster, cudaStream_t stream) {
  using Shape = HopperShape<kDim>;
  HopperCall c{call, {}, {}, cluster};
  const int64_t sizes[4] = {call.head_dim, call.capacity, call.num_kv_heads, call.batch};
  const auto map = [&](hopper::TensorMap* to, const void* data, int64_t stride_s, int64_t stride_h,
                       int64_t stride_b) {
    const auto bytes = [](int64_t size, int64_t stride) {  // of what is never stepped over: any
      return size > 1 ? stride * int64_t(sizeof(T)) : 16;
    };
    return hopper::make_map(
        to, data, sizes,
        {bytes(sizes[1], stride_s), bytes(sizes[2], stride_h), bytes(sizes[3], stride_b)},
        Shape::kKeys / cluster);
  };
  cudaError_t error = map(&c.k, call.k, call.k_stride_s, call.k_stride_h, call.k_stride_b);
  if (error != cudaSuccess) return error;
  error = map(&c.v, call.v, call.v_stride_s, call.v_stride_h, call.v_stride_b);
  if (error != cudaSuccess) return error;
  return launch_clusters(unsigned(cluster), tree_attention_sm90_kernel<T, kDim, kChunk>,
                         unsigned(call.cut.grid * cluster), kHopperThreads, Shape::kSharedBytes,
                         stream, c);
}

}  // namespace specextend
