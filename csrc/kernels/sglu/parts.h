// The kernels behind the launch functions of vista/cuda/sglu.h (dispatch.cu), same arguments and errors.
#pragma once

#include "vista/cuda/sglu.h"

namespace vista::cuda {

int launch_sglu_portable(const SgluParams& params, Stream stream);
int launch_sglu_backward_portable(const SgluParams& params, Stream stream);

namespace sm90 {

int launch_sglu(const SgluParams& params, Stream stream);
int launch_sglu_backward(const SgluParams& params, Stream stream);

}  // namespace sm90
}  // namespace vista::cuda
