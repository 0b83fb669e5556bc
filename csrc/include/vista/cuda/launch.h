// What every CUDA launch function takes and gives. Plain C++: callers need no CUDA toolkit.
//
// A launch function enqueues on `stream` of the current device and returns at once: it never synchronizes, allocates or
// reads device memory on the host, so that it can be captured in a CUDA graph. It returns a cudaError_t (0 is success)
// and throws std::invalid_argument, naming what is built, for a dtype or size that no kernel serves.
#pragma once

#include <cstdint>

namespace vista::cuda {

using Stream = void*;  // cudaStream_t

// An int32 or int64 array on the device.
struct Indices {
  const void* data;
  bool is_int64;
};

const char* error_text(int error);  // cudaGetErrorString

// Whether the current device runs the kernels of folders sm90/, which exist for compute capability 9.x alone. False too
// where there is no device to ask: the launch then says so.
bool device_is_sm90();

}  // namespace vista::cuda
