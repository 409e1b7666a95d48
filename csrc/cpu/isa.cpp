#include "cpu/isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/built_isas.h"

namespace specextend::cpu {

extern const Isa isa_baseline;
#ifdef SPECEXTEND_HAS_ISA_AVX2
extern const Isa isa_avx2, isa_avx512, isa_avx512_bf16;
#endif

namespace {

#ifdef SPECEXTEND_HAS_ISA_AVX2
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

struct BuiltIsa {
  const Isa& isa;
  bool (*runs_here)();
};

// The instruction sets in this binary, the plainest first; each with its flags in
// cmake/cpu_isa.cmake.
const BuiltIsa kBuilt[] = {
    {isa_baseline, [] { return true; }},
#ifdef SPECEXTEND_HAS_ISA_AVX2
    {isa_avx2, has_avx2},
    {isa_avx512, has_avx512},
    {isa_avx512_bf16, has_avx512_bf16},
#endif
};

const Isa& choose() {
  std::string names;
  const Isa* best = nullptr;
  const char* forced = std::getenv("SPECEXTEND_CPU_ISA");
  for (const BuiltIsa& built : kBuilt) {
    if (!built.runs_here()) continue;
    const std::string name = built.isa.name;
    names += (names.empty() ? "" : ", ") + name;
    if (!forced || !*forced || forced == name) best = &built.isa;
  }
  STD_TORCH_CHECK(best != nullptr, "SPECEXTEND_CPU_ISA must be one of ", names,
                  " on this machine, got ", forced);
  return *best;
}

}  // namespace

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const BuiltIsa& built : kBuilt) names.push_back(built.isa.name);
  return names;
}

const Isa& isa() {
  static const Isa& chosen = choose();
  return chosen;
}

}  // namespace specextend::cpu
