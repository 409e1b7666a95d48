#pragma once

// A fiber is a thread of a block: it has a stack of its own, and a switch to it and back takes some
// nanoseconds.

#include <cstddef>

namespace specextend::emulation {

constexpr size_t kStackBytes = 128 * 1024;

class Fiber {
 public:
  Fiber();
  Fiber(const Fiber&) = delete;

  // Says whether the address lies behind the end of the stack, which must not be touched.
  bool overflows(const void* address) const;

  // The next resume() calls function(argument), which must not return.
  void start(void (*function)(void*), void* argument);
  // Runs the fiber until it suspends itself.
  void resume();
  void suspend();

 private:
  unsigned char* stack_;
  void* own_;      // the fiber goes on here
  void* resumer_;  // who runs it goes on here
};

}  // namespace specextend::emulation
