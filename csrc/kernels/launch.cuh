#pragma once

// How kernels are launched: by an API call and not <<<>>>, so that a host compiler reads it too.

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace specextend {

constexpr size_t kSharedWithoutAsking = 48 * 1024;  // bytes; a kernel has to ask for more

template <typename... Params, typename... Args>
cudaError_t launch_with(cudaLaunchAttribute* attributes, unsigned num_attributes,
                        void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                        cudaStream_t stream, Args&&... args) {
  if (shared_bytes > kSharedWithoutAsking) {
    const void* const function = reinterpret_cast<const void*>(kernel);
    cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
    // The kernel prefers all that a multiprocessor has: else there may be none for a second block.
    error = cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = num_attributes;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Args&&... args) {
  return launch_with(nullptr, 0, kernel, grid, block, shared_bytes, stream,
                     std::forward<Args>(args)...);
}

// With `early`, blocks may begin before the stream's previous kernel has ended, as far as that one
// lets them (ptx::let_successors_begin), and have to wait for it themselves; from sm_90 on.
template <typename... Params, typename... Args>
cudaError_t launch_early(bool early, void (*kernel)(Params...), dim3 grid, dim3 block,
                         size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return launch_with(&attribute, early ? 1 : 0, kernel, grid, block, shared_bytes, stream,
                     std::forward<Args>(args)...);
}

// Launches clusters of `cluster` blocks along x; from sm_90 on.
template <typename... Params, typename... Args>
cudaError_t launch_clusters(unsigned cluster, void (*kernel)(Params...), dim3 grid, dim3 block,
                            size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return launch_with(&attribute, cluster > 1 ? 1 : 0, kernel, grid, block, shared_bytes, stream,
                     std::forward<Args>(args)...);
}

}  // namespace specextend
