#pragma once

// What host code may call in the CUDA object files; instantiated one per file in csrc/cuda/.

#include <cuda_runtime_api.h>

#include "params.h"

namespace specextend {

template <typename T>
cudaError_t launch_merge_states(const MergeStatesParams& p, cudaStream_t stream);

cudaError_t launch_compact_kv(const CompactKvParams& p, cudaStream_t stream);

// With the bulk copies of Hopper, for caches of 16-byte alignment; on compute capability 9.0.
cudaError_t launch_compact_kv_sm90(const CompactKvParams& p, cudaStream_t stream);

}  // namespace specextend
