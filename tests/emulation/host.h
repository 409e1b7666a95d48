#pragma once

#include <cuda_runtime_api.h>
#include <unistd.h>

#include <string>

namespace specextend::emulation {

inline size_t round_to_pages(size_t bytes) {
  static const size_t page = size_t(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

// Where tensors are that guarded_memory.cpp has made.
extern const unsigned char* guarded_begin;
extern size_t guarded_bytes;
inline bool is_guarded(const void* p) {
  return size_t(static_cast<const unsigned char*>(p) - guarded_begin) < guarded_bytes;
}

// Whether blocks may begin before the kernel in front of them has ended.
bool is_early(const cudaLaunchConfig_t& config);

// Whether a device would take the launch.
cudaError_t check_launch_config(const void* kernel, const cudaLaunchConfig_t& config);

// Blocks along x that run together.
unsigned cluster_of(const cudaLaunchConfig_t& config);

// What is known of an address outside of all memory that may be touched: "the 3rd byte behind ...".
std::string describe_address(const void* address);

// The first tensor in whose neighbourhood something was written: "a tensor's memory of ...". Empty
// if there is none. What it finds it repairs.
std::string find_damage();

}  // namespace specextend::emulation
