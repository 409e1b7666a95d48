#pragma once

// What host code may call in the CUDA object files; csrc/cuda/ instantiates it.

#include <cuda_runtime_api.h>

#include <cstddef>

#include "params.h"
#include "work_partition.h"
#include "workspace.h"

namespace specextend {

template <typename T>
cudaError_t launch_merge_states(const MergeStatesParams& p, cudaStream_t stream);

template <typename T>
cudaError_t launch_rms_norm(const RmsNormParams& p, cudaStream_t stream);

template <typename T>
cudaError_t launch_silu_mul(const SiluMulParams& p, cudaStream_t stream);

template <typename T>
cudaError_t launch_rotary_append(const RotaryAppendParams& p, cudaStream_t stream);

cudaError_t launch_append_kv(const AppendKvParams& p, cudaStream_t stream);

template <typename T>
cudaError_t launch_sample_nodes(const SampleNodesParams& p, const SampleNodesScratch& scratch,
                                cudaStream_t stream);

template <typename T>
cudaError_t launch_expand_tree(const ExpandTreeParams& p, const ExpandTreeScratch& scratch,
                               cudaStream_t stream);

cudaError_t launch_finalize_tree(const FinalizeTreeParams& p, const FinalizeTreeScratch& scratch,
                                 cudaStream_t stream);

cudaError_t launch_verify_tree(const VerifyTreeParams& p, cudaStream_t stream);

cudaError_t launch_compact_kv(const CompactKvParams& p, cudaStream_t stream);

// Does the same with the bulk copies of Hopper, for caches of 16-byte alignment, on compute
// capability 9.0.
cudaError_t launch_compact_kv_sm90(const CompactKvParams& p, cudaStream_t stream);

// How an attention is laid out on a device, from shapes alone.
struct AttentionPlan {
  WorkCut cut;
  size_t workspace_bytes;  // scratch memory of the launch, bounded by the grid
  bool early_combine;      // a kernel may begin before the one in front of it has ended
};

cudaError_t plan_tree_attention(const TreeAttentionParams& p, DType dtype, int device,
                                AttentionPlan* plan);

// Launches two kernels. `workspace` is aligned to 16 bytes and may hold anything. With chunk_lse
// wanted, p.out may be null: values are not read then, and p.v is not used.
cudaError_t launch_tree_attention(const TreeAttentionParams& p, DType dtype,
                                  const AttentionPlan& plan, void* workspace, cudaStream_t stream);

// These do the same by the Hopper family, on compute capability 9.0, for the calls that it serves:
// 16-bit floats, values as large as keys, more than 64 rows of a KV head, memory that tensor copies
// take.
bool tree_attention_sm90_serves(const TreeAttentionParams& p, DType dtype);
cudaError_t plan_tree_attention_sm90(const TreeAttentionParams& p, DType dtype, int device,
                                     AttentionPlan* plan);
cudaError_t launch_tree_attention_sm90(const TreeAttentionParams& p, DType dtype,
                                       const AttentionPlan& plan, void* workspace,
                                       cudaStream_t stream);

template <typename T>
cudaError_t launch_gather_chunks(const GatherChunksParams& p, cudaStream_t stream);

// `partials` is working memory of chunk_scores_partials doubles.
int64_t chunk_scores_partials(const ChunkScoresParams& p);
cudaError_t launch_chunk_scores(const ChunkScoresParams& p, double* partials, cudaStream_t stream);

// Copies those rows of q [B, M, Hq, D] that the device names, [B], clamped to [0, M), to picked
// [B, Hq, D].
cudaError_t launch_pick_rows(const TreeAttentionParams& p, DType dtype, const int32_t* rows,
                             void* picked, cudaStream_t stream);

cudaError_t launch_select_chunks(const SelectChunksParams& p, cudaStream_t stream);

}  // namespace specextend
