#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace specextend::emulation {

// Whether a device would take the launch.
cudaError_t check_launch_config(const void* kernel, const cudaLaunchConfig_t& config);

// What is known of an address outside of all memory that may be touched: "the 3rd byte behind ...".
std::string describe_address(const void* address);

}  // namespace specextend::emulation
