#include "cpu/isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace specextend::cpu {

extern const Isa isa_baseline;
#ifdef SPECEXTEND_HAS_ISA_AVX2
extern const Isa isa_avx2, isa_avx512, isa_avx512_bf16;
#endif

namespace {

bool machine_runs(const std::string& name) {
#ifdef SPECEXTEND_HAS_ISA_AVX2
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (name == "avx2") return avx2;
  if (name == "avx512") return avx512;
  if (name == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return name == "baseline";
}

const Isa& choose() {
  std::string names;
  const Isa* best = nullptr;
  const char* forced = std::getenv("SPECEXTEND_CPU_ISA");
  for (const Isa* isa : built_isas()) {
    if (!machine_runs(isa->name)) continue;
    names += (names.empty() ? "" : ", ") + std::string(isa->name);
    if (!forced || !*forced || forced == std::string(isa->name)) best = isa;
  }
  STD_TORCH_CHECK(best != nullptr, "SPECEXTEND_CPU_ISA must be one of ", names,
                  " on this machine, got ", forced);
  return *best;
}

}  // namespace

IsaList built_isas() {
  static const Isa* const all[] = {
      &isa_baseline,
#ifdef SPECEXTEND_HAS_ISA_AVX2
      &isa_avx2,
      &isa_avx512,
      &isa_avx512_bf16,
#endif
  };
  return {all, int(sizeof(all) / sizeof(all[0]))};
}

const Isa& isa() {
  static const Isa& chosen = choose();
  return chosen;
}

}  // namespace specextend::cpu
