#pragma once

// The CPU twins of the CUDA kernels: what csrc/ops/ may call. Each is defined in csrc/cpu/<op>.cpp.

#include "params.h"

namespace specextend::cpu {

void merge_states(const MergeStatesParams& p, DType dtype);

}  // namespace specextend::cpu
