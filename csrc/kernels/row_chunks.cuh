#pragma once

// Rows [.., N] in chunks of 16 bytes: what a thread reads at a time, by one wide load or element by
// element. Which elements belong together does not depend on which it is.

#include <cuda_runtime.h>

#include <cstdint>

#include "params.h"

namespace specextend {

template <typename T>
struct alignas(16) RowChunk {
  static constexpr int kElements = 16 / int(sizeof(T));
  T x[kElements];
};

template <typename T>
int64_t num_row_chunks(int64_t length) {
  return (length + RowChunk<T>::kElements - 1) / RowChunk<T>::kElements;
}

// Returns chunk c of a row, zeros behind its end. With kWide the row and N are multiples of 16
// bytes.
template <bool kWide, typename T>
__device__ __forceinline__ RowChunk<T> load_chunk(const T* row, int64_t c, int64_t length) {
  if constexpr (kWide) {
    return reinterpret_cast<const RowChunk<T>*>(row)[c];
  } else {
    constexpr int kElements = RowChunk<T>::kElements;
    RowChunk<T> chunk;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int64_t at = c * kElements + i;
      chunk.x[i] = at < length ? row[at] : T(0.f);
    }
    return chunk;
  }
}

template <bool kWide, typename T>
__device__ __forceinline__ void store_chunk(T* row, int64_t c, int64_t length,
                                            const RowChunk<T>& chunk) {
  if constexpr (kWide) {
    reinterpret_cast<RowChunk<T>*>(row)[c] = chunk;
  } else {
    constexpr int kElements = RowChunk<T>::kElements;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int64_t at = c * kElements + i;
      if (at < length) row[at] = chunk.x[i];
    }
  }
}

// Returns the bits of all numbers that the address of a row in `rows` is a sum of, in bytes.
inline uint64_t address_bits(const Rows& rows, int64_t element_size) {
  uint64_t bits = reinterpret_cast<uintptr_t>(rows.data);
  for (int64_t stride : rows.strides) bits |= uint64_t(stride * element_size);
  return bits;
}

}  // namespace specextend
