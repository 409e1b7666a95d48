#pragma once

// The CPU twins of the CUDA kernels: what csrc/ops/ may call. Each is defined in csrc/cpu/<op>.cpp.

#include "params.h"

namespace specextend::cpu {

void tree_attention(const TreeAttentionParams& p, DType dtype);

void invariant_linear(const InvariantLinearParams& p, DType dtype);

void merge_states(const MergeStatesParams& p, DType dtype);

void rms_norm(const RmsNormParams& p, DType dtype);
void rotary_append(const RotaryAppendParams& p, DType dtype);
void silu_mul(const SiluMulParams& p, DType dtype);  // fp16, bf16

void verify_tree(const VerifyTreeParams& p);
void sample_nodes(const SampleNodesParams& p, DType dtype);
void expand_tree(const ExpandTreeParams& p, DType dtype);
void finalize_tree(const FinalizeTreeParams& p);

void append_kv(const AppendKvParams& p);
void compact_kv(const CompactKvParams& p);
void gather_chunks(const GatherChunksParams& p, DType dtype);

void chunk_scores(const ChunkScoresParams& p);
void chunk_scores_keys(const ChunkScoresKeysParams& p, DType dtype);
void select_chunks(const SelectChunksParams& p);

}  // namespace specextend::cpu
