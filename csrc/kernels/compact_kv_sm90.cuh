#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/ptx.cuh"
#include "kv_rows.h"
#include "params.h"

namespace specextend {

constexpr int kCompactSm90Rows = 16;  // so many rows are in shared memory at a time, one per lane
constexpr int kCompactSm90SegmentBytes = 1024;  // each row's segment has so many
constexpr int kCompactSm90Shared =
    kCompactSm90Rows * kCompactSm90SegmentBytes + int(sizeof(uint64_t));

// One warp moves one segment of all rows of the path, in path order, through shared memory: the
// copy engine reads up to 16 rows and then writes them, with one instruction per row. All reads of
// a turn are over before its first write, and no row written is read in a later turn (its slot is
// at least its index in the path). Grid: segments of all heads, caches, sequences.
__global__ void __launch_bounds__(32)
    compact_kv_sm90_kernel(const __grid_constant__ CompactKvParams p) {
  auto* const buffer =
      reinterpret_cast<unsigned char (*)[kCompactSm90SegmentBytes]>(ptx::shared_memory());
  auto* const loaded = reinterpret_cast<uint64_t*>(buffer[kCompactSm90Rows]);
  const int lane = int(threadIdx.x);
  if (lane == 0) {
    ptx::mbarrier_init(loaded, 1);
    ptx::fence_mbarrier_init();
  }
  __syncwarp();

  const int64_t segments = (p.row_bytes + kCompactSm90SegmentBytes - 1) / kCompactSm90SegmentBytes;
  const int64_t offset = blockIdx.x % segments * kCompactSm90SegmentBytes;
  const int64_t rest = p.row_bytes - offset;
  const uint32_t bytes =
      uint32_t(rest < kCompactSm90SegmentBytes ? rest : kCompactSm90SegmentBytes);
  char* const cache =
      static_cast<char*>(p.caches[blockIdx.y]) + blockIdx.x / segments * p.stride_h + offset;

  uint32_t parity = 0;
  for (int b = int(blockIdx.z); b < p.batch; b += int(gridDim.z)) {
    char* const rows = cache + b * p.stride_b;
    const int count = compact_count(p, b);
    for (int first = 0; first < count; first += kCompactSm90Rows) {
      const int i = first + lane;
      const int64_t source = lane < kCompactSm90Rows && i < count ? compact_source(p, b, i) : -1;
      const unsigned moving = __ballot_sync(0xffffffffu, source >= 0);
      if (moving == 0) continue;
      if (lane == 0) ptx::mbarrier_arrive_expect_tx(loaded, bytes * __popc(moving));
      __syncwarp();
      if (source >= 0) {
        ptx::bulk_copy_to_shared(buffer[lane], rows + source * p.stride_s, bytes, loaded);
      }
      while (!ptx::mbarrier_try_wait_parity(loaded, parity)) {
      }
      parity ^= 1;
      if (source >= 0) {
        const int64_t target = int64_t(p.prefix_lens[b]) + i;
        ptx::bulk_copy_to_global(rows + target * p.stride_s, buffer[lane], bytes);
        ptx::bulk_commit_group();
      }
      ptx::bulk_wait_group_read<0>();  // the lane's buffer is free again
    }
  }
  ptx::bulk_wait_group<0>();
}

}  // namespace specextend
