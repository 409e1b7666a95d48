#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/sample_nodes.cuh"

namespace specextend {

template cudaError_t launch_sample_nodes<float>(const SampleNodesParams&, const SampleNodesScratch&,
                                                cudaStream_t);
template cudaError_t launch_sample_nodes<__half>(const SampleNodesParams&,
                                                 const SampleNodesScratch&, cudaStream_t);
template cudaError_t launch_sample_nodes<__nv_bfloat16>(const SampleNodesParams&,
                                                        const SampleNodesScratch&, cudaStream_t);

}  // namespace specextend
