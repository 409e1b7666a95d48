#pragma once

namespace specextend {

constexpr unsigned kMaxGridZ = 65535;  // blocks; kernels stride over what is beyond

// Blocks along z for `count` items.
inline unsigned grid_z(int count) {
  return unsigned(count) < kMaxGridZ ? unsigned(count) : kMaxGridZ;
}

}  // namespace specextend
