#pragma once

// Where the chunks of a gather go, and how far their keys move. Shared by host and device code.

#include <cstdint>

#include "math.h"

namespace specextend {

// Rows of chunk `id` that exist in a sequence of `len` tokens, `capacity` rows of which are there.
SPECEXTEND_HOST_DEVICE int64_t chunk_rows(int32_t id, int32_t chunk_size, int64_t len,
                                          int64_t capacity) {
  const int64_t end = len < capacity ? len : capacity;
  const int64_t rows = end - int64_t(id) * chunk_size;
  return rows < 0 ? 0 : rows < chunk_size ? rows : chunk_size;
}

// New position minus old position of the chunk in slot `slot` of `count` selected ones. Positions are
// compact; they start at 0, or, right-aligned, end where the last selected chunk ends.
SPECEXTEND_HOST_DEVICE int64_t chunk_shift(const int32_t* ids, int slot, int count, int chunk_size,
                                           bool right_aligned) {
  int64_t chunks = int64_t(slot) - ids[slot];
  if (right_aligned) chunks += int64_t(ids[count - 1]) - (count - 1);
  return chunks * chunk_size;
}

}  // namespace specextend
