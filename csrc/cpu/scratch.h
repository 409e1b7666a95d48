#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <type_traits>

namespace specextend::cpu {

// Working memory that grows and is kept, one per thread (`static thread_local`), so that an op of
// some microseconds does not go to the heap. It begins with a cache line, and is not initialised.
template <typename T>
class Scratch {
  static_assert(std::is_trivial_v<T>);

 public:
  T* get(size_t size) {
    if (size > capacity_) {
      data_.reset();
      capacity_ = 0;
      const size_t bytes = (size * sizeof(T) + 63) / 64 * 64;
      data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
      STD_TORCH_CHECK(data_, "out of memory: ", bytes, " bytes of scratch are wanted");
      capacity_ = size;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  size_t capacity_ = 0;
};

}  // namespace specextend::cpu
