#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <type_traits>

namespace specextend::cpu {

// Working memory that grows and is kept, one per thread (`static thread_local`), so that an op of
// some microseconds does not go to the heap. It is uninitialised and begins at a cache line.
template <typename T>
class Scratch {
  static_assert(std::is_trivial_v<T>);

 public:
  // Returns memory for `size` elements. What an earlier call returned is no longer valid.
  T* get(size_t size) {
    if (size > capacity_) {
      memory_.reset();
      capacity_ = 0;
      const size_t bytes = (size * sizeof(T) + kCacheLine - 1) / kCacheLine * kCacheLine;
      memory_.reset(static_cast<T*>(std::aligned_alloc(kCacheLine, bytes)));
      STD_TORCH_CHECK(memory_, "specextend: out of memory, ", bytes, " bytes of scratch");
      capacity_ = size;
    }
    return memory_.get();
  }

 private:
  static constexpr size_t kCacheLine = 64;
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory_;
  size_t capacity_ = 0;
};

}  // namespace specextend::cpu
