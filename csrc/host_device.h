#pragma once

#ifdef __CUDACC__
#define SPECEXTEND_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SPECEXTEND_HOST_DEVICE inline
#endif
