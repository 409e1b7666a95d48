// Makes the memory of torch's CPU tensors, each piece poisoned and between pages that must not be
// touched, so that a kernel that leaves its tensors or reads what nobody wrote shows.

#undef TORCH_TARGET_VERSION  // the allocator is no part of the stable ABI

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#include "emulation/block.h"
#include "host.h"

namespace specextend::emulation {

const unsigned char* guarded_begin = nullptr;
size_t guarded_bytes = 0;

namespace {

const size_t kPage = round_to_pages(1);
constexpr size_t kAlignment = 16;  // the end has it: what kernels may ask of a tensor

struct Piece {
  unsigned char* open;   // the memory that can be touched begins here
  unsigned char* begin;  // the tensor begins here
  size_t bytes;
  unsigned char* end;  // what can be touched ends here

  unsigned char* mapping() const { return open - kPage; }
  size_t mapping_bytes() const { return size_t(end - open) + 2 * kPage; }
  std::string string() const { return "a tensor's memory of " + std::to_string(bytes) + " bytes"; }
};

std::mutex mutex;

std::map<const void*, Piece>& pieces() {  // by their begin
  static auto* const all = new std::map<const void*, Piece>;
  return *all;
}

// All pieces lie in one range of addresses, of which memory is taken as it is needed.
constexpr size_t kAddresses = size_t(1) << 40;

// Takes the next addresses that no piece has: those of a piece that has gone are used again late.
unsigned char* take_addresses(size_t bytes) {
  static unsigned char* next = nullptr;
  if (guarded_begin == nullptr) {
    void* all =
        mmap(nullptr, kAddresses, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    guarded_begin = next = static_cast<unsigned char*>(all);
    guarded_bytes = kAddresses;
  }
  const unsigned char* const end = guarded_begin + kAddresses;
  for (int rounds = 0; rounds < 2;) {
    const auto piece = pieces().upper_bound(next);
    if (size_t(end - next) < bytes) {
      next = const_cast<unsigned char*>(guarded_begin);
      ++rounds;
    } else if (piece != pieces().end() && piece->second.mapping() < next + bytes) {
      next = piece->second.mapping() + piece->second.mapping_bytes();
    } else {
      next += bytes;
      return next - bytes;
    }
  }
  throw std::bad_alloc();
}

void release(void* begin) {
  if (begin == nullptr) return;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto it = pieces().find(begin);
  mmap(it->second.mapping(), it->second.mapping_bytes(), PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  pieces().erase(it);
}

class GuardedAllocator : public c10::Allocator {
 public:
  // The tensor ends where the guard behind it begins.
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &release, device};
    const size_t aligned = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    const size_t open = round_to_pages(aligned);
    const std::lock_guard<std::mutex> lock(mutex);
    auto* first = take_addresses(open + 2 * kPage) + kPage;
    if (mprotect(first, open, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    const Piece piece{first, first + open - aligned, bytes, first + open};
    // What is too large to be touched in vain keeps its zeros.
    memset(first, kPoison, open <= kMaxPoisoned ? open : size_t(piece.begin - first));
    memset(piece.begin + bytes, kPoison, aligned - bytes);
    pieces()[piece.begin] = piece;
    return {piece.begin, piece.begin, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static constexpr size_t kMaxPoisoned = 64 << 20;
};

}  // namespace

std::string describe_address(const void* address) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [begin, piece] : pieces()) {
    if (address >= piece.mapping() && address < piece.mapping() + piece.mapping_bytes()) {
      return "byte " + std::to_string(static_cast<const unsigned char*>(address) - piece.begin) +
             " of " + piece.string();
    }
  }
  return "memory that is no tensor's";
}

std::string find_damage() {
  const std::lock_guard<std::mutex> lock(mutex);
  static const std::vector<unsigned char> untouched(kPage, kPoison);
  std::string found;
  for (const auto& [begin, piece] : pieces()) {
    const auto check = [&found, &piece = piece](unsigned char* from, unsigned char* to) {
      if (memcmp(from, untouched.data(), size_t(to - from)) == 0) return;
      if (found.empty()) found = piece.string();
      memset(from, kPoison, size_t(to - from));
    };
    check(piece.open, piece.begin);
    check(piece.begin + piece.bytes, piece.end);
  }
  return found;
}

}  // namespace specextend::emulation

// Called from Python; says whether CPU tensors made from now on are guarded.
extern "C" __attribute__((visibility("default"))) void specextend_emulation_guard(int on) {
  static auto* const guarded = new specextend::emulation::GuardedAllocator;
  static c10::Allocator* const usual = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? static_cast<c10::Allocator*>(guarded) : usual);
}
