// Has the functions of csrc/device_memory.h for Python's ctypes: what one of them throws is a text.

#include <exception>
#include <string>

#include "device_memory.h"

namespace {

std::string error;

// Puts what a function returns into `result`; returns what it has thrown, or null.
template <typename Function>
const char* call(int64_t* result, Function function) {
  try {
    *result = function();
    return nullptr;
  } catch (const std::exception& thrown) {
    error = thrown.what();
    return error.c_str();
  }
}

}  // namespace

#define SPECEXTEND_CALL(name, ...) \
  extern "C" __attribute__((visibility("default"))) const char* name(int64_t* result, __VA_ARGS__)

using namespace specextend;

SPECEXTEND_CALL(call_memory_granularity, int64_t device) {
  return call(result, [&] { return memory_granularity(int32_t(device)); });
}
// -1: there is not enough.
SPECEXTEND_CALL(call_create_memory, int64_t device, int64_t bytes) {
  return call(result, [&] {
    const auto made = create_memory(int32_t(device), bytes);
    return made ? int64_t(*made) : -1;
  });
}
SPECEXTEND_CALL(call_release_memory, int64_t memory) {
  return call(result, [&] { return release_memory(uint64_t(memory)), 0; });
}
SPECEXTEND_CALL(call_reserve_addresses, int64_t bytes) {
  return call(result, [&] { return int64_t(reserve_addresses(bytes)); });
}
SPECEXTEND_CALL(call_free_addresses, int64_t begin, int64_t bytes) {
  return call(result, [&] { return free_addresses(uint64_t(begin), bytes), 0; });
}
SPECEXTEND_CALL(call_map_memory, int64_t device, int64_t begin, int64_t bytes, int64_t memory) {
  return call(result, [&] {
    return map_memory(int32_t(device), uint64_t(begin), bytes, uint64_t(memory)), 0;
  });
}
SPECEXTEND_CALL(call_unmap_memory, int64_t device, int64_t begin, int64_t bytes) {
  return call(result, [&] { return unmap_memory(int32_t(device), uint64_t(begin), bytes), 0; });
}
SPECEXTEND_CALL(call_is_captured, int64_t device) {
  return call(result, [&] { return int64_t(is_captured(int32_t(device))); });
}
