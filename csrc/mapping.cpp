#include "mapping.h"

#include <sys/mman.h>

#include <cerrno>
#include <system_error>

namespace specextend {

namespace {

constexpr int kAccess = PROT_READ | PROT_WRITE;

}  // namespace

Mapping::Mapping(int file, const std::vector<MappedPiece>& pieces, int64_t size, bool shared)
    : data_(mmap(nullptr, size, kAccess, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)),
      size_(size) {
  if (data_ == MAP_FAILED) throw std::system_error(errno, std::generic_category());
  const int kind = MAP_FIXED | (shared ? MAP_SHARED : MAP_PRIVATE | MAP_NORESERVE);
  for (const MappedPiece& piece : pieces) {
    void* place = static_cast<char*>(data_) + piece.at;
    if (mmap(place, piece.bytes, kAccess, kind, file, piece.offset) == MAP_FAILED) {
      const int error = errno;
      munmap(data_, size_);
      throw std::system_error(error, std::generic_category());
    }
  }
}

Mapping::~Mapping() { munmap(data_, size_); }

}  // namespace specextend
