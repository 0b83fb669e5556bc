#include <cuda_runtime_api.h>

#include <atomic>

#include "vista/cuda/launch.h"

namespace vista::cuda {

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

bool device_is_sm90() {
  constexpr int kRemembered = 64;
  static std::atomic<int> majors[kRemembered];  // by device; 0 where nobody has asked yet
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  const bool remembered = device < kRemembered;
  if (remembered) major = majors[device].load(std::memory_order_relaxed);
  if (major == 0) {
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
    if (remembered) majors[device].store(major, std::memory_order_relaxed);
  }
  return major == 9;
}

}  // namespace vista::cuda
