#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <initializer_list>

namespace specextend {

// Returns an uninitialised contiguous tensor on the device of `like`. torch::stable::empty does the
// same in microseconds, through the dispatcher and a boxed list; an op of a few microseconds feels
// that.
inline torch::stable::Tensor allocate(const torch::stable::Tensor& like, const int64_t* sizes,
                                      int64_t dims, torch::headeronly::ScalarType type) {
  constexpr int64_t kMaxDims = 8;
  int64_t strides[kMaxDims];
  STD_TORCH_CHECK(dims <= kMaxDims, "allocate: at most 8 dimensions, got ", dims);
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    const int64_t size = sizes[i];
    stride *= size > 1 ? size : 1;
  }
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, &handle));
  return torch::stable::Tensor(handle);
}

inline torch::stable::Tensor allocate(const torch::stable::Tensor& like,
                                      std::initializer_list<int64_t> sizes,
                                      torch::headeronly::ScalarType type) {
  return allocate(like, sizes.begin(), int64_t(sizes.size()), type);
}

}  // namespace specextend
