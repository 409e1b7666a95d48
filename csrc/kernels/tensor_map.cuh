#pragma once

// Maps of tensors for the copies of hopper.cuh. They stand apart from CuTe, so that the host's side
// of the kernels can be compiled, and run, without it.

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "driver.h"

namespace specextend::hopper {

using TensorMap = CUtensorMap;

// Maps a tensor of 16-bit elements for copies of boxes of [64 columns, box_rows, 1, 1], swizzled by
// 128 bytes. Sizes: columns, rows, heads, batch; strides of the last three in bytes, multiples
// of 16. The driver's function for it is looked up here, so that nothing needs the driver to be
// loaded.
inline cudaError_t make_map(TensorMap* map, const void* data, const int64_t (&sizes)[4],
                            const int64_t (&strides)[3], int box_rows) {
  void* function = nullptr;
  const cudaError_t error = find_driver_function("cuTensorMapEncodeTiled", &function);
  if (error != cudaSuccess) return error;
  cuuint64_t global[4], steps[3];
  for (int i = 0; i < 4; ++i) global[i] = cuuint64_t(sizes[i]);
  for (int i = 0; i < 3; ++i) steps[i] = cuuint64_t(strides[i]);
  const cuuint32_t box[4] = {64, cuuint32_t(box_rows), 1, 1}, elements[4] = {1, 1, 1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(data), global, steps, box, elements,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace specextend::hopper
