#pragma once

#include <cstdint>
#include <utility>

#include "ops/allocate.h"
#include "workspace.h"

namespace specextend {

// Holds a kernel's working memory, which its lay_out of workspace.h places for `params`, and the
// tensor that it lies in, on the device of `like`.
template <typename Params>
struct AllocatedScratch {
  AllocatedScratch(const torch::stable::Tensor& like, const Params& params)
      : memory(allocate(like, {bytes(params)}, torch::headeronly::ScalarType::Byte)) {
    Workspace workspace(memory.mutable_data_ptr());
    arrays = lay_out(params, workspace);
  }

  torch::stable::Tensor memory;
  decltype(lay_out(std::declval<const Params&>(), std::declval<Workspace&>())) arrays;

 private:
  static int64_t bytes(const Params& params) {
    Workspace sizes;
    lay_out(params, sizes);
    return sizes.bytes();
  }
};

}  // namespace specextend
