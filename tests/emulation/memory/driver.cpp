// Stands in for the driver, where memory is mapped: physical memory is pages of a file in memory,
// and what a device's addresses are is addresses of this process. What the driver's documentation
// does not allow is refused, and so is what would only show on a GPU: addresses that are taken away
// while the device may still use them.

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <torch/headeronly/util/Exception.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <string>

#include "stream.h"

namespace {

constexpr size_t kGranularity = 4096;
constexpr int kDevice = 0;
constexpr unsigned char kPoison = 0xff;  // of floating-point numbers: NaN

struct Memory {
  size_t offset, bytes;
  int mappings = 0;
  bool released = false;
};

struct Mapping {
  size_t bytes;
  CUmemGenericAllocationHandle memory;
  bool in_use = false;  // the device can see it
};

std::map<CUmemGenericAllocationHandle, Memory> memories;
std::map<CUdeviceptr, size_t> reservations;
std::map<CUdeviceptr, Mapping> mappings;
CUmemGenericAllocationHandle last_handle = 0;
size_t total = 0, most = SIZE_MAX;  // bytes of physical memory in use, and that there are
bool waited = false;                // for the device, since something was taken away last
bool captured = false;
bool supported = true;
int calls_before_failure = -1;  // below 0: none fails
CUresult failure = CUDA_SUCCESS;

int file() {
  static const int made = memfd_create("emulated GPU", MFD_CLOEXEC);
  return made;
}

bool is_multiple(size_t bytes) { return bytes % kGranularity == 0; }

bool is_device(const CUmemLocation& location) {
  return location.type == CU_MEM_LOCATION_TYPE_DEVICE && location.id == kDevice;
}

// Returns whether the call that asks is the one that is to fail.
bool fails() { return calls_before_failure >= 0 && calls_before_failure-- == 0; }

// Returns the first of things by addresses that ends behind `begin`.
template <typename Things, typename Bytes>
typename Things::iterator first_behind(Things& things, CUdeviceptr begin, Bytes bytes_of) {
  auto it = things.upper_bound(begin);
  if (it != things.begin()) {
    const auto before = std::prev(it);
    if (before->first + bytes_of(before->second) > begin) return before;
  }
  return it;
}

bool is_reserved(CUdeviceptr begin, size_t bytes) {
  const auto it = first_behind(reservations, begin, [](size_t size) { return size; });
  return it != reservations.end() && it->first <= begin && begin + bytes <= it->first + it->second;
}

bool is_mapped(CUdeviceptr begin, size_t bytes) {  // some of it
  const auto it = first_behind(mappings, begin, [](const Mapping& m) { return m.bytes; });
  return it != mappings.end() && it->first < begin + bytes;
}

void* address(CUdeviceptr begin) { return reinterpret_cast<void*>(begin); }

void forget_if_unused(CUmemGenericAllocationHandle handle) {
  const Memory& memory = memories.at(handle);
  if (!memory.released || memory.mappings > 0) return;
  fallocate(file(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off_t(memory.offset),
            off_t(memory.bytes));
  total -= memory.bytes;
  memories.erase(handle);
}

}  // namespace

// --- what csrc/stream.h has ---

namespace specextend {

cudaStream_t current_stream(int32_t) { return nullptr; }

void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": error ", int(error));
}

}  // namespace specextend

// --- the runtime ---

