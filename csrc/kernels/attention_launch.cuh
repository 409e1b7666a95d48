#pragma once

// What other files may call of the kernels of tree attention and of the combine.

#include <cuda_runtime.h>

#include "kernels/attention_work.cuh"

namespace specextend {

// The kernel of tree_attention.cuh for call.cut; D is at most kDim.
template <typename T, int kDim, bool kChunks>
cudaError_t launch_attention(const AttentionCall& call, cudaStream_t stream);

// The kernel of attention_combine.cuh, behind the one that made the parts. `early`: that one lets
// it begin (launch_early).
template <typename T>
cudaError_t launch_attention_combine(const AttentionCall& call, bool early, cudaStream_t stream);

}  // namespace specextend
