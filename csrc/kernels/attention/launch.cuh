#pragma once

// The launches of the kernels of attention, for files that do not compile the kernels.

#include <cuda_runtime.h>

#include "kernels/attention/call.cuh"

namespace specextend {

// Launches the kernel of portable/kernel.cuh for call.cut; D is at most kDim, and Dv at most
// kValueDim.
template <typename T, int kDim, int kValueDim, bool kChunks>
cudaError_t launch_attention(const AttentionCall& call, cudaStream_t stream);

// Launches that of portable/wide.cuh likewise, with chunks or without.
template <typename T, int kDim, int kValueDim>
cudaError_t launch_wide_attention(const AttentionCall& call, cudaStream_t stream);

// Launches the kernel of hopper/kernel.cuh in clusters of `cluster` blocks; D is at most kDim.
// kChunk is the size of chunks, 0 without any.
template <typename T, int kDim, int kChunk>
cudaError_t launch_hopper_attention(const AttentionCall& call, int cluster, cudaStream_t stream);

// Launches the kernel of combine.cuh behind the one that made the partials. `early` says that that
// one lets it begin (launch_early).
template <typename T>
cudaError_t launch_attention_combine(const AttentionCall& call, bool early, cudaStream_t stream);

}  // namespace specextend
