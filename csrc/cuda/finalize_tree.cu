#include "kernels/finalize_tree.cuh"
#include "launch.h"

cudaError_t specextend::launch_finalize_tree(const FinalizeTreeParams& p,
                                             const FinalizeTreeScratch& scratch,
                                             cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  const int64_t candidates = scratch.candidates == nullptr ? p.num_candidates : 0;
  const int64_t slots = 1 + int64_t(p.num_candidates);
  return launch(finalize_tree_kernel, unsigned(p.batch), block_threads(slots, kFinalizeThreads),
                sizeof(FinalizeShared) + size_t(candidates * kFinalizeCandidateBytes), stream, p,
                scratch);
}
