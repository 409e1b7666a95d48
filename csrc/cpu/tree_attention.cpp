// Work partition of tree attention: items go to the kernels of csrc/cpu/isa/tree_attention.h. How
// the work is cut depends on the number of threads, the bits of the result do not.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "cpu/cpu.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"

namespace specextend::cpu {
namespace {

constexpr int kMaxRows = 256;               // of an item: their sums stay in the L2 cache
constexpr int64_t kMaxPartials = 64 << 20;  // bytes
constexpr int64_t kItemsPerThread = 16;     // so that threads end together
constexpr int64_t kSerialWork = 1 << 19;    // multiplications that are not worth a second thread
constexpr int64_t kReadingRows = 16;        // reading a key counts as so many rows

thread_local Scratch<float> scratch, partials, pieces;

// Calls f(i) for i < n from up to `threads` threads, each taking the next one when it is free.
template <typename F>
void for_each_item(int64_t n, int64_t threads, const F& f) {
  if (threads <= 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(n, threads), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
  });
}

}  // namespace

void tree_attention(const TreeAttentionParams& p, DType dtype) {
  const AttentionKernels& kernels = isa().attention[int(dtype)];
  const int packed = p.num_rows * (p.num_heads / p.num_kv_heads);
  if (packed == 0 || p.batch == 0) return;
  const int blocks = (packed + kMaxRows - 1) / kMaxRows;
  const int64_t units = int64_t(p.batch) * p.num_kv_heads * blocks;

  int64_t longest = 0, total = 0;
  for (int b = 0; b < p.batch; ++b) {
    const int64_t prefix = std::clamp<int64_t>(p.prefix_lens[b], 0, p.capacity - p.num_tree_keys);
    longest = std::max(longest, prefix);
    total += prefix + p.num_tree_keys;
  }
  const int segments = int(std::max<int64_t>(
      1, (longest + p.num_tree_keys + kAttentionSegment - 1) / kAttentionSegment));
  const int64_t work = total * p.num_kv_heads * p.head_dim * (packed + kReadingRows);
  const int64_t threads = work < kSerialWork ? 1 : int64_t(torch::stable::get_num_threads());

  const int dim = p.out ? (p.value_dim + kernels.lanes - 1) / kernels.lanes * kernels.lanes : 0;
  const int block_rows = (packed + blocks - 1) / blocks;
  const int64_t unit_partials = int64_t(segments) * block_rows * (dim + 2);
  const bool split = segments > 1 && units < 4 * threads && threads > 1 &&
                     units * unit_partials * 4 <= kMaxPartials;

  AttentionItem item{};
  item.params = &p;
  const bool whole_chunks = !p.chunk_lse || kAttentionBlock % p.chunk_size == 0;
  if (!whole_chunks) {
    const int64_t key_blocks = segments * (kAttentionSegment / kAttentionBlock);
    item.num_pieces = key_blocks * kAttentionBlock / p.chunk_size + key_blocks + 1;
    item.pieces = pieces.get(size_t(int64_t(p.batch) * p.num_rows * p.num_heads * item.num_pieces));
  }
  float* const all_partials = split ? partials.get(size_t(units * unit_partials)) : nullptr;
  const auto unit_item = [&](int64_t unit) {
    AttentionItem i = item;
    const int block = int(unit % blocks);
    i.row_begin = int(int64_t(block) * packed / blocks);
    i.num_rows = int(int64_t(block + 1) * packed / blocks) - i.row_begin;
    i.kv_head = int(unit / blocks % p.num_kv_heads);
    i.b = int(unit / blocks / p.num_kv_heads);
    i.segment_end = segments;
    i.last = true;
    i.partials = split ? all_partials + unit * unit_partials : nullptr;
    i.scratch = scratch.get(size_t(kernels.scratch_floats(p, i.num_rows)));
    return i;
  };
  if (!split) {
    for_each_item(units, threads, [&](int64_t unit) { kernels.run(unit_item(unit)); });
    return;
  }
  // Items of several segments where there are enough: the first rows of an item are not fetched
  // ahead.
  const int64_t run = std::max<int64_t>(1, units * segments / (kItemsPerThread * threads));
  const int64_t runs = (segments + run - 1) / run;
  for_each_item(units * runs, threads, [&](int64_t n) {
    AttentionItem i =
        unit_item(n % units);  // heads whose rows share pages come one after the other
    i.segment_begin = int(n / units * run);
    i.segment_end = int(std::min<int64_t>(i.segment_begin + run, segments));
    i.last = i.segment_end == segments;
    kernels.run(i);
  });
  for_each_item(units, units * block_rows < 64 ? 1 : threads,
                [&](int64_t unit) { kernels.combine(unit_item(unit)); });
}

}  // namespace specextend::cpu
