// The sglu launch functions behind one function with flat arguments, for ctypes.
#include <cstdio>
#include <stdexcept>

#include "vista/cuda/sglu.h"

// In the order of sglu_checks.py.
extern "C" int test_sglu(const int64_t* sizes, void* const* pointers, double eps, int64_t backward) {
  vista::cuda::SgluParams p{};
  p.dtype = static_cast<vista::DType>(*sizes++);
  for (int64_t* size : {&p.total, &p.dim, &p.hidden}) *size = *sizes++;
  p.norm = *sizes++ != 0;
  p.residual = *sizes++ != 0;
  p.eps = static_cast<float>(eps);
  for (const void** rows : {&p.x, &p.up, &p.gate, &p.down, &p.down_t, &p.grad_out}) *rows = *pointers++;
  for (void** rows : {&p.out, &p.grad_x, &p.grad_up_rows, &p.grad_gate_rows, &p.hidden_rows}) *rows = *pointers++;
  try {
    return backward != 0 ? vista::cuda::launch_sglu_backward(p, nullptr) : vista::cuda::launch_sglu(p, nullptr);
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return -1;
  }
}
