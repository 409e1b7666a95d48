#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/cpu.h"
#include "gather.h"

namespace specextend::cpu {
namespace {

const char* source(const RowCopy& c, const GatherChunksParams& p, int64_t b, int64_t row, int h) {
  return static_cast<const char*>(c.from) +
         (b * c.from_stride_b + row * c.from_stride_s + h * c.from_stride_h) * p.element_bytes;
}

char* target(const RowCopy& c, const GatherChunksParams& p, int64_t b, int64_t row, int h) {
  return static_cast<char*>(c.to) +
         (b * c.to_stride_b + row * c.to_stride_s + h * c.to_stride_h) * p.element_bytes;
}

// Rotates the first 2 * num_pairs dimensions of a key by the angles of `cos_sin`, copies the rest.
template <typename T>
void rotate_row(const T* from, T* to, const float* cos_sin, const GatherChunksParams& p, int head_dim) {
  const int pairs = p.num_pairs;
  for (int i = 0; i < pairs; ++i) {
    const int x = p.interleaved ? 2 * i : i, y = p.interleaved ? 2 * i + 1 : i + pairs;
    const float a = float(from[x]), b = float(from[y]), cos = cos_sin[2 * i], sin = cos_sin[2 * i + 1];
    to[x] = T(a * cos - b * sin);
    to[y] = T(b * cos + a * sin);
  }
  std::memcpy(to + 2 * pairs, from + 2 * pairs, (head_dim - 2 * pairs) * sizeof(T));
}

// Chunk `slot` of sequence b: its values are copied, its keys copied or rotated. All keys of a chunk
// move by the same distance, so the angles are computed once for it.
template <typename T>
void gather_chunk(const GatherChunksParams& p, int64_t b, int slot, std::vector<float>& cos_sin) {
  const int32_t* ids = p.ids + b * p.budget;
  const int64_t from = int64_t(ids[slot]) * p.chunk_size, to = int64_t(slot) * p.chunk_size;
  int64_t rows = chunk_rows(ids[slot], p.chunk_size, p.lens[b], p.full_capacity);
  if (to + rows > p.work_capacity) rows = p.work_capacity > to ? p.work_capacity - to : 0;
  const int64_t shift = chunk_shift(ids, slot, p.counts[b], p.chunk_size, p.right_aligned);
  const bool rotates = p.num_pairs > 0 && shift != 0;
  if (rotates) {
    cos_sin.resize(2 * p.num_pairs);
    for (int i = 0; i < p.num_pairs; ++i) {
      const double angle = double(shift) * double(p.inv_freq[i]);
      cos_sin[2 * i] = float(std::cos(angle)), cos_sin[2 * i + 1] = float(std::sin(angle));
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int h = 0; h < p.k.num_kv_heads; ++h) {
      const char* key = source(p.k, p, b, from + row, h);
      char* moved = target(p.k, p, b, to + row, h);
      if (rotates)
        rotate_row(reinterpret_cast<const T*>(key), reinterpret_cast<T*>(moved), cos_sin.data(), p,
                   int(p.k.row_bytes / sizeof(T)));
      else
        std::memcpy(moved, key, p.k.row_bytes);
    }
    for (int h = 0; h < p.v.num_kv_heads; ++h)
      std::memcpy(target(p.v, p, b, to + row, h), source(p.v, p, b, from + row, h), p.v.row_bytes);
  }
}

template <typename T>
void run(const GatherChunksParams& p) {
  constexpr int64_t kChunksPerTask = 8;
  torch::stable::parallel_for(
      0, int64_t(p.batch) * p.budget, kChunksPerTask, [&](int64_t begin, int64_t end) {
        std::vector<float> cos_sin;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / p.budget;
          const int slot = int(i % p.budget);
          if (slot < p.counts[b] && p.ids[i] >= 0) gather_chunk<T>(p, b, slot, cos_sin);
        }
      });
}

}  // namespace

void gather_chunks(const GatherChunksParams& p, DType dtype) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int32_t* ids = p.ids + b * p.budget;
    const int count = p.counts[b];
    // Only the newest chunk may be partial, and it can only be the last.
    int64_t rows = count < 1 ? 0
                             : int64_t(count - 1) * p.chunk_size +
                                   chunk_rows(ids[count - 1], p.chunk_size, p.lens[b], p.full_capacity);
    p.work_lens[b] = int32_t(rows < p.work_capacity ? rows : p.work_capacity);
  }
  switch (dtype) {
    case DType::kFloat32: return run<float>(p);
    case DType::kFloat16: return run<c10::Half>(p);
    case DType::kBFloat16: return run<c10::BFloat16>(p);
  }
}

}  // namespace specextend::cpu
