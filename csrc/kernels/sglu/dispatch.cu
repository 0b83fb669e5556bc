#include "parts.h"

namespace vista::cuda {

int launch_sglu(const SgluParams& params, Stream stream) {
  return device_is_sm90() ? sm90::launch_sglu(params, stream) : launch_sglu_portable(params, stream);
}

int launch_sglu_backward(const SgluParams& params, Stream stream) {
  return launch_sglu_backward_portable(params, stream);
}

}  // namespace vista::cuda