cudaError_t cudaGetDevice(int* device) {
  *device = kDevice;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return device == kDevice ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaDeviceSynchronize() {
  waited = !captured;
  return captured ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  static const std::map<std::string, void*> functions = {
      {"cuDeviceGet", reinterpret_cast<void*>(cuDeviceGet)},
      {"cuDeviceGetAttribute", reinterpret_cast<void*>(cuDeviceGetAttribute)},
      {"cuGetErrorName", reinterpret_cast<void*>(cuGetErrorName)},
      {"cuMemGetAllocationGranularity", reinterpret_cast<void*>(cuMemGetAllocationGranularity)},
      {"cuMemCreate", reinterpret_cast<void*>(cuMemCreate)},
      {"cuMemRelease", reinterpret_cast<void*>(cuMemRelease)},
      {"cuMemAddressReserve", reinterpret_cast<void*>(cuMemAddressReserve)},
      {"cuMemAddressFree", reinterpret_cast<void*>(cuMemAddressFree)},
      {"cuMemMap", reinterpret_cast<void*>(cuMemMap)},
      {"cuMemSetAccess", reinterpret_cast<void*>(cuMemSetAccess)},
      {"cuMemUnmap", reinterpret_cast<void*>(cuMemUnmap)},
  };
  const auto it = functions.find(symbol);
  *found = it == functions.end() ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
  *function = it == functions.end() ? nullptr : it->second;
  return cudaSuccess;
}

// --- the driver ---

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal == kDevice ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  if (attribute != CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *value = supported;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** name) {
  switch (error) {
    case CUDA_SUCCESS:
      *name = "CUDA_SUCCESS";
      break;
    case CUDA_ERROR_INVALID_VALUE:
      *name = "CUDA_ERROR_INVALID_VALUE";
      break;
    case CUDA_ERROR_OUT_OF_MEMORY:
      *name = "CUDA_ERROR_OUT_OF_MEMORY";
      break;
    case CUDA_ERROR_INVALID_DEVICE:
      *name = "CUDA_ERROR_INVALID_DEVICE";
      break;
    case CUDA_ERROR_ILLEGAL_STATE:
      *name = "CUDA_ERROR_ILLEGAL_STATE";
      break;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp* properties,
                                       CUmemAllocationGranularity_flags) {
  if (!is_device(properties->location)) return CUDA_ERROR_INVALID_VALUE;
  *bytes = kGranularity;
  return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* memory, size_t bytes,
                     const CUmemAllocationProp* properties, unsigned long long flags) {
  if (bytes == 0 || !is_multiple(bytes) || flags != 0 || !is_device(properties->location) ||
      properties->type != CU_MEM_ALLOCATION_TYPE_PINNED) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (fails()) return failure;
  if (bytes > most - total) return CUDA_ERROR_OUT_OF_MEMORY;
  static size_t end = 0;  // pages that were given back take no memory, and are not used again
  if (ftruncate(file(), off_t(end + bytes)) != 0) return CUDA_ERROR_OUT_OF_MEMORY;
  void* fresh = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file(), off_t(end));
  if (fresh == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  memset(fresh, kPoison, bytes);
  munmap(fresh, bytes);
  *memory = ++last_handle;
  memories[*memory] = {end, bytes};
  end += bytes;
  total += bytes;
  return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  const auto it = memories.find(handle);
  if (it == memories.end() || it->second.released) return CUDA_ERROR_INVALID_VALUE;
  if (captured) return CUDA_ERROR_ILLEGAL_STATE;
  it->second.released = true;
  forget_if_unused(handle);
  return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* begin, size_t bytes, size_t alignment, CUdeviceptr wish,
                             unsigned long long flags) {
  if (bytes == 0 || !is_multiple(bytes) || alignment != 0 || wish != 0 || flags != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (fails()) return failure;
  void* made = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (made == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  *begin = reinterpret_cast<CUdeviceptr>(made);
  reservations[*begin] = bytes;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr begin, size_t bytes) {
  const auto it = reservations.find(begin);
  if (it == reservations.end() || it->second != bytes) return CUDA_ERROR_INVALID_VALUE;
  if (is_mapped(begin, bytes)) return CUDA_ERROR_ILLEGAL_STATE;
  munmap(address(begin), bytes);
  reservations.erase(it);
  return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr begin, size_t bytes, size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
  const auto memory = memories.find(handle);
  if (memory == memories.end() || memory->second.released || offset != 0 || flags != 0 ||
      bytes == 0 || !is_multiple(bytes) || !is_multiple(begin) || bytes > memory->second.bytes) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (!is_reserved(begin, bytes) || is_mapped(begin, bytes)) return CUDA_ERROR_INVALID_VALUE;
  if (fails()) return failure;
  if (mmap(address(begin), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, file(),
           off_t(memory->second.offset)) == MAP_FAILED) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  ++memory->second.mappings;
  mappings[begin] = {bytes, handle};
  return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr begin, size_t bytes, const CUmemAccessDesc* access,
                        size_t count) {
  const auto mapping = mappings.find(begin);
  if (mapping == mappings.end() || mapping->second.bytes != bytes || count != 1 ||
      !is_device(access->location) || access->flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (fails()) return failure;
  mprotect(address(begin), bytes, PROT_READ | PROT_WRITE);
  mapping->second.in_use = true;
  return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr begin, size_t bytes) {
  const auto mapping = mappings.find(begin);
  if (mapping == mappings.end() || mapping->second.bytes != bytes) return CUDA_ERROR_INVALID_VALUE;
  // A GPU would take it, and a kernel would fail.
  if (mapping->second.in_use && !waited) return CUDA_ERROR_ILLEGAL_STATE;
  waited = false;
  mmap(address(begin), bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
       -1, 0);
  const CUmemGenericAllocationHandle handle = mapping->second.memory;
  mappings.erase(mapping);
  --memories.at(handle).mappings;
  forget_if_unused(handle);
  return CUDA_SUCCESS;
}

// --- for tests, called from Python ---

#define SPECEXTEND_FOR_TESTS extern "C" __attribute__((visibility("default")))

SPECEXTEND_FOR_TESTS int64_t emulated_memory_in_use() { return int64_t(total); }

// Counts the ranges of addresses that are reserved, and the mappings into them.
SPECEXTEND_FOR_TESTS int64_t emulated_ranges() {
  return int64_t(reservations.size() + mappings.size());
}

// Says how much memory there is beside what is in use; below 0: any amount.
SPECEXTEND_FOR_TESTS void emulated_memory_left(int64_t bytes) {
  most = bytes < 0 ? SIZE_MAX : total + size_t(bytes);
}

SPECEXTEND_FOR_TESTS void emulated_capture(int on) { captured = on != 0; }

SPECEXTEND_FOR_TESTS void emulated_support(int on) { supported = on != 0; }

// Has one call of those that reserve, create, map or give access fail; the first `calls` do not.
// Below 0: none fails. Returns whether the last one that was to fail has failed.
SPECEXTEND_FOR_TESTS int emulated_failure(int calls, int error) {
  const bool has_failed = calls_before_failure < 0;
  calls_before_failure = calls;
  failure = CUresult(error);
  return has_failed;
}
