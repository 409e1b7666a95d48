// Stands in for csrc/cpu/isa.cpp: the instruction sets that are emulated, and the choice among them
// at any time, from Python.

#include "cpu/isa.h"

#include <cstring>
#include <initializer_list>

namespace specextend::cpu {

extern const Isa isa_avx512, isa_avx512_bf16, isa_amx;

namespace {

const Isa* chosen = &isa_avx512;

}  // namespace

const Isa& isa() { return *chosen; }

}  // namespace specextend::cpu

// Returns false if there is none of that name.
extern "C" __attribute__((visibility("default"))) bool specextend_emulation_isa(const char* name) {
  using namespace specextend::cpu;
  for (const Isa* isa : {&isa_avx512, &isa_avx512_bf16, &isa_amx}) {
    if (std::strcmp(isa->name, name) != 0) continue;
    chosen = isa;
    return true;
  }
  return false;
}
