#pragma once

// A thread of a block: a stack of its own, and a switch to it and back of some nanoseconds.

#include <cstddef>

namespace specextend::emulation {

constexpr size_t kStackBytes = 128 * 1024;

class Fiber {
 public:
  Fiber();
  Fiber(const Fiber&) = delete;

  // Whether the address lies behind the end of the stack, which must not be touched.
  bool overflows(const void* address) const;

  // The next resume() calls function(argument), which must not return.
  void start(void (*function)(void*), void* argument);
  // Runs the fiber until it suspends itself.
  void resume();
  void suspend();

 private:
  unsigned char* stack_;
  void* own_;      // where the fiber goes on
  void* resumer_;  // where the one who runs it goes on
};

}  // namespace specextend::emulation
