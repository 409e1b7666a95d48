// In the place of the portable kernels of tree_attention: calls that are not for Hopper fail.

#include "launch.h"

namespace specextend {

cudaError_t plan_tree_attention(const TreeAttentionParams&, DType, int, AttentionPlan*) {
  return cudaErrorNoKernelImageForDevice;
}

cudaError_t launch_tree_attention(const TreeAttentionParams&, DType, const AttentionPlan&, void*,
                                  cudaStream_t) {
  return cudaErrorNoKernelImageForDevice;
}

}  // namespace specextend
