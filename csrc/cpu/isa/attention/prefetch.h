#pragma once

// Rows of a KV cache, and their prefetch.

#include "cpu/isa/attention/math.h"

namespace specextend::cpu {
namespace {
namespace attention {

// Keys or values of one KV head, row after row of the cache. `stride` is in elements.
template <typename T>
struct CacheRows {
  const T* first;  // null: these rows are not wanted
  int64_t stride;

  SPECEXTEND_ALWAYS_INLINE const T* row(int64_t n) const { return first + n * stride; }
  SPECEXTEND_ALWAYS_INLINE CacheRows from(int64_t n) const { return {row(n), stride}; }
};

// Fetches cache rows ahead of their use, a line at a time between arithmetic: of prefetches that
// follow upon each other some are dropped.
struct Prefetcher {
  struct Rows {
    const char* first;
    int64_t stride;  // bytes
    int count;
  };
  Rows now;       // the rest of the rows being fetched
  int at, bytes;  // offset in their first; bytes of a row
  Rows next;

  // Appends rows to what is to be fetched. There is room for two lots, and a third is left out.
  void append(const Rows& rows) {
    if (now.count <= 0) {
      now = rows;
    } else if (next.count <= 0) {
      next = rows;
    }
  }

  SPECEXTEND_ALWAYS_INLINE void step() {
    if (now.count <= 0) return;
    __builtin_prefetch(now.first + at, 0, 2);
    at += 64;
    if (at < bytes) return;
    at = 0;
    now.first += now.stride;
    if (--now.count > 0) return;
    now = next, next.count = 0;
  }

  SPECEXTEND_ALWAYS_INLINE void steps(int n) {
    for (int i = 0; i < n; ++i) step();
  }
};

// Rows [begin, begin + count) of `rows`, to be fetched.
template <typename T>
Prefetcher::Rows to_fetch(const CacheRows<T>& rows, int64_t begin, int64_t count) {
  return {reinterpret_cast<const char*>(rows.row(begin)), rows.stride * int64_t(sizeof(T)),
          int(count)};
}

}  // namespace attention
}  // namespace
}  // namespace specextend::cpu
