#pragma once

// Looks up functions of the CUDA driver, so that nothing links libcuda or needs it to be loaded.

#include <cuda_runtime_api.h>

namespace specextend {

// Finds a function of the driver, as of CUDA 12.0, by its name.
inline cudaError_t find_driver_function(const char* name, void** function) {
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return error;
  return found == cudaDriverEntryPointSuccess ? cudaSuccess : cudaErrorCallRequiresNewerDriver;
}

}  // namespace specextend
