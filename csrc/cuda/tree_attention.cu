#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <utility>

#include "kernels/attention_launch.cuh"
#include "kernels/tree_attention_float.cuh"
#include "launch.h"

namespace specextend {
namespace {

// The head dimension that a kernel is compiled for; 8 to 256.
int kernel_dim(int head_dim) {
  for (int dim : {64, 80, 96, 128, 192}) {
    if (head_dim <= dim) return dim;
  }
  return 256;
}

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
  int multiprocessors = 0, shared = 0, major = 0;
  for (const auto& [attribute, value] :
       {std::pair{cudaDevAttrMultiProcessorCount, &multiprocessors},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &shared},
        {cudaDevAttrComputeCapabilityMajor, &major}}) {
    const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device);
    if (error != cudaSuccess) return error;
  }
  WorkCut& cut = plan->cut;
  const int packed_rows = p.num_rows * (p.num_heads / p.num_kv_heads);
  size_t bytes;
  int most_blocks = kAttentionBlocksPerSm;
  if (dtype == DType::kFloat32) {
    cut.rows_per_block = kFloatAttentionRows;
    cut.tile_keys = kFloatAttentionTileKeys;
    bytes = float_attention_bytes(p.head_dim);
  } else {
    const int dim = kernel_dim(p.head_dim);
    cut.rows_per_block = packed_rows <= 16 ? 16 : packed_rows <= 32 ? 32 : 64;
    cut.tile_keys = attention_tile_keys(dim, cut.rows_per_block);
    bytes = size_t(attention_layout(dim, cut.rows_per_block, p.chunk_lse != nullptr).bytes);
  }
  constexpr size_t kReserved = 1024;  // of every block, for the system
  const int fitting = int(size_t(shared) / (bytes + kReserved));
  const int blocks = fitting < 1 ? 1 : fitting < most_blocks ? fitting : most_blocks;
  cut.batch = p.batch;
  cut.num_kv_heads = p.num_kv_heads;
  cut.row_blocks = int(divide_up(packed_rows, cut.rows_per_block));
  // A part's output, written and read in fp32, is as much memory traffic as the keys and values of
  // twice its rows. Four times as many keys are worth it.
  cut.min_run = int(divide_up(4 * cut.rows_per_block, cut.tile_keys));
  cut.grid = useful_grid(cut, divide_up(p.capacity, cut.tile_keys) + 1, blocks * multiprocessors);
  plan->early_combine = major >= 9;
  AttentionWorkspace workspace;
  plan->workspace_bytes = lay_out_workspace(p, cut, nullptr, &workspace);
  return cudaSuccess;
}

cudaError_t launch_tree_attention(const TreeAttentionParams& p, DType dtype,
                                  const AttentionPlan& plan, void* workspace, cudaStream_t stream) {
  if (p.batch == 0 || p.num_rows == 0 || p.num_heads == 0) return cudaSuccess;
  const bool early = plan.early_combine;
  const int dim = kernel_dim(p.head_dim);
  const AttentionCall call = attention_call(p, plan.cut, dim, workspace);
  switch (dtype) {
    case DType::kFloat16:
      return launch_both<__half>(dim, call, early, stream);
    case DType::kBFloat16:
      return launch_both<__nv_bfloat16>(dim, call, early, stream);
    default: {
      const cudaError_t error =
          launch(tree_attention_float_kernel, unsigned(plan.cut.grid), kFloatAttentionThreads,
                 float_attention_bytes(p.head_dim), stream, call);
      return error == cudaSuccess ? launch_attention_combine<float>(call, early, stream) : error;
    }
  }
}

}  // namespace specextend
