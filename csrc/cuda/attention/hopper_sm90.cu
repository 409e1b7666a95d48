#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention_plan.h"
#include "kernels/attention/call.cuh"
#include "kernels/attention/launch.cuh"
#include "launch.h"

namespace specextend {

namespace {

bool is_copied_by_boxes(const void* data, const TreeAttentionParams& p, int64_t stride_s,
                        int64_t stride_h, int64_t stride_b) {
  const auto fits = [](int64_t size, int64_t stride) {
    constexpr int64_t kMaxBytes = int64_t(1) << 40;
    return size <= 1 || (stride > 0 && stride % 8 == 0 && stride * 2 < kMaxBytes);
  };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && fits(p.capacity, stride_s) &&
         fits(p.num_kv_heads, stride_h) && fits(p.batch, stride_b);
}

template <typename T, int kDim>
cudaError_t launch_dim(const AttentionCall& call, cudaStream_t stream) {
  const int cluster = hopper_cluster(call);
  if constexpr (kDim <= kHopperChunkDim) {
    if (call.chunk_lse) {
      return launch_hopper_attention<T, kDim, kHopperChunk>(call, cluster, stream);
    }
  }
  return launch_hopper_attention<T, kDim, 0>(call, cluster, stream);
}

template <typename T>
cudaError_t launch_both(const AttentionCall& call, bool early, cudaStream_t stream) {
  const auto dim = hopper_dim(call.head_dim);
  const cudaError_t error = dim == 64    ? launch_dim<T, 64>(call, stream)
                            : dim == 128 ? launch_dim<T, 128>(call, stream)
                            : dim == 192 ? launch_dim<T, 192>(call, stream)
                                         : launch_dim<T, 256>(call, stream);
  return error == cudaSuccess ? launch_attention_combine<T>(call, early, stream) : error;
}

}  // namespace

bool tree_attention_sm90_serves(const TreeAttentionParams& p, DType dtype) {
  const auto bits = reinterpret_cast<uintptr_t>(p.q);
  return hopper_serves(p, dtype) && p.v != nullptr && p.out != nullptr && bits % 16 == 0 &&
         (p.q_stride_b | p.q_stride_m | p.q_stride_h) % 8 == 0 &&
         is_copied_by_boxes(p.k, p, p.k_stride_s, p.k_stride_h, p.k_stride_b) &&
         is_copied_by_boxes(p.v, p, p.v_stride_s, p.v_stride_h, p.v_stride_b);
}

cudaError_t plan_tree_attention_sm90(const TreeAttentionParams& p, DType, int device,
                                     AttentionPlan* plan) {
  GpuLimits gpu{};
  const cudaError_t error =
      cudaDeviceGetAttribute(&gpu.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  plan->cut = hopper_cut(p, gpu);
  plan->early_combine = true;
  AttentionWorkspace workspace;
  plan->workspace_bytes = lay_out_workspace(p, plan->cut, nullptr, &workspace);
  return cudaSuccess;
}

cudaError_t launch_tree_attention_sm90(const TreeAttentionParams& p, DType dtype,
                                       const AttentionPlan& plan, void* workspace,
                                       cudaStream_t stream) {
  const int dim = hopper_dim(p.head_dim);
  const AttentionCall call = attention_call(p, plan.cut, {dim, dim}, workspace);
  return dtype == DType::kFloat16 ? launch_both<__half>(call, plan.early_combine, stream)
                                  : launch_both<__nv_bfloat16>(call, plan.early_combine, stream);
}

}  // namespace specextend
