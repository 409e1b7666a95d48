#pragma once

#include <cuda_runtime_api.h>
#include <unistd.h>

#include <string>

namespace specextend::emulation {

inline size_t round_to_pages(size_t bytes) {
  static const size_t page = size_t(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

// Tensors that guarded_memory.cpp has made lie here.
extern const unsigned char* guarded_begin;
extern size_t guarded_bytes;
inline bool is_guarded(const void* p) {
  return size_t(static_cast<const unsigned char*>(p) - guarded_begin) < guarded_bytes;
}

// Says whether blocks may begin before the kernel in front of them has ended.
bool is_early(const cudaLaunchConfig_t& config);

// Says whether a device would take the launch.
cudaError_t check_launch_config(const void* kernel, const cudaLaunchConfig_t& config);

// Counts the blocks along x that run together.
unsigned cluster_of(const cudaLaunchConfig_t& config);

// Describes an address outside of all memory that may be touched: "byte 3 of ...".
std::string describe_address(const void* address);

// Describes the first tensor in whose neighbourhood something was written, as "a tensor's memory of
// ...", or gives an empty string if there is none. It repairs what it finds.
std::string find_damage();

}  // namespace specextend::emulation
