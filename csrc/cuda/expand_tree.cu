#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/expand_tree.cuh"

namespace specextend {

template cudaError_t launch_expand_tree<float>(const ExpandTreeParams&, const ExpandTreeScratch&,
                                               cudaStream_t);
template cudaError_t launch_expand_tree<__half>(const ExpandTreeParams&, const ExpandTreeScratch&,
                                                cudaStream_t);
template cudaError_t launch_expand_tree<__nv_bfloat16>(const ExpandTreeParams&,
                                                       const ExpandTreeScratch&, cudaStream_t);

}  // namespace specextend
