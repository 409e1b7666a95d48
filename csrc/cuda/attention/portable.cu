#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <iterator>
#include <utility>

#include "attention_plan.h"
#include "kernels/attention/call.cuh"
#include "kernels/attention/float.cuh"
#include "kernels/attention/launch.cuh"
#include "launch.h"

namespace specextend {
namespace {

// Launches the kernel for entry kIndex of kAttentionDims, or for a later one that is equal to
// `dims`.
template <typename T, int kIndex = 0>
cudaError_t launch_dims(AttentionDims dims, const AttentionCall& call, cudaStream_t stream) {
  constexpr AttentionDims kDims = kAttentionDims[kIndex];
  if constexpr (kIndex + 1 < int(std::size(kAttentionDims))) {
    if (dims.keys != kDims.keys || dims.values != kDims.values) {
      return launch_dims<T, kIndex + 1>(dims, call, stream);
    }
  }
  if constexpr (is_wide(kDims)) {
    return launch_wide_attention<T, kDims.keys, kDims.values>(call, stream);
  } else {
    return call.chunk_lse ? launch_attention<T, kDims.keys, kDims.values, true>(call, stream)
                          : launch_attention<T, kDims.keys, kDims.values, false>(call, stream);
  }
}

template <typename T>
cudaError_t launch_both(const AttentionCall& call, bool early, cudaStream_t stream) {
  const cudaError_t error = launch_dims<T>(portable_dims(call), call, stream);
  return error == cudaSuccess ? launch_attention_combine<T>(call, early, stream) : error;
}

cudaError_t launch_float_both(const AttentionCall& call, bool early, cudaStream_t stream) {
  const int dim = float_dim(call);
  const cudaError_t error =
      launch(dim <= 256 ? tree_attention_float_kernel<256> : tree_attention_float_kernel<512>,
             unsigned(call.cut.grid), kFloatAttentionThreads, size_t(float_attention_bytes(dim)),
             stream, call);
  return error == cudaSuccess ? launch_attention_combine<float>(call, early, stream) : error;
}

}  // namespace

cudaError_t plan_tree_attention(const TreeAttentionParams& p, DType dtype, int device,
                                AttentionPlan* plan) {
  GpuLimits gpu{};
  for (const auto& [attribute, value] :
       {std::pair{cudaDevAttrMultiProcessorCount, &gpu.multiprocessors},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &gpu.shared_bytes},
        {cudaDevAttrComputeCapabilityMajor, &gpu.major}}) {
    const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device);
    if (error != cudaSuccess) return error;
  }
  plan->cut = portable_cut(p, dtype, gpu);
  plan->early_combine = gpu.major >= 9;
  AttentionWorkspace workspace;
  plan->workspace_bytes = lay_out_workspace(p, plan->cut, nullptr, &workspace);
  return cudaSuccess;
}

cudaError_t launch_tree_attention(const TreeAttentionParams& p, DType dtype,
                                  const AttentionPlan& plan, void* workspace, cudaStream_t stream) {
  if (p.batch == 0 || p.num_rows == 0 || p.num_heads == 0) return cudaSuccess;
  const bool early = plan.early_combine;
  const AttentionCall call = attention_call(p, plan.cut, portable_dims(p), workspace);
  switch (dtype) {
    case DType::kFloat16:
      return launch_both<__half>(call, early, stream);
    case DType::kBFloat16:
      return launch_both<__nv_bfloat16>(call, early, stream);
    default:
      return launch_float_both(call, early, stream);
  }
}

}  // namespace specextend
