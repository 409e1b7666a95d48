#pragma once

// What an op says when its launch fails: what happened, and what to do about it.

#include <cuda_runtime_api.h>

#include <string>

namespace specextend {

// Returns what to do about an error. `archs` names the architectures that specextend was built for.
inline std::string launch_remedy(cudaError_t error, const char* archs) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return std::string("specextend has no kernels for this GPU; it was built for ") + archs +
             ". Build it on this machine, or set SPECEXTEND_CUDA_ARCHS";
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion:
      return "The driver is older than the CUDA that specextend was built with. Update the driver, "
             "or build specextend with a CUDA that the driver knows (nvidia-smi shows which)";
    case cudaErrorNoDevice:
    case cudaErrorDevicesUnavailable:
      return "No GPU is free for this process. See nvidia-smi and CUDA_VISIBLE_DEVICES";
    case cudaErrorMemoryAllocation:
      return "The GPU's memory is full. Take fewer or shorter sequences, or end other processes";
    case cudaErrorStreamCaptureUnsupported:
    case cudaErrorStreamCaptureInvalidated:
    case cudaErrorStreamCaptureUnjoined:
    case cudaErrorStreamCaptureIsolation:
    case cudaErrorStreamCaptureImplicit:
    case cudaErrorStreamCaptureWrongThread:
      return "The capture of a CUDA graph was broken off by an operation before this one, of any "
             "library: one that may not be captured";
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
      return "A kernel that was launched earlier, of any library, has failed, and this process can "
             "use the GPU no longer. CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer shows which";
    default:
      return "Please report it with the shapes, strides and dtypes of the arguments";
  }
}

// Returns the error text of an op.
inline std::string launch_error(const char* op, cudaError_t error, const char* description,
                                const char* archs) {
  return std::string(op) + ": the CUDA launch failed: " + description + " (error " +
         std::to_string(int(error)) + "). " + launch_remedy(error, archs);
}

}  // namespace specextend
