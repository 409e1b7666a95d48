#ifdef SPECEXTEND_HAS_CUDA
#include "device_memory.h"

#include <cuda.h>
#include <torch/headeronly/util/Exception.h>

#include "driver.h"
#include "stream.h"

namespace specextend {

namespace {

// The driver's functions; null where it is older than they are.
struct Driver {
  decltype(&cuDeviceGet) get_device = nullptr;
  decltype(&cuDeviceGetAttribute) get_attribute = nullptr;
  decltype(&cuGetErrorName) get_error_name = nullptr;
  decltype(&cuMemGetAllocationGranularity) get_granularity = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) free = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  bool complete;

  Driver() {
    complete = find("cuDeviceGet", &get_device) && find("cuDeviceGetAttribute", &get_attribute) &&
               find("cuGetErrorName", &get_error_name) &&
               find("cuMemGetAllocationGranularity", &get_granularity) &&
               find("cuMemCreate", &create) && find("cuMemRelease", &release) &&
               find("cuMemAddressReserve", &reserve) && find("cuMemAddressFree", &free) &&
               find("cuMemMap", &map) && find("cuMemSetAccess", &set_access) &&
               find("cuMemUnmap", &unmap);
  }

  template <typename Function>
  static bool find(const char* name, Function* function) {
    void* found = nullptr;
    if (find_driver_function(name, &found) != cudaSuccess) {
      cudaGetLastError();  // else whoever asks next would be told of it
      return false;
    }
    *function = reinterpret_cast<Function>(found);
    return true;
  }
};

const Driver& driver() {
  static const Driver functions;
  return functions;
}

void check(const char* function, CUresult result) {
  if (result == CUDA_SUCCESS) return;
  const char* name = nullptr;
  if (driver().get_error_name(result, &name) != CUDA_SUCCESS) name = "an unknown error";
  STD_TORCH_CHECK(false, "memory shared by forks: ", function, " failed: ", name, " (error ",
                  int(result), ")");
}

CUmemAllocationProp properties(int32_t device) {
  CUmemAllocationProp made{};
  made.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  made.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  made.location.id = device;
  return made;
}

}  // namespace

int64_t memory_granularity(int32_t device) {
  if (!driver().complete) return 0;
  CUdevice handle;
  int supported = 0;
  check("cuDeviceGet", driver().get_device(&handle, device));
  check("cuDeviceGetAttribute",
        driver().get_attribute(&supported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
                               handle));
  if (!supported) return 0;
  const CUmemAllocationProp wanted = properties(device);
  size_t bytes = 0;
  check("cuMemGetAllocationGranularity",
        driver().get_granularity(&bytes, &wanted, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED));
  return int64_t(bytes);
}

std::optional<uint64_t> create_memory(int32_t device, int64_t bytes) {
  const CUmemAllocationProp wanted = properties(device);
  CUmemGenericAllocationHandle made = 0;
  const CUresult result = driver().create(&made, size_t(bytes), &wanted, 0);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) return std::nullopt;
  check("cuMemCreate", result);
  return made;
}

void release_memory(uint64_t memory) { check("cuMemRelease", driver().release(memory)); }

uint64_t reserve_addresses(int64_t bytes) {
  CUdeviceptr begin = 0;
  check("cuMemAddressReserve", driver().reserve(&begin, size_t(bytes), 0, 0, 0));
  return begin;
}

void free_addresses(uint64_t begin, int64_t bytes) {
  check("cuMemAddressFree", driver().free(begin, size_t(bytes)));
}

void map_memory(int32_t device, uint64_t begin, int64_t bytes, uint64_t memory) {
  check("cuMemMap", driver().map(begin, size_t(bytes), 0, memory, 0));
  CUmemAccessDesc access{};
  access.location = properties(device).location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  const CUresult result = driver().set_access(begin, size_t(bytes), &access, 1);
  if (result != CUDA_SUCCESS) driver().unmap(begin, size_t(bytes));  // which nobody has used
  check("cuMemSetAccess", result);
}

void unmap_memory(int32_t device, uint64_t begin, int64_t bytes) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaDeviceSynchronize();
    const cudaError_t restored = cudaSetDevice(before);
    if (error == cudaSuccess) error = restored;
  }
  check_launch("unmap_memory", error);
  check("cuMemUnmap", driver().unmap(begin, size_t(bytes)));
}

bool is_captured(int32_t device) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(current_stream(device), &status) != cudaSuccess) {
    cudaGetLastError();  // torch's stream is the legacy one, and another one is captured
    return true;
  }
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace specextend
#endif
