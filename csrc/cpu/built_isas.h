#pragma once

// What instruction sets were built, for callers that are compiled for any machine: a header with
// std containers, apart from isa.h, which the kernels of one machine include.

#include <string>
#include <vector>

namespace specextend::cpu {

// Returns the names of the instruction sets in this binary, the plainest first.
std::vector<std::string> built_isas();

}  // namespace specextend::cpu
