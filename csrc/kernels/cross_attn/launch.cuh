// From runtime dtype and sizes to a kernel instance, and its launch.
#pragma once

#include "../common/dispatch.cuh"
#include "../common/mma.cuh"
#include "plan.cuh"

namespace vista::cuda {

inline void check_counts(const CrossAttnParams& p) {
  if (p.groups > INT32_MAX - 2 || p.sequences > INT32_MAX - 2)
    throw std::invalid_argument("cross_attn kernels take at most 2^31 - 3 groups and sequences");
  if (!reads_cache(p) && p.kv_index.data == nullptr && p.groups != p.sequences)
    throw std::invalid_argument("cross_attn kernels without kv_index take as many groups as sequences");
  if (p.kv_heads < 1 || p.q_heads % p.kv_heads != 0)
    throw std::invalid_argument("cross_attn kernels take kv_heads that divide q_heads");
}

// Calls f(Math{}, Dim<D>{}) with the smallest D >= d, e.
template <class F>
int dispatch(const CrossAttnParams& p, F f) {
  check_counts(p);
  const void* pointers[] = {p.q,      p.k,      p.v,      p.self_k,      p.self_v,      p.grad_out,     p.out,
                            p.grad_q, p.grad_k, p.grad_v, p.grad_self_k, p.grad_self_v, p.cache.k_rows, p.cache.v_rows};
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0)
      throw std::invalid_argument("cross_attn kernels take rows at multiples of 16 bytes");
  check_head_dims("cross_attn", p.d, p.e);
  const auto with_dim = [&](auto math) { return dispatch_dim(p.d > p.e ? p.d : p.e, math, f); };
  switch (p.dtype) {
    case DType::kBFloat16: return with_dim(MmaMath<BFloat16>{});
    case DType::kHalf: return with_dim(MmaMath<Half>{});
    case DType::kFloat: return with_dim(FmaMath{});
  }
  throw std::invalid_argument("cross_attn kernels are built for float32, bfloat16 and float16");
}

// Blocks: `tiles` x `heads` x slices. Those beyond the plan return at once.
template <class Shape, class... Options>
int launch_tiles(void (*kernel)(CrossAttnParams, Options...), const CrossAttnParams& p, int64_t tiles, int64_t heads,
                 int slices, Stream stream, Options... options) {
  static_assert(Shape::kSharedBytes <= kMostSharedBytes);
  const int64_t blocks = tiles * heads * slices;
  if (blocks > INT32_MAX)
    throw std::invalid_argument(
        "cross_attn kernels take at most 2^31 - 1 blocks: (rows / 64 + groups) * heads is too "
        "large");
  if (blocks == 0) return cudaSuccess;
  const cudaError_t error = allow_shared(kernel, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), Shape::kThreads, Shape::kSharedBytes, static_cast<cudaStream_t>(stream)>>>(
      p, options...);
  return cudaGetLastError();
}

}  // namespace vista::cuda
