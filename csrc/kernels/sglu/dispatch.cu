// Which kernel serves a call. Both sets are built for the same dtypes and sizes.
//
// Compute capability 9.x has wgmma, which computes twice as fast as the mma that the portable kernels use, and TMA: the
// kernels of sm90/ serve it whatever the size. All others, older and newer, have the portable ones.
#include "parts.h"

namespace vista::cuda {

int launch_sglu(const SgluParams& params, Stream stream) {
  return device_is_sm90() ? sm90::launch_sglu(params, stream) : launch_sglu_portable(params, stream);
}

int launch_sglu_backward(const SgluParams& params, Stream stream) {
  return device_is_sm90() ? sm90::launch_sglu_backward(params, stream) : launch_sglu_backward_portable(params, stream);
}

}  // namespace vista::cuda
