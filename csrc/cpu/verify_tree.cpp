#include <algorithm>
#include <vector>

#include "cpu/cpu.h"

namespace specextend::cpu {
namespace {

// Children of every node as linked lists in index order: first[n], then next[child], ending with
// -1. Node 0 is nobody's child and a parent out of range is nobody's, so that a walk from node 0
// meets no node twice, whatever the parents are.
struct Children {
  std::vector<int32_t> first, next;

  void build(const int32_t* parents, int num_nodes) {
    first.assign(size_t(num_nodes), -1);
    next.resize(size_t(num_nodes));
    for (int node = num_nodes - 1; node > 0; --node) {
      const int32_t parent = parents[node];
      if (parent < 0 || parent >= num_nodes) continue;
      next[node] = first[parent];
      first[parent] = node;
    }
  }
};

// The accepted path of one tree, written as it grows.
class Walk {
 public:
  Walk(const VerifyTreeParams& p, int b)
      : num_nodes_(p.num_nodes),
        tokens_(p.tokens + int64_t(b) * p.num_nodes),
        path_(p.path + int64_t(b) * p.num_nodes),
        emitted_(p.emitted + int64_t(b) * p.num_nodes),
        num_accepted_(p.num_accepted + b),
        next_root_(p.next_root + b) {
    path_[0] = 0;
  }

  void accept(int32_t node) {
    emitted_[length_ - 1] = tokens_[node];
    path_[length_++] = node;
  }

  void finish(int64_t last_token) {
    emitted_[length_ - 1] = last_token;
    *next_root_ = last_token;
    *num_accepted_ = length_ - 1;
    std::fill(path_ + length_, path_ + num_nodes_, -1);
    std::fill(emitted_ + length_, emitted_ + num_nodes_, -1);
  }

 private:
  int num_nodes_, length_ = 1;
  const int64_t* tokens_;
  int32_t* path_;
  int64_t* emitted_;
  int32_t* num_accepted_;
  int64_t* next_root_;
};

}  // namespace

void verify_tree(const VerifyTreeParams& p) {
  static thread_local Children children;
  for (int b = 0; b < p.batch; ++b) {
    const int64_t* tokens = p.tokens + int64_t(b) * p.num_nodes;
    const int64_t* target = p.target_tokens + int64_t(b) * p.num_nodes;
    children.build(p.parents + int64_t(b) * p.num_nodes, p.num_nodes);
    Walk walk(p, b);
    int32_t node = 0;
    while (true) {
      int32_t child = children.first[node];
      // A negative choice says that the target had none; a padded node's token never matches it.
      while (child >= 0 && (tokens[child] != target[node] || target[node] < 0)) {
        child = children.next[child];
      }
      if (child < 0) break;
      walk.accept(child);
      node = child;
    }
    walk.finish(target[node]);
  }
}

}  // namespace specextend::cpu
