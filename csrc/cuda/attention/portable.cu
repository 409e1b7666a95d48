#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <utility>

#include "attention_plan.h"
#include "kernels/attention/call.cuh"
#include "kernels/attention/float.cuh"
#include "kernels/attention/launch.cuh"
#include "launch.h"

namespace specextend {
namespace {

template <typename T, bool kChunks>
cudaError_t launch_dim(int dim, const AttentionCall& call, cudaStream_t stream) {
  switch (dim) {
    case 64:
      return launch_attention<T, 64, kChunks>(call, stream);
    case 80:
      return launch_attention<T, 80, kChunks>(call, stream);
    case 96:
      return launch_attention<T, 96, kChunks>(call, stream);
    case 128:
      return launch_attention<T, 128, kChunks>(call, stream);
    case 192:
      return launch_attention<T, 192, kChunks>(call, stream);
    default:
      return launch_attention<T, 256, kChunks>(call, stream);
  }
}

template <typename T>
cudaError_t launch_both(int dim, const AttentionCall& call, bool early, cudaStream_t stream) {
  const cudaError_t error = call.chunk_lse ? launch_dim<T, true>(dim, call, stream)
                                           : launch_dim<T, false>(dim, call, stream);
  return error == cudaSuccess ? launch_attention_combine<T>(call, early, stream) : error;
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
  const int dim = attention_dim(p.head_dim);
  const AttentionCall call = attention_call(p, plan.cut, dim, workspace);
  switch (dtype) {
    case DType::kFloat16:
      return launch_both<__half>(dim, call, early, stream);
    case DType::kBFloat16:
      return launch_both<__nv_bfloat16>(dim, call, early, stream);
    default: {
      const cudaError_t error =
          launch(tree_attention_float_kernel, unsigned(plan.cut.grid), kFloatAttentionThreads,
                 size_t(float_attention_bytes(p.head_dim)), stream, call);
      return error == cudaSuccess ? launch_attention_combine<float>(call, early, stream) : error;
    }
  }
}

}  // namespace specextend
