#include "vista/cuda/gemm.h"

namespace vista::cuda {

int launch_linear_silu(const LinearSiluParams& params, Stream stream) {
  return device_is_sm90() ? launch_linear_silu_sm90(params, stream) : launch_linear_silu_sm80(params, stream);
}

}  // namespace vista::cuda
