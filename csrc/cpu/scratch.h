#pragma once

#include <cstddef>
#include <memory>
#include <type_traits>

namespace specextend::cpu {

// Working memory that grows and is kept, one per thread (`static thread_local`), so that an op of
// some microseconds does not go to the heap. Uninitialised.
template <typename T>
class Scratch {
  static_assert(std::is_trivial_v<T>);

 public:
  T* get(size_t size) {
    if (size > capacity_) {
      data_.reset(new T[size]);
      capacity_ = size;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<T[]> data_;
  size_t capacity_ = 0;
};

}  // namespace specextend::cpu
