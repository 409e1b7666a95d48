// Memory of torch's CPU tensors, each piece between pages that must not be touched and poisoned, so
// that a kernel that leaves its tensors or reads what nobody wrote shows.

#undef TORCH_TARGET_VERSION  // the allocator is no part of the stable ABI

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <cstring>
#include <map>
#include <mutex>
#include <new>

#include "emulation/block.h"
#include "host.h"

namespace specextend::emulation {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kAlignment = 16;  // of the end; what kernels may ask of a tensor

struct Piece {
  unsigned char* begin;  // of the tensor
  size_t bytes;
  void* mapping;
  size_t mapping_bytes;
};

std::mutex mutex;

std::map<uintptr_t, Piece>& pieces() {  // by the end of their mapping
  static auto* const all = new std::map<uintptr_t, Piece>;
  return *all;
}

std::map<void*, uintptr_t>& ends() {
  static auto* const all = new std::map<void*, uintptr_t>;
  return *all;
}

void release(void* begin) {
  if (begin == nullptr) return;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto end = ends().find(begin);
  const auto piece = pieces().find(end->second);
  munmap(piece->second.mapping, piece->second.mapping_bytes);
  pieces().erase(piece);
  ends().erase(end);
}

class GuardedAllocator : public c10::Allocator {
 public:
  // The tensor ends where the guard behind it begins.
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &release, device};
    const size_t aligned = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    const size_t open = (aligned + kPage - 1) / kPage * kPage;
    const size_t all = open + 2 * kPage;
    void* mapping =
        mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    auto* first = static_cast<unsigned char*>(mapping) + kPage;
    if (mapping == MAP_FAILED || mprotect(first, open, PROT_READ | PROT_WRITE) != 0) {
      throw std::bad_alloc();
    }
    if (open <= kMaxPoisoned) memset(first, kPoison, open);
    unsigned char* begin = first + open - aligned;
    const std::lock_guard<std::mutex> lock(mutex);
    const uintptr_t end = reinterpret_cast<uintptr_t>(mapping) + all;
    pieces()[end] = {begin, bytes, mapping, all};
    ends()[begin] = end;
    return {begin, begin, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static constexpr size_t kMaxPoisoned = 64 << 20;  // more is left to be touched where it is used
};

}  // namespace

std::string describe_address(const void* address) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto it = pieces().upper_bound(reinterpret_cast<uintptr_t>(address));
  if (it == pieces().end() || address < it->second.mapping) return "memory that is no tensor's";
  const Piece& piece = it->second;
  return "byte " + std::to_string(static_cast<const unsigned char*>(address) - piece.begin) +
         " of a tensor's memory of " + std::to_string(piece.bytes) + " bytes";
}

}  // namespace specextend::emulation

// Called from Python: whether CPU tensors made from now on are guarded.
extern "C" __attribute__((visibility("default"))) void specextend_emulation_guard(int on) {
  static auto* const guarded = new specextend::emulation::GuardedAllocator;
  static c10::Allocator* const usual = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? static_cast<c10::Allocator*>(guarded) : usual);
}
