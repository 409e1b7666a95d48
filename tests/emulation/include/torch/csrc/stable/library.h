#pragma once

// Includes torch's header of this name, with other registrations: they go to a namespace of the
// emulation's, and what csrc/ops/ registers for CUDA is registered for CPU tensors. What it
// registers for the CPU is left out, except where there is no CUDA branch.

#include_next <torch/csrc/stable/library.h>

namespace specextend::emulation {
extern const char library_namespace[];
}

#undef STABLE_TORCH_LIBRARY_FRAGMENT
#define STABLE_TORCH_LIBRARY_FRAGMENT(ns, m) SPECEXTEND_REGISTER(FRAGMENT, nullptr, m, C10_UID)

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) SPECEXTEND_REGISTER_##k(m, C10_UID)

#define SPECEXTEND_REGISTER_CUDA(m, uid) SPECEXTEND_REGISTER(IMPL, "CPU", m, uid)

#ifdef SPECEXTEND_HAS_CUDA
#define SPECEXTEND_REGISTER_CPU(m, uid) \
  template <typename Library>           \
  [[maybe_unused]] static void C10_CONCATENATE(not_registered_, uid)(Library & m)
#else
#define SPECEXTEND_REGISTER_CPU(m, uid) SPECEXTEND_REGISTER(IMPL, "CPU", m, uid)
#endif

#define SPECEXTEND_REGISTER(kind, key, m, uid)                                                    \
  static void C10_CONCATENATE(register_, uid)(torch::stable::detail::StableLibrary&);             \
  static const torch::stable::detail::StableTorchLibraryInit C10_CONCATENATE(registration_, uid)( \
      torch::stable::detail::StableLibrary::Kind::kind, &C10_CONCATENATE(register_, uid),         \
      specextend::emulation::library_namespace, key, __FILE__, __LINE__);                         \
  void C10_CONCATENATE(register_, uid)(torch::stable::detail::StableLibrary & m)
