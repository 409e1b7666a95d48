#pragma once

namespace specextend {

constexpr unsigned kMaxGridZ = 65535;  // a grid has no more blocks; kernels stride over the rest

// Returns the blocks along z for `count` items.
inline unsigned grid_z(int count) {
  return unsigned(count) < kMaxGridZ ? unsigned(count) : kMaxGridZ;
}

}  // namespace specextend
