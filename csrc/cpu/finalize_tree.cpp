#include <algorithm>
#include <cmath>
#include <tuple>

#include "cpu/cpu.h"
#include "cpu/scratch.h"
#include "order.h"
#include "tree.h"

namespace specextend::cpu {
namespace {

// Ranks a candidate: smaller is better. A child is never better than its parent, because it
// inherits the parent's log probability as a bound and is deeper; the best n are therefore closed
// under taking ancestors whatever the probabilities are.
struct Rank {
  uint32_t descending_logp;
  int32_t depth, index;

  bool operator<(const Rank& other) const {
    return std::tie(descending_logp, depth, index) <
           std::tie(other.descending_logp, other.depth, other.index);
  }
};

static_assert(std::is_trivial_v<Rank>);

void finalize_one(const FinalizeTreeParams& p, int64_t b) {
  static thread_local Scratch<Rank> rank_scratch, best_scratch;
  static thread_local Scratch<int32_t> slot_scratch;
  const int32_t* parents = p.parents + b * p.num_candidates;
  const float* logp = p.logp + b * p.num_candidates;
  int32_t* nodes = p.nodes + b * p.num_nodes;
  const int num_slots = 1 + p.num_nodes, words = mask_words(num_slots);
  int32_t* tree_parents = p.tree_parents + b * num_slots;
  int32_t* depths = p.depths + b * num_slots;
  uint64_t* mask = p.mask + b * num_slots * words;

  const auto parent_of = [&](int32_t i) {
    return parents[i] >= 0 && parents[i] < i ? parents[i] : -1;
  };
  Rank* ranks = rank_scratch.get(size_t(p.num_candidates));
  Rank* best = best_scratch.get(size_t(p.num_nodes));  // a heap, the worst of them first
  Rank* best_end = best + p.num_nodes;
  for (int32_t i = 0; i < p.num_candidates; ++i) {
    const int32_t parent = parent_of(i);
    Rank rank{descending_bits(logp[i] == logp[i] ? logp[i] : -INFINITY), 1, i};
    if (parent >= 0) {
      rank.descending_logp = std::max(rank.descending_logp, ranks[parent].descending_logp);
      rank.depth = ranks[parent].depth + 1;
    }
    ranks[i] = rank;
    if (i < p.num_nodes) {
      best[i] = rank;
      if (i + 1 == p.num_nodes) std::make_heap(best, best_end);
    } else if (p.num_nodes > 0 && rank < best[0]) {
      std::pop_heap(best, best_end);
      best_end[-1] = rank;
      std::push_heap(best, best_end);
    }
  }
  for (int i = 0; i < p.num_nodes; ++i) nodes[i] = best[i].index;
  std::sort(nodes, nodes + p.num_nodes);

  int32_t* slots = slot_scratch.get(size_t(p.num_candidates));  // filled for chosen candidates
  std::fill(mask, mask + int64_t(num_slots) * words, 0);
  tree_parents[0] = -1;
  depths[0] = 0;
  mask[0] = 1;
  for (int slot = 1; slot < num_slots; ++slot) {
    const int32_t node = nodes[slot - 1], pool_parent = parent_of(node);
    const int32_t parent = pool_parent < 0 ? 0 : slots[pool_parent];
    slots[node] = slot;
    tree_parents[slot] = parent;
    depths[slot] = depths[parent] + 1;
    uint64_t* row = mask + int64_t(slot) * words;
    std::copy_n(mask + int64_t(parent) * words, words, row);
    row[slot / 64] |= uint64_t(1) << (slot % 64);
  }
}

}  // namespace

void finalize_tree(const FinalizeTreeParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) finalize_one(p, b);
}

}  // namespace specextend::cpu
