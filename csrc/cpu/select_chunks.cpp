#include <algorithm>

#include "cpu/cpu.h"
#include "cpu/scratch.h"
#include "order.h"

namespace specextend::cpu {
namespace {

void select_one(const SelectChunksParams& p, int64_t b) {
  static thread_local Scratch<uint64_t> scratch;
  const float* scores = p.scores + b * p.num_chunks;
  int32_t* ids = p.ids + b * p.budget;

  const int64_t len = std::max(p.lens[b], 0);
  const int valid = int(std::min<int64_t>((len + p.chunk_size - 1) / p.chunk_size, p.num_chunks));
  const int count = std::min(valid, p.budget);
  const int recent = std::min(p.num_recent, count);
  const int sinks = std::min(p.num_sinks, count - recent);
  const int free = count - sinks - recent, candidates = valid - sinks - recent;

  for (int i = 0; i < sinks; ++i) ids[i] = i;
  if (free == candidates) {
    for (int i = 0; i < free; ++i) ids[sinks + i] = sinks + i;
  } else {
    uint64_t* keys = scratch.get(size_t(candidates));
    for (int i = 0; i < candidates; ++i) keys[i] = rank_key(scores[sinks + i], uint32_t(sinks + i));
    std::nth_element(keys, keys + free, keys + candidates);
    for (int i = 0; i < free; ++i) ids[sinks + i] = int32_t(rank_index(keys[i]));
    std::sort(ids + sinks, ids + sinks + free);
  }
  for (int i = 0; i < recent; ++i) ids[sinks + free + i] = valid - recent + i;
  std::fill(ids + count, ids + p.budget, -1);
  p.counts[b] = count;
}

}  // namespace

void select_chunks(const SelectChunksParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) select_one(p, b);
}

}  // namespace specextend::cpu
