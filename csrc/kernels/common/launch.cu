#include <cuda_runtime_api.h>

#include "vista/cuda/launch.h"

namespace vista::cuda {

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace vista::cuda
