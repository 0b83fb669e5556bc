// The linear_silu launch functions behind functions with flat arguments, for ctypes.
#include <cstdio>
#include <stdexcept>

#include "vista/cuda/gemm.h"

extern "C" int test_linear_silu(const int64_t* sizes, void* const* pointers) {
  vista::cuda::LinearSiluParams p{};
  const int64_t architecture = *sizes++;
  p.dtype = static_cast<vista::DType>(*sizes++);
  for (int64_t* size : {&p.rows, &p.in_features, &p.out_features}) *size = *sizes++;
  for (const void** rows : {&p.x, &p.weight, &p.bias, &p.grad_out}) *rows = *pointers++;
  p.out = *pointers++;
  try {
    return architecture == 90 ? vista::cuda::launch_linear_silu_sm90(p, nullptr)
                              : vista::cuda::launch_linear_silu_sm80(p, nullptr);
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return -1;
  }
}

// rows * 1000 + columns
extern "C" int test_linear_silu_tile(int64_t rows, int64_t out_features, int64_t multiprocessors, int64_t sm90) {
  const vista::cuda::GemmTile tile =
      vista::cuda::linear_silu_tile(rows, out_features, static_cast<int>(multiprocessors), sm90 != 0);
  return tile.rows * 1000 + tile.columns;
}
