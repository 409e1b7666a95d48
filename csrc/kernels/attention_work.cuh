#pragma once

// What the attention kernels share: who works on what, which keys a row sees, where partial results
// wait for the combine. Functions that say "by whole warps" are called by all lanes of a warp.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "attention_layout.h"
#include "params.h"
#include "tree.h"
#include "work_partition.h"

namespace specextend {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// --- partial softmaxes: sum * 2^max ---

struct alignas(8) PartialSum {
  float max, sum;  // base 2; of no keys: -inf, 0
};
static_assert(sizeof(PartialSum) == kPartialSumBytes);

__device__ __forceinline__ PartialSum no_keys() { return {-INFINITY, 0.f}; }

// Both may be of no keys.
__device__ __forceinline__ PartialSum add_partial_sums(PartialSum a, PartialSum b) {
  const float max = fmaxf(a.max, b.max);
  if (max == -INFINITY) return no_keys();
  return {max, a.sum * exp2f(a.max - max) + b.sum * exp2f(b.max - max)};
}

__device__ __forceinline__ float natural_lse(PartialSum s) {
  return s.max == -INFINITY ? -INFINITY : (s.max + log2f(s.sum)) * kLn2;
}

// What a sum of values is multiplied with to become an output. The sink takes part in the softmax
// with no value. 0 for a row that sees no key.
__device__ __forceinline__ float output_scale(const TreeAttentionParams& p, PartialSum s,
                                              int head) {
  if (s.max == -INFINITY) return 0.f;
  const float sink = p.sinks ? exp2f(p.sinks[head] * kLog2E - s.max) : 0.f;
  return 1.f / (s.sum + sink);
}

// --- outputs ---

__device__ __forceinline__ uint32_t pack(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t pack(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Four elements to memory that is aligned to them.
template <typename T>
__device__ __forceinline__ void store4(T* to, float4 x) {
  *reinterpret_cast<uint2*>(to) = make_uint2(pack(T{}, x.x, x.y), pack(T{}, x.z, x.w));
}
__device__ __forceinline__ void store4(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }

// --- scratch memory of a launch ---

// A partial is what a block has of a unit that others have parts of too (partial_of).
struct AttentionWorkspace {
  int64_t* lines;    // [B + 1]: where the units of each sequence begin on the line
  PartialSum* sums;  // [partials, rows_per_block]
  PartialSum*
      edges;      // [partials, 2, rows_per_block]: of the chunks cut by its begin and by its end
  float* values;  // [partials, rows_per_block, D], times 2^-max
};

// Sets `w` into the memory at `base`, which may be null, and returns the bytes needed.
inline size_t lay_out_workspace(const TreeAttentionParams& p, const WorkCut& cut, void* base,
                                AttentionWorkspace* w) {
  size_t bytes = 0;
  const auto take = [&](size_t size) {
    char* const at = static_cast<char*>(base) + bytes;
    bytes += (size + 15) / 16 * 16;
    return static_cast<void*>(at);
  };
  const size_t rows = size_t(cut.grid) * kPartialsPerBlock * size_t(cut.rows_per_block);
  w->lines = static_cast<int64_t*>(take((size_t(cut.batch) + 1) * sizeof(int64_t)));
  w->sums = static_cast<PartialSum*>(take(rows * sizeof(PartialSum)));
  w->edges = static_cast<PartialSum*>(take(p.chunk_lse ? 2 * rows * sizeof(PartialSum) : 0));
  w->values = static_cast<float*>(take(p.out ? rows * size_t(p.head_dim) * sizeof(float) : 0));
  return bytes;
}

// What an attention kernel gets.
struct AttentionCall : TreeAttentionParams {
  WorkCut cut;
  AttentionWorkspace workspace;
  bool q_aligned, kv_aligned;  // all vectors of 8 elements, for 16-byte copies
  bool whole_vectors;          // keys and values are aligned, and D is what the kernel is for
  // Logits become base 2 when multiplied with it. The sign of the scale and the softcap are applied
  // apart, so that it is positive; not 0, which would make NaN of masked logits.
  float factor;
};

// `dim` is the head dimension that the kernel is for, at least D.
inline AttentionCall attention_call(const TreeAttentionParams& p, const WorkCut& cut, int dim,
                                    void* workspace) {
  AttentionCall c{};
  static_cast<TreeAttentionParams&>(c) = p;
  c.cut = cut;
  lay_out_workspace(p, cut, workspace, &c.workspace);
  const auto aligned = [](const void* data, int64_t stride_a, int64_t stride_b, int64_t stride_c) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (stride_a | stride_b | stride_c) % 8 == 0;
  };
  c.q_aligned = aligned(p.q, p.q_stride_b, p.q_stride_m, p.q_stride_h);
  c.kv_aligned = aligned(p.k, p.k_stride_b, p.k_stride_s, p.k_stride_h) &&
                 (!p.out || aligned(p.v, p.v_stride_b, p.v_stride_s, p.v_stride_h));
  c.whole_vectors = c.kv_aligned && p.head_dim == dim;
  const float factor = (p.scale < 0 ? -p.scale : p.scale) * kLog2E;
  c.factor = p.softcap > 0 ? 1.f : factor > 0x1p-126f ? factor : 0x1p-126f;
  return c;
}

// --- sequences ---

__device__ __forceinline__ int64_t prefix_length(const TreeAttentionParams& p, int b) {
  return clamp_between(p.prefix_lens[b], 0, p.capacity - p.num_tree_keys);
}

__device__ __forceinline__ int row_depth(const TreeAttentionParams& p, int b, int row) {
  return p.q_depths ? p.q_depths[int64_t(b) * p.num_rows + row]
                    : row + p.num_tree_keys - p.num_rows;
}

// The first position that a row sees, with a window.
__device__ __forceinline__ int64_t first_position(const TreeAttentionParams& p, int64_t prefix,
                                                  int depth) {
  return p.window ? prefix + depth - p.window + 1 : 0;
}

// Least depth of the rows of a sequence; 0 where it is not needed. By whole warps.
__device__ __forceinline__ int least_depth(const TreeAttentionParams& p, int b) {
  if (!p.window) return 0;
  if (!p.q_depths) return row_depth(p, b, 0);
  int least = INT32_MAX;
  for (int row = int(threadIdx.x % 32); row < p.num_rows; row += 32) {
    least = min(least, row_depth(p, b, row));
  }
  return __reduce_min_sync(kAllLanes, least);
}

// Cache rows that some query row may see: without prefix keys that are outside all windows.
__device__ __forceinline__ Range keys_of(const TreeAttentionParams& p, int64_t prefix,
                                         int least_depth) {
  return {clamp_between(first_position(p, prefix, least_depth), 0, prefix),
          prefix + p.num_tree_keys};
}

// --- the line ---

// Calls f(b, begin, length) with where the units of a sequence lie on the line, a lane per
// sequence, and returns the line's length. By whole warps.
template <typename F>
__device__ __forceinline__ int64_t for_each_sequence(const AttentionCall& c, const F& f) {
  const int lane = int(threadIdx.x % 32);
  int64_t total = 0;
  for (int first = 0; first < c.batch; first += 32) {
    int depth = 0;
    for (int i = 0; c.window && i < 32 && first + i < c.batch; ++i) {
      const int least = least_depth(c, first + i);
      if (lane == i) depth = least;
    }
    const int b = first + lane;
    int64_t length = 0;
    if (b < c.batch) {
      const Range keys = keys_of(c, prefix_length(c, b), depth);
      length = units_per_sequence(c.cut) * unit_length(tiles_of(keys, c.cut.tile_keys));
    }
    int64_t end = length;
    for (int step = 1; step < 32 && step < c.batch; step *= 2) {
      const int64_t below = __shfl_up_sync(kAllLanes, end, unsigned(step));
      if (lane >= step) end += below;
    }
    if (b < c.batch) f(b, total + end - length, length);
    total += __shfl_sync(kAllLanes, end, min(31, c.batch - 1 - first));
  }
  return total;
}

// Where a block is on the line, and what it has of the unit there. In shared memory, so that it
// does not take registers; its first warp writes it.
struct SegmentState {
  Range run;     // of the block
  int64_t at;    // how far the block is
  int64_t line;  // where the sequence's units begin on the line

  int b;
  int64_t prefix;
  Range keys;   // that rows of the sequence see
  Range tiles;  // that hold them

  Segment segment;
  int64_t first_tile;  // of the segment
  int num_tiles;
  int kv_head;
  int first_packed, num_rows;  // the unit's rows, of those of the KV head
  int row_begin, row_end;      // the query rows that they are of
  int64_t all_see_from;        // from this position on they all see all of the prefix
  bool done;

  // These three: by the whole first warp.

  // `block`: of the cut.
  __device__ __forceinline__ void begin(const AttentionCall& c, int block) {
    const int lane = int(threadIdx.x % 32);
    // One block, of a cluster too, notes for the combine where sequences begin.
    const int64_t total = for_each_sequence(c, [&](int b, int64_t begin, int64_t length) {
      if (blockIdx.x > 0) return;
      c.workspace.lines[b] = begin;
      if (b == c.batch - 1) c.workspace.lines[c.batch] = begin + length;
    });
    const int64_t length = run_length(c.cut, total);
    const int64_t first = block * length;
    if (lane == 0) {
      run = {first, first + length < total ? first + length : total};
      at = first;
    }
    __syncwarp();
    for_each_sequence(c, [&](int candidate, int64_t begin, int64_t length) {
      if (begin <= first && first < begin + length) b = candidate, line = begin;
    });
    __syncwarp();
    if (first < total) enter(c);
  }

  // The sequence b.
  __device__ __forceinline__ void enter(const AttentionCall& c) {
    const int depth = least_depth(c, b);
    if (threadIdx.x == 0) {
      prefix = prefix_length(c, b);
      keys = keys_of(c, prefix, depth);
      tiles = tiles_of(keys, c.cut.tile_keys);
    }
    __syncwarp();
  }

  // To the next unit of which the block has something.
  __device__ __forceinline__ void advance(const AttentionCall& c) {
    const int lane = int(threadIdx.x % 32);
    for (;;) {
      if (at >= run.end) {
        if (lane == 0) done = true;
        return;
      }
      const int64_t length = unit_length(tiles);
      const int unit = int((at - line) / length);
      if (unit == units_per_sequence(c.cut)) {
        __syncwarp();
        if (lane == 0) line = at, ++b;
        __syncwarp();
        enter(c);
        continue;
      }
      const int64_t begin = line + unit * length;
      const Segment found = segment_of(begin, length - kUnitOverhead, run);
      __syncwarp();
      if (lane == 0) at = begin + length;
      __syncwarp();
      if (!found.empty()) return describe(c, unit, found);
    }
  }

 private:
  // `unit` counts those of the sequence, row blocks inside KV heads.
  __device__ __forceinline__ void describe(const AttentionCall& c, int unit, const Segment& found) {
    const int lane = int(threadIdx.x % 32), group = c.num_heads / c.num_kv_heads;
    const int packed = unit % c.cut.row_blocks * c.cut.rows_per_block;
    const int rows = min(c.cut.rows_per_block, c.num_rows * group - packed);
    const int begin = packed / group, end = (packed + rows - 1) / group + 1;
    int64_t from = 0;
    if (c.window) {
      int most = INT32_MIN;
      for (int row = begin + lane; row < end; row += 32) most = max(most, row_depth(c, b, row));
      from = first_position(c, prefix, __reduce_max_sync(kAllLanes, most));
    }
    if (lane == 0) {
      segment = found;
      first_tile = tiles.begin + found.begin;
      num_tiles = int(found.end - found.begin);
      kv_head = unit / c.cut.row_blocks;
      first_packed = packed, num_rows = rows;
      row_begin = begin, row_end = end;
      all_see_from = from;
      done = false;
    }
  }
};

static_assert(sizeof(SegmentState) <= kSegmentStateBytes);

// Calls f() with `state`, in shared memory, describing what the block has of one unit after the
// other.
template <typename F>
__device__ __forceinline__ void for_each_segment(const AttentionCall& c, SegmentState& state,
                                                 const F& f) {
  const bool first_warp = threadIdx.x < 32;
  if (first_warp) state.begin(c, int(blockIdx.x));
  for (;;) {
    if (first_warp) state.advance(c);
    __syncthreads();
    if (state.done) return;
    f();
    __syncthreads();
  }
}

// --- rows ---

// Row `packed` of a KV head is head packed % G of its group, of query row packed / G.
struct PackedRow {
  int row, head;

  __device__ __forceinline__ PackedRow(const TreeAttentionParams& p, int kv_head, int packed) {
    const int group = p.num_heads / p.num_kv_heads;
    row = packed / group;
    head = kv_head * group + packed % group;
  }
  // Of its output in [B, M, Hq].
  __device__ __forceinline__ int64_t output(const TreeAttentionParams& p, int b) const {
    return (int64_t(b) * p.num_rows + row) * p.num_heads + head;
  }
};

// Which keys a query row sees.
struct RowView {
  const uint64_t* mask;   // of the row, or null
  const int32_t* depths;  // of the tree's keys: read with a window only; or null
  int64_t first, prefix;
  int last, num_tree_keys;
  bool window;

  __device__ __forceinline__ RowView(const TreeAttentionParams& p, int b, int64_t prefix, int row)
      : prefix(prefix), num_tree_keys(p.num_tree_keys), window(p.window != 0) {
    row = min(row, p.num_rows - 1);  // rows behind the last one see something, whatever
    mask =
        p.mask ? p.mask + (int64_t(b) * p.num_rows + row) * mask_words(p.num_tree_keys) : nullptr;
    depths = p.k_depths ? p.k_depths + int64_t(b) * p.num_tree_keys : nullptr;
    first = window ? first_position(p, prefix, row_depth(p, b, row)) : 0;
    last = row + p.num_tree_keys - p.num_rows;
  }
  __device__ __forceinline__ bool sees(int64_t key) const {
    if (key < prefix) return key >= first;
    const int64_t slot = key - prefix;
    if (slot >= num_tree_keys) return false;
    if (!(mask ? mask_bit(mask, int(slot)) : slot <= last)) return false;
    return !window || prefix + (depths ? depths[slot] : slot) >= first;
  }
};

// The low n bits, n in any range.
__device__ __forceinline__ uint32_t low_bits32(int64_t n) {
  return n <= 0 ? 0 : n >= 32 ? ~0u : (1u << n) - 1;
}
__device__ __forceinline__ uint64_t low_bits(int64_t n) {
  return uint64_t(low_bits32(n - 32)) << 32 | low_bits32(n);
}

// Bits [at, at + 32) of a mask row; those outside of it are 0.
__device__ __forceinline__ uint32_t mask_bits32(const uint64_t* row, int num_keys, int at) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(row);  // the low half comes first
  const int num_words = 2 * mask_words(num_keys), word = at >> 5;
  const uint32_t low = word >= 0 && word < num_words ? words[word] : 0;
  const uint32_t high = word + 1 >= 0 && word + 1 < num_words ? words[word + 1] : 0;
  return __funnelshift_r(low, high, uint32_t(at)) & low_bits32(num_keys - at);
}
__device__ __forceinline__ uint64_t mask_bits(const uint64_t* row, int num_keys, int64_t at) {
  const uint64_t high = mask_bits32(row, num_keys, int(at) + 32);
  return high << 32 | mask_bits32(row, num_keys, int(at));
}

// Of the 32 keys from `key` on, those that any of the unit's rows sees: bit i for key + i. Others
// may hold anything and are not read. By whole warps.
__device__ __forceinline__ uint32_t readable_keys(const TreeAttentionParams& p,
                                                  const SegmentState& s, int64_t key) {
  const int slot = int(clamp_between(key - s.prefix, -32, p.num_tree_keys));
  const uint32_t prefix = low_bits32(-slot) & ~low_bits32(s.keys.begin - key);
  if (slot <= -32 || slot >= p.num_tree_keys) return prefix;
  if (!p.mask) {  // a chain: the last row sees most
    const int seen = min(s.row_end + p.num_tree_keys - p.num_rows, p.num_tree_keys);
    return prefix | (low_bits32(seen - slot) & ~low_bits32(-slot));
  }
  uint32_t tree = 0;
  const int words = mask_words(p.num_tree_keys);
  for (int row = s.row_begin + int(threadIdx.x % 32); row < s.row_end; row += 32) {
    tree |= mask_bits32(p.mask + (int64_t(s.b) * p.num_rows + row) * words, p.num_tree_keys, slot);
  }
  return prefix | __reduce_or_sync(kAllLanes, tree);
}

// --- chunks ---

// Of logits [begin, end) in base 2.
__device__ __forceinline__ PartialSum sum_logits(const float* logits, int begin, int end) {
  PartialSum total = no_keys();
  for (int i = begin; i < end; ++i) total.max = fmaxf(total.max, logits[i]);
  if (total.max == -INFINITY) return total;
  for (int i = begin; i < end; ++i) total.sum += exp2f(logits[i] - total.max);
  return total;
}

// The log-sum-exps of the chunks that have keys in part `part` of the segment, parts being of
// `part_keys` keys. A chunk that goes on in the next part is carried there, in `carry`
// [2, rows_per_block]; one that the segment's begin or end cuts is left to the combine.
// sum_keys(row, begin, end) sums keys of the part. By whole blocks.
template <typename F>
__device__ __forceinline__ void emit_chunks(const AttentionCall& c, const SegmentState& s, int part,
                                            int part_keys, PartialSum* carry, const F& sum_keys) {
  const int rows = c.cut.rows_per_block;
  const int64_t size = c.chunk_size, prefix = s.prefix;
  const int64_t segment_key = s.first_tile * c.cut.tile_keys;
  const int64_t segment_end = segment_key + int64_t(s.num_tiles) * c.cut.tile_keys;
  const int64_t part_key = segment_key + int64_t(part) * part_keys;
  const int64_t part_end = min(part_key + part_keys, segment_end);
  if (part_key >= prefix) return;
  // Keys have 31 bits: divisions of 64 are many times slower.
  const int first = int(uint32_t(part_key) / uint32_t(c.chunk_size));
  const int last = int(uint32_t(min(part_end, prefix) - 1) / uint32_t(c.chunk_size));
  for (int i = int(threadIdx.x); i < (last - first + 1) * rows; i += int(blockDim.x)) {
    const int row = i % rows;
    if (row >= s.num_rows) continue;
    const int chunk = first + i / rows;
    const int64_t begin = chunk * size, end = min(begin + size, prefix);
    PartialSum sum =
        sum_keys(row, int(max(begin, part_key) - part_key), int(min(end, part_end) - part_key));
    if (begin < part_key && part > 0) sum = add_partial_sums(carry[part % 2 * rows + row], sum);
    const bool cut_before = begin < segment_key && !s.segment.opens;
    if (end > part_end && part_end < segment_end) {
      carry[(part + 1) % 2 * rows + row] = sum;
    } else if (cut_before || end > part_end) {
      const int64_t partial = partial_of(blockIdx.x, s.segment.opens);
      c.workspace.edges[(partial * 2 + !cut_before) * rows + row] = sum;
    } else {
      const PackedRow at(c, s.kv_head, s.first_packed + row);
      c.chunk_lse[at.output(c, s.b) * c.num_chunks + chunk] = natural_lse(sum);
    }
  }
}

}  // namespace specextend
