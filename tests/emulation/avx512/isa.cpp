// Stands in for csrc/cpu/isa.cpp: the instruction sets that are emulated, and the choice among them
// at any time, from Python.

#include "cpu/isa.h"

namespace specextend::cpu {

extern const Isa isa_avx512, isa_avx512_bf16;

namespace {

const Isa* chosen = &isa_avx512;

}  // namespace

const Isa& isa() { return *chosen; }

}  // namespace specextend::cpu

extern "C" __attribute__((visibility("default"))) void specextend_emulation_isa(int bf16) {
  using namespace specextend::cpu;
  chosen = bf16 ? &isa_avx512_bf16 : &isa_avx512;
}
