#pragma once

// Stands in for csrc/kernels/hopper.cuh: the same functions, for the block that runs on the host.
// Products read their operands, and write their results, at a time that the schedule draws between
// the call and the end of the wait for them.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#include "hopper_tiles.h"
#include "kernels/ptx.cuh"

namespace specextend::emulation {

// Of each thread: its products that are under way, and its registers that others' products read.
inline std::deque<std::function<void()>> products[kMaxThreads];
inline const void* operands[kMaxThreads];

inline void begin_product(std::function<void()> product) {
  auto& queue = products[thread()];
  queue.push_back(std::move(product));
  for (; !queue.empty() && draw(2) == 0; queue.pop_front()) queue.front()();
}

inline void meet_warp(const char* name, const char* file, int line) {
  warp_call(name, file, line, 0xffffffffu, nullptr, [](void* const*, unsigned) {});
}

}  // namespace specextend::emulation

namespace specextend::hopper {

struct TensorMap {
  const uint16_t* data;
  int64_t sizes[4], strides[4];  // columns, rows, heads, batch; in bytes
  int box_rows;
};

inline cudaError_t make_map(TensorMap* map, const void* data, const int64_t (&sizes)[4],
                            const int64_t (&strides)[3], int box_rows) {
  *map = {static_cast<const uint16_t*>(data),
          {sizes[0], sizes[1], sizes[2], sizes[3]},
          {2, strides[0], strides[1], strides[2]},
          box_rows};
  bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (const int64_t stride : strides) fits &= stride > 0 && stride % 16 == 0;
  return fits ? cudaSuccess : cudaErrorInvalidValue;
}

// --- products ---

template <int kKeys, int kDim, typename T>
void multiply_queries(float (&s)[kKeys / 2], const T* q, const T* k, SPECEXTEND_SITE) {
  const int thread = int(threadIdx.x) % 128;
  emulation::meet_warp("wgmma", file, line);
  for (float& x : s) x = NAN;
  emulation::begin_product([&s, q, k, thread] {
    for (int i = 0; i < kKeys / 2; ++i) {
      const int row = fragment_row(thread, i), key = fragment_column(thread, i);
      float sum = 0.f;
      for (int d = 0; d < kDim; ++d) {
        sum += float(q[shared_index(64, row, d)]) * float(k[shared_index(kKeys, key, d)]);
      }
      s[i] = sum;
    }
  });
}

// The weights of a row are in the registers of the four threads that hold it.
template <int kKeys, int kDim, typename T>
void multiply_values(float (&o)[kDim / 2], uint32_t (&p)[kKeys / 4], const T* v, SPECEXTEND_SITE) {
  const int thread = int(threadIdx.x) % 128, quad = emulation::thread() / 4 * 4;
  emulation::operands[emulation::thread()] = p;
  emulation::meet_warp("wgmma", file, line);
  emulation::begin_product([&o, v, thread, quad] {
    float weights[2][kKeys];
    for (int t = 0; t < 4; ++t) {
      const T* elements = static_cast<const T*>(emulation::operands[quad + t]);
      for (int i = 0; i < kKeys / 2; ++i) {
        weights[i / 2 % 2][fragment_column(t, i)] = float(elements[i]);
      }
    }
    for (int i = 0; i < kDim / 2; ++i) {
      const int column = fragment_column(thread, i);
      for (int key = 0; key < kKeys; ++key) {
        o[i] += weights[i / 2 % 2][key] * float(v[shared_index(kKeys, key, column)]);
      }
    }
  });
}

template <int kPending>
void wait_products(SPECEXTEND_SITE) {
  emulation::meet_warp("wgmma.wait", file, line);
  auto& queue = emulation::products[emulation::thread()];
  for (; queue.size() > kPending; queue.pop_front()) queue.front()();
  emulation::meet_warp("wgmma.wait", file, line);
}

template <int kN>
void fence_registers(float (&)[kN]) {}

inline void publish_shared() {}

// --- registers ---

template <int kCount>
void give_registers_up_to() {}

template <int kCount>
void take_registers_up_to() {
  emulation::products[emulation::thread()].clear();  // of a launch that failed
}

// --- clusters ---

inline int cluster_rank() { return emulation::cluster_rank(); }

inline void cluster_barrier(SPECEXTEND_SITE) {
  emulation::cluster_barrier("cluster barrier", file, line);
}

inline void arrive_in_cluster(uint64_t* barrier, int rank) {
  ptx::mbarrier_arrive(static_cast<uint64_t*>(emulation::in_cluster(barrier, rank)));
}

// --- tensor copies ---

enum class Keep : uint64_t { kNormal, kFirstToGo };

inline void prefetch_map(const TensorMap&) {}

template <typename T>
void copy_box(T* shared, const TensorMap& map, uint64_t* barrier, Keep, int column, int row,
              int head, int batch) {
  // As it will lie in shared memory. The newest ones are kept: that many are never under way.
  static std::deque<std::vector<uint16_t>> images(256);
  images.pop_front();
  std::vector<uint16_t>& image = images.emplace_back(size_t(map.box_rows) * 64);
  const char* const data =
      reinterpret_cast<const char*>(map.data) + head * map.strides[2] + batch * map.strides[3];
  for (int r = 0; r < map.box_rows && row + r < map.sizes[1]; ++r) {
    for (int c = 0; c < 64 && column + c < map.sizes[0]; ++c) {
      memcpy(&image[size_t(shared_index(map.box_rows, r, c))],
             data + int64_t(row + r) * map.strides[1] + (column + c) * 2, 2);
    }
  }
  emulation::check_shared("a swizzled box", shared, 1024);
  emulation::bulk_copy_to_shared(shared, image.data(), uint32_t(image.size() * 2), barrier);
}

template <typename T>
void copy_box_to_both(T* shared, const TensorMap& map, uint64_t* barrier, Keep keep, int column,
                      int row, int head, int batch) {
  for (int rank = 0; rank < 2; ++rank) {
    copy_box(static_cast<T*>(emulation::in_cluster(shared, rank)), map,
             static_cast<uint64_t*>(emulation::in_cluster(barrier, rank)), keep, column, row, head,
             batch);
  }
}

}  // namespace specextend::hopper
