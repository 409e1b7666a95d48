#include "kernels/verify_tree.cuh"
#include "launch.h"

cudaError_t specextend::launch_verify_tree(const VerifyTreeParams& p, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  const int nodes = p.num_nodes <= kVerifySharedNodes ? p.num_nodes : 0;
  return launch(verify_tree_kernel, unsigned(p.batch), block_threads(p.num_nodes, kVerifyThreads),
                sizeof(VerifyShared) + size_t(nodes) * sizeof(int), stream, p);
}
