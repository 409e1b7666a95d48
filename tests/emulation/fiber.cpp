#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#if !defined(__x86_64__) || defined(SPECEXTEND_EMULATION_UCONTEXT)
#include <ucontext.h>
#define USE_UCONTEXT
#endif

namespace specextend::emulation {
namespace {

constexpr size_t kGuardBytes = 64 * 1024;  // lies below each stack; whole pages everywhere

}  // namespace

// Stacks are never given back: there is one set of them.
Fiber::Fiber() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  stack_ = static_cast<unsigned char*>(memory) + kGuardBytes;
  if (mprotect(stack_, kStackBytes, PROT_READ | PROT_WRITE) != 0) abort();
}

bool Fiber::overflows(const void* address) const {
  return address < stack_ && address >= stack_ - kGuardBytes;
}

#ifdef USE_UCONTEXT

namespace {

// makecontext passes ints.
void enter(unsigned f0, unsigned f1, unsigned a0, unsigned a1) {
  const auto pointer = [](unsigned low, unsigned high) {
    return reinterpret_cast<void*>(uintptr_t(uint64_t(high) << 32 | low));
  };
  reinterpret_cast<void (*)(void*)>(pointer(f0, f1))(pointer(a0, a1));
}

// Lies at the low end of the fiber's stack.
struct Contexts {
  ucontext_t own, resumer;
};

}  // namespace

void Fiber::start(void (*function)(void*), void* argument) {
  auto* contexts = reinterpret_cast<Contexts*>(stack_);
  own_ = &contexts->own;
  resumer_ = &contexts->resumer;
  getcontext(&contexts->own);
  contexts->own.uc_stack.ss_sp = stack_ + sizeof(Contexts);
  contexts->own.uc_stack.ss_size = kStackBytes - sizeof(Contexts);
  contexts->own.uc_link = nullptr;
  const uint64_t f = reinterpret_cast<uintptr_t>(function),
                 a = reinterpret_cast<uintptr_t>(argument);
  makecontext(&contexts->own, reinterpret_cast<void (*)()>(enter), 4, unsigned(f),
              unsigned(f >> 32), unsigned(a), unsigned(a >> 32));
}

void Fiber::resume() {
  swapcontext(static_cast<ucontext_t*>(resumer_), static_cast<ucontext_t*>(own_));
}

void Fiber::suspend() {
  swapcontext(static_cast<ucontext_t*>(own_), static_cast<ucontext_t*>(resumer_));
}

#else

// Saves the registers that a function must keep on this stack and goes on from another one;
// swapcontext does so with two system calls.
extern "C" void specextend_emulation_switch(void** from, void* to);
extern "C" void specextend_emulation_enter();

asm(R"(
.text
.type specextend_emulation_switch, @function
specextend_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size specextend_emulation_switch, .-specextend_emulation_switch

.type specextend_emulation_enter, @function
specextend_emulation_enter:
  movq %r13, %rdi
  callq *%r12
  ud2
.size specextend_emulation_enter, .-specextend_emulation_enter
)");

void Fiber::start(void (*function)(void*), void* argument) {
  auto* top = reinterpret_cast<uint64_t*>(stack_ + kStackBytes);
  *--top = 0;
  *--top = 0;  // here the stack pointer is a multiple of 16, as it must be at a call
  *--top = reinterpret_cast<uint64_t>(&specextend_emulation_enter);
  *--top = 0;                                     // rbp
  *--top = 0;                                     // rbx
  *--top = reinterpret_cast<uint64_t>(function);  // r12
  *--top = reinterpret_cast<uint64_t>(argument);  // r13
  *--top = 0;                                     // r14
  *--top = 0;                                     // r15
  own_ = top;
}

void Fiber::resume() { specextend_emulation_switch(&resumer_, own_); }

void Fiber::suspend() { specextend_emulation_switch(&own_, resumer_); }

#endif

}  // namespace specextend::emulation
