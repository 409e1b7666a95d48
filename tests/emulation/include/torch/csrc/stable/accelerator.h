#pragma once

// Stands in for torch's header of this name: the device is the host, and always current.

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

HIDDEN_NAMESPACE_BEGIN(torch, stable, accelerator)

using DeviceIndex = int32_t;

class DeviceGuard {
 public:
  explicit DeviceGuard(DeviceIndex) {}
};

HIDDEN_NAMESPACE_END(torch, stable, accelerator)
