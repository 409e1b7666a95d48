#pragma once

// The kernels that are compiled once per CPU instruction set, and the choice among them.

#include <vector>

#include "params.h"

namespace specextend::cpu {

// One table per instruction set, filled in csrc/cpu/isa/<name>.cpp. Functions see raw pointers and
// PODs only and work on one item each; threads are handed out by their callers in csrc/cpu/<op>.cpp.
struct Isa {
  const char* name;
};

// The instruction sets in this binary, the plainest first.
const std::vector<const Isa*>& built_isas();

// The table in use: the best that this machine runs, or the one named by SPECEXTEND_CPU_ISA. Chosen
// once, at the first call.
const Isa& isa();

}  // namespace specextend::cpu
