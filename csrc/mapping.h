// Memory that a file's pages lie in, for tensors whose rows several caches share.
#pragma once

#include <cstdint>
#include <vector>

namespace specextend {

// A part of a file and its place in memory, in bytes. All three are multiples of the page.
struct MappedPiece {
  int64_t at, offset, bytes;
};

// A range of memory with pieces of a file in it; zeros elsewhere, which take no memory until they
// are written.
class Mapping {
 public:
  // file: a descriptor, which may be closed afterwards. size: of the range. shared: what is written
  // goes to the file; else the range has copies of the pages that were written to.
  // Throws std::system_error.
  Mapping(int file, const std::vector<MappedPiece>& pieces, int64_t size, bool shared);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  void* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  void* data_;
  int64_t size_;
};

}  // namespace specextend
