#include "cpu/isa.h"

#include <torch/headeronly/util/Exception.h>
#ifdef SPECEXTEND_HAS_ISA_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/built_isas.h"

namespace specextend::cpu {

extern const Isa isa_baseline;
#ifdef SPECEXTEND_HAS_ISA_AVX2
extern const Isa isa_avx2, isa_avx512, isa_avx512_bf16;
#endif
#ifdef SPECEXTEND_HAS_ISA_AMX
extern const Isa isa_amx;
#endif

namespace {

#ifdef SPECEXTEND_HAS_ISA_AVX2
const char* why_not_avx2() {
  __builtin_cpu_init();
  const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("f16c");
  return has ? nullptr : "the processor lacks AVX2, FMA or F16C";
}

const char* why_not_avx512() {
  if (const char* why = why_not_avx2()) return why;
  const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return has ? nullptr : "the processor lacks AVX-512 (F, BW, VL, DQ)";
}

const char* why_not_avx512_bf16() {
  if (const char* why = why_not_avx512()) return why;
  return __builtin_cpu_supports("avx512bf16") ? nullptr : "the processor lacks AVX-512-BF16";
}
#endif

#ifdef SPECEXTEND_HAS_ISA_AMX
// Asks for the tiles of this process's threads if they are there: Linux hands them out on request
// (Documentation/arch/x86/xstate.rst of its sources).
const char* why_not_amx() {
  if (const char* why = why_not_avx512_bf16()) return why;
  unsigned a, b, c, d;
  constexpr unsigned kTiles = 1u << 24 | 1u << 22;  // AMX-TILE, AMX-BF16
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) != kTiles)
    return "the processor lacks AMX-TILE or AMX-BF16";
  constexpr unsigned kTileState = 3u << 17;  // of XCR0: configuration, data
  unsigned enabled, high;
  asm volatile("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));  // AVX is used, so it is there
  if ((enabled & kTileState) != kTileState)
    return "the operating system has not enabled the tiles of AMX";
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
    return "the operating system refuses this process the tiles of AMX";
  return nullptr;
}
#endif

struct BuiltIsa {
  const Isa& isa;
  const char* (*why_not)();  // null: it runs here
};

// The instruction sets in this binary, the plainest first; each with its flags in
// cmake/cpu_isa.cmake.
const BuiltIsa kBuilt[] = {
    {isa_baseline, []() -> const char* { return nullptr; }},
#ifdef SPECEXTEND_HAS_ISA_AVX2
    {isa_avx2, why_not_avx2},
    {isa_avx512, why_not_avx512},
    {isa_avx512_bf16, why_not_avx512_bf16},
#endif
#ifdef SPECEXTEND_HAS_ISA_AMX
    {isa_amx, why_not_amx},
#endif
};

const Isa& choose() {
  std::string names, why;
  const Isa* best = nullptr;
  const char* forced = std::getenv("SPECEXTEND_CPU_ISA");
  for (const BuiltIsa& built : kBuilt) {
    const std::string name = built.isa.name;
    const bool wanted = !forced || !*forced || forced == name;
    if (const char* reason = built.why_not()) {
      if (wanted) why = std::string(": ") + reason;
      continue;
    }
    names += (names.empty() ? "" : ", ") + name;
    if (wanted) best = &built.isa;
  }
  STD_TORCH_CHECK(best != nullptr, "SPECEXTEND_CPU_ISA must be one of ", names,
                  " on this machine, got ", forced, why);
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
