// From runtime head dimensions to a kernel instance.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace vista::cuda {

template <int D>
struct Dim {
  static constexpr int value = D;
};

inline void check_head_dims(const char* op, int64_t d, int64_t e) {
  if (d < 16 || e < 16 || d > 256 || e > 256 || d % 8 != 0 || e % 8 != 0)
    throw std::invalid_argument(
        std::string(op) + " kernels are built for head dimensions that are multiples of 8 from 16 to 256, found " +
        std::to_string(d) + " and " + std::to_string(e));
}

// Calls f(math, Dim<D>{}) with the smallest D >= widest: columns beyond are zeros in shared memory.
template <class Math, class F>
int dispatch_dim(int64_t widest, Math math, F f) {
  if (widest <= 32) return f(math, Dim<32>{});
  if (widest <= 64) return f(math, Dim<64>{});
  if (widest <= 128) return f(math, Dim<128>{});
  return f(math, Dim<256>{});
}

// How many multiprocessors the current device has: so many blocks of a kernel that fills one do not wait for each
// other.
inline cudaError_t count_multiprocessors(int& count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

constexpr int kMostSharedBytes = 99 * 1024;  // what a block may have on every architecture from sm_80 on

// Above 48 KB a kernel has to ask. Asking every time costs less than remembering per device.
template <class... Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters...), int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace vista::cuda
