#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "hopper_tiles.h"
#include "kernels/attention_launch.cuh"
#include "launch.h"

namespace specextend {

// In files of their own, a head dimension each.
template <typename T, int kDim, int kChunk>
cudaError_t launch_hopper_attention(const AttentionCall& call, int cluster, cudaStream_t stream);

namespace {

constexpr int kHopperChunkDim = 192;  // above it sums of chunks would not fit into registers
constexpr int kHopperChunk = 32;      // keys; kernels are made for this size of chunks alone
constexpr int kHopperMinRun = 4;      // positions: a tile costs less than a partial of its rows

int packed_rows(const TreeAttentionParams& p) {
  return p.num_rows * (p.num_heads / p.num_kv_heads);
}

// Blocks of a cluster.
int cluster_of(const TreeAttentionParams& p) { return packed_rows(p) > kHopperBlockRows ? 2 : 1; }

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
  const int cluster = cluster_of(call);
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
  return dtype != DType::kFloat32 && p.v != nullptr && p.out != nullptr &&
         packed_rows(p) > kHopperMinRows && p.softcap == 0 &&
         (!p.chunk_lse || (p.chunk_size == kHopperChunk && p.head_dim <= kHopperChunkDim)) &&
         bits % 16 == 0 && (p.q_stride_b | p.q_stride_m | p.q_stride_h) % 8 == 0 && p.batch > 0 &&
         p.capacity > 0 && is_copied_by_boxes(p.k, p, p.k_stride_s, p.k_stride_h, p.k_stride_b) &&
         is_copied_by_boxes(p.v, p, p.v_stride_s, p.v_stride_h, p.v_stride_b);
}

cudaError_t plan_tree_attention_sm90(const TreeAttentionParams& p, DType, int device,
                                     AttentionPlan* plan) {
  int multiprocessors = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int cluster = cluster_of(p);
  WorkCut& cut = plan->cut;
  cut.batch = p.batch;
  cut.num_kv_heads = p.num_kv_heads;
  cut.rows_per_block = cluster * kHopperBlockRows;
  cut.row_blocks = int(divide_up(packed_rows(p), cut.rows_per_block));
  cut.tile_keys = hopper_tile_keys(hopper_dim(p.head_dim));
  cut.min_run = kHopperMinRun;
  cut.grid = useful_grid(cut, divide_up(p.capacity, cut.tile_keys) + 1, multiprocessors / cluster);
  plan->early_combine = true;
  AttentionWorkspace workspace;
  plan->workspace_bytes = lay_out_workspace(p, cut, nullptr, &workspace);
  return cudaSuccess;
}

cudaError_t launch_tree_attention_sm90(const TreeAttentionParams& p, DType dtype,
                                       const AttentionPlan& plan, void* workspace,
                                       cudaStream_t stream) {
  const AttentionCall call = attention_call(p, plan.cut, hopper_dim(p.head_dim), workspace);
  return dtype == DType::kFloat16 ? launch_both<__half>(call, plan.early_combine, stream)
                                  : launch_both<__nv_bfloat16>(call, plan.early_combine, stream);
}

}  // namespace specextend
