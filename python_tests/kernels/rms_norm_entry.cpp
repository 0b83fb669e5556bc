// The launch function behind one with flat arguments, for ctypes.
#include "vista/cuda/rms_norm.h"

extern "C" int test_rms_norm_backward(int64_t dtype, int64_t rows, int64_t dim, double eps, const void* grad_rows,
                                      const void* x, void* grad_x) {
  const vista::cuda::RmsNormParams params{
      static_cast<vista::DType>(dtype), rows, dim, static_cast<float>(eps), grad_rows, x, grad_x};
  return vista::cuda::launch_rms_norm_backward(params, nullptr);
}
