#pragma once

// Ancestor masks are packed: row i of a tree over n keys is ceil(n / 64) words, and bit j % 64 of
// word j / 64 says that row i sees tree key j. Host and device code share this.

#include <cstdint>

#include "host_device.h"

namespace specextend {

SPECEXTEND_HOST_DEVICE int mask_words(int num_keys) { return (num_keys + 63) / 64; }

SPECEXTEND_HOST_DEVICE bool mask_bit(const uint64_t* row, int key) {
  return (row[key >> 6] >> (key & 63)) & 1;
}

// Without a mask the tree is a chain: its last `num_rows` nodes ask, each sees itself and all
// before.
SPECEXTEND_HOST_DEVICE bool chain_bit(int row, int key, int num_rows, int num_keys) {
  return key <= row + num_keys - num_rows;
}

}  // namespace specextend
