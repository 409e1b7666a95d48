// Has the host's side: the runtime API, what csrc/ops/ asks of csrc/stream.h, and the settings.

#include "host.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "emulation/block.h"
#include "stream.h"

namespace specextend {
namespace emulation {
namespace {

constexpr int kSharedBytesUnasked = 48 * 1024;
constexpr int kSharedBytesOfMultiprocessor = 228 * 1024;
constexpr int kReservedSharedBytes = 1024;  // each block gives them up
constexpr int kThreadsOfMultiprocessor = 2048;
constexpr int kBlocksOfMultiprocessor = 32;

// Says what a kernel was allowed to use, and asked a multiprocessor to set aside.
struct KernelSettings {
  int limit = kSharedBytesUnasked;
  int carveout = cudaSharedmemCarveoutDefault;
};
std::map<const void*, KernelSettings>& settings_of_kernels() {
  static std::map<const void*, KernelSettings> of;
  return of;
}

int early_launches = 0;

}  // namespace

bool is_early(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization) return true;
  }
  return false;
}

unsigned cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) return attribute.val.clusterDim.x;
  }
  return 1;
}

cudaError_t check_launch_config(const void* kernel, const cudaLaunchConfig_t& config) {
  early_launches += is_early(config);
  const KernelSettings own = settings_of_kernels()[kernel];
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (config.dynamicSmemBytes > size_t(own.limit)) return cudaErrorInvalidValue;
  // A GPU would take it, and might hold one block where two were planned: here it is an error.
  if (config.dynamicSmemBytes > kSharedBytesUnasked &&
      own.carveout != cudaSharedmemCarveoutMaxShared) {
    return cudaErrorInvalidConfiguration;
  }
  const bool fits = grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffff &&
                    grid.y <= 65535 && grid.z <= 65535 && block.x >= 1 && block.y >= 1 &&
                    block.z >= 1 && block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
                    uint64_t(block.x) * block.y * block.z <= uint64_t(kMaxThreads);
  const unsigned cluster = cluster_of(config);
  if (cluster > 1) {
    if (settings.capability < 90 || cluster > unsigned(kMaxCluster) || grid.x % cluster != 0 ||
        block.x * block.y * block.z * cluster > unsigned(kMaxThreads) ||
        block.x * block.y * block.z % kWarp != 0) {
      return cudaErrorInvalidConfiguration;
    }
  }
  return fits ? cudaSuccess : cudaErrorInvalidConfiguration;
}

}  // namespace emulation

cudaStream_t current_stream(int32_t) { return nullptr; }

bool has_compute_capability(int32_t, int major, int minor) {
  return emulation::settings.capability == 10 * major + minor;
}

void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op,
                  ": the CUDA launch failed: ", cudaGetErrorString(error));
}

}  // namespace specextend

using namespace specextend::emulation;

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = kMaxThreads;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kSharedBytesUnasked;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = settings.multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = settings.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = settings.capability % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = kSharedBytesOfMultiprocessor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(kMaxSharedBytes);
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) {
    settings_of_kernels()[kernel].carveout = value;
    return cudaSuccess;
  }
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
  if (value < 0 || value > int(kMaxSharedBytes)) return cudaErrorInvalidValue;
  settings_of_kernels()[kernel].limit = value;
  return cudaSuccess;
}

// Registers do not count here: the host knows nothing of them.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads,
                                                          size_t shared_bytes) {
  if (threads < 1 || threads > kMaxThreads) return cudaErrorInvalidValue;
  *blocks = std::min({kBlocksOfMultiprocessor, kThreadsOfMultiprocessor / threads,
                      kSharedBytesOfMultiprocessor / (int(shared_bytes) + kReservedSharedBytes)});
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  *function = known ? reinterpret_cast<void*>(cuTensorMapEncodeTiled) : nullptr;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
      return last_error().c_str();
  }
  return "unknown error";
}

// Called from Python.
extern "C" __attribute__((visibility("default"))) void specextend_emulation_set(uint64_t seed,
                                                                                int kind,
                                                                                int multiprocessors,
                                                                                int capability) {
  settings = {seed, Kind(kind), multiprocessors, capability};
}

// Counts the launches so far that may begin before the kernel in front of them has ended.
extern "C" __attribute__((visibility("default"))) int specextend_emulation_early_launches() {
  return early_launches;
}
