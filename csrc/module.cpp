// The pybind11 module `_C`. Loading it registers torch.ops.specextend.* (csrc/ops/*.cpp); the module
// itself says what was built.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of specextend. Importing it registers torch.ops.specextend.*";
  m.attr("version") = SPECEXTEND_VERSION;
  m.attr("torch_version") = SPECEXTEND_TORCH_VERSION;  // that of the headers it was built with
#ifdef SPECEXTEND_HAS_CUDA
  m.attr("has_cuda") = true;
  m.attr("cuda_archs") = std::string(SPECEXTEND_CUDA_ARCHS);
#else
  m.attr("has_cuda") = false;
  m.attr("cuda_archs") = std::string();
#endif
#ifdef SPECEXTEND_HAS_SM90A
  m.attr("has_sm90a") = true;
#else
  m.attr("has_sm90a") = false;
#endif
  m.def("cpu_isas", [] {
    std::vector<std::string> names;
    for (const specextend::cpu::Isa* isa : specextend::cpu::built_isas()) names.push_back(isa->name);
    return names;
  }, "CPU instruction sets with kernels in this module.");
  m.def("cpu_isa", [] { return std::string(specextend::cpu::isa().name); },
        "The instruction set in use: the best this machine has, or SPECEXTEND_CPU_ISA.");
}
