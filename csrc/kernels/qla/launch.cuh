// From runtime dtype and sizes to a kernel instance, and its launch.
#pragma once

#include "../common/dispatch.cuh"
#include "../common/mma.cuh"
#include "plan.cuh"

namespace vista::cuda {

// The backward kernels that read each row once keep D x D and tiles of two tensors in shared memory, 99 KB at most.
// Where rows are wider than this, dQ and W (dK and dV) take a pass each.
template <class Math, int D>
constexpr bool kFusedBackward = D * sizeof(typename Math::T) <= 256;

inline void check_alignment(const QlaParams& p) {
  const void* pointers[] = {p.q,   p.k,      p.v,      p.grad_out, p.state,     p.grad_state,
                            p.out, p.grad_q, p.grad_k, p.grad_v,   p.state_out, p.grad_state_out};
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0)
      throw std::invalid_argument("qla kernels take rows and states at multiples of 16 bytes");
}

// Calls f(Math{}, Dim<D>{}) with the smallest D >= d, e.
template <class F>
int dispatch(const QlaParams& p, F f) {
  check_alignment(p);
  check_head_dims("qla", p.d, p.e);
  const auto with_dim = [&](auto math) { return dispatch_dim(p.d > p.e ? p.d : p.e, math, f); };
  switch (p.dtype) {
    case DType::kBFloat16: return with_dim(MmaMath<BFloat16>{});
    case DType::kHalf: return with_dim(MmaMath<Half>{});
    case DType::kFloat: return p.allow_tf32 ? with_dim(Tf32Math{}) : with_dim(FmaMath{});
  }
  throw std::invalid_argument("qla kernels are built for float32, bfloat16 and float16");
}

// One block for each item, head and slice. Blocks beyond the plan's items return at once.
template <class Shape, class... Parameters, class... Arguments>
int launch_items(void (*kernel)(Parameters...), const QlaParams& p, int slices, Stream stream, Arguments... arguments) {
  static_assert(Shape::kSharedBytes <= kMostSharedBytes);
  const int64_t blocks = most_items(p) * p.heads * slices;
  if (blocks > INT32_MAX)
    throw std::invalid_argument("qla kernels take at most 2^31 - 1 blocks: (total / " + std::to_string(p.chunk_rows) +
                                " + batch) * heads is too large");
  if (p.heads == 0 || p.batch + p.total == 0) return cudaSuccess;
  const cudaError_t error = allow_shared(kernel, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), Shape::kThreads, Shape::kSharedBytes, static_cast<cudaStream_t>(stream)>>>(
      p, arguments...);
  return cudaGetLastError();
}

}  // namespace vista::cuda
