// With g the gradient divided by the root mean square already:
// grad_x_i = g_i - x_i * mean(x_i g_i) / (mean(x_i^2) + eps): a warp for each row, which it reads twice, the second
// time from the L1 cache.
#include <stdexcept>

#include "../common/mma.cuh"
#include "vista/cuda/rms_norm.h"

namespace vista::cuda {
namespace {

constexpr int kThreads = 256, kRows = kThreads / 32;

// kWidth neighbours of a row: a vector, or one element where rows do not begin at multiples of 16 bytes.
template <class T, int kWidth>
__device__ inline void load_piece(const T* from, float (&x)[kWidth]) {
  if constexpr (kWidth > 1)
    unpack_vector<T>(load_vector(from), x);
  else if constexpr (sizeof(T) == 4)
    x[0] = *from;
  else
    x[0] = unpack2(from->bits, T{}).x;
}

template <class T, int kWidth>
__device__ inline void write_piece(T* to, const float (&x)[kWidth]) {
  if constexpr (kWidth > 1)
    write_vector(to, pack_vector<T>(x));
  else if constexpr (sizeof(T) == 4)
    *to = x[0];
  else
    to->bits = static_cast<uint16_t>(pack2(x[0], 0.f, T{}));
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) rms_norm_backward(const RmsNormParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / 32;
  if (row >= p.rows) return;
  const T *x = static_cast<const T*>(p.x) + row * p.dim, *grad = static_cast<const T*>(p.grad_rows) + row * p.dim;
  T* out = static_cast<T*>(p.grad_x) + row * p.dim;
  float square = 0.f, along = 0.f;
  for (int64_t i = lane_id() * kWidth; i < p.dim; i += 32 * kWidth) {
    float a[kWidth], g[kWidth];
    load_piece(x + i, a);
    load_piece(grad + i, g);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      square = fmaf(a[j], a[j], square);
      along = fmaf(a[j], g[j], along);
    }
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    square += __shfl_xor_sync(0xffffffffu, square, step);
    along += __shfl_xor_sync(0xffffffffu, along, step);
  }
  const float dim = static_cast<float>(p.dim);
  const float pull = along == 0.f ? 0.f : along / dim / (square / dim + p.eps);  // zeros without eps pull nothing
  for (int64_t i = lane_id() * kWidth; i < p.dim; i += 32 * kWidth) {
    float a[kWidth], g[kWidth];
    load_piece(x + i, a);
    load_piece(grad + i, g);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) g[j] = fmaf(-pull, a[j], g[j]);
    write_piece(out + i, g);
  }
}

template <class T>
int launch(const RmsNormParams& p, Stream stream) {
  const int64_t blocks = (p.rows + kRows - 1) / kRows;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) throw std::invalid_argument("the rms_norm kernel takes at most 2^34 rows");
  const auto kernel = p.dim % kPerVector<T> == 0 ? rms_norm_backward<T, kPerVector<T>> : rms_norm_backward<T, 1>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace

int launch_rms_norm_backward(const RmsNormParams& params, Stream stream) {
  switch (params.dtype) {
    case DType::kBFloat16: return launch<BFloat16>(params, stream);
    case DType::kHalf: return launch<Half>(params, stream);
    default: return launch<float>(params, stream);
  }
}

}  // namespace vista::cuda
