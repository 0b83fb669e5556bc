// What the passes of the backward need of each query row, and the gradients of own items: one reading of O, dO, Q and
// the own items. 8 lanes work on one row and key/value head, with its query heads in order, so that a gradient has one
// writer.
#include "launch.cuh"
#include "parts.cuh"
#include "rows.cuh"

namespace vista::cuda {
namespace {

constexpr int kPrepareThreads = 128;

// to = scale * sum over the heads of factors[head] * from; zero if not `valid`
template <class T>
__device__ void write_own_gradient(T* to, const T* from, const float* factors, float scale, int64_t heads,
                                   int64_t columns, bool valid) {
#pragma unroll 1
  for (int64_t i = lane_id() % 8 * kPerVector<T>; i < columns; i += 8 * kPerVector<T>) {
    float sum[kPerVector<T>] = {};
#pragma unroll 1
    for (int64_t head = 0; valid && head < heads; ++head) {
      float x[kPerVector<T>];
      unpack_vector<T>(load_vector(from + head * columns + i), x);
#pragma unroll
      for (int j = 0; j < kPerVector<T>; ++j) sum[j] = fmaf(factors[head], x[j], sum[j]);
    }
#pragma unroll
    for (int j = 0; j < kPerVector<T>; ++j) sum[j] *= scale;
    write_vector(to + i, pack_vector<T>(sum));
  }
}

template <class T>
__global__ void __launch_bounds__(kPrepareThreads) cross_attn_prepare(const CrossAttnParams p) {
  const Plan plan(p, true);
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (kPrepareThreads / 8) + threadIdx.x / 8;
  const int64_t row = unit / p.kv_heads, kv_head = unit % p.kv_heads, share = p.q_heads / p.kv_heads;
  const bool exists = row < p.total_q, valid = exists && row < index_at(p.q_offsets, p.groups);
  const int64_t first = row * p.q_heads + kv_head * share;  // of the query heads, in [total_q, q_heads]
  const T* q = static_cast<const T*>(p.q) + first * p.d;
  const T* out = static_cast<const T*>(p.out) + first * p.e;
  const T* grad = static_cast<const T*>(p.grad_out) + first * p.e;
  const T* own_k = static_cast<const T*>(p.self_k) + unit * p.d;
  const T* own_v = static_cast<const T*>(p.self_v) + unit * p.e;
  const int64_t d = valid ? p.d : 0, e = valid ? p.e : 0;  // all lanes of a warp meet in the dot products
#pragma unroll 1
  for (int64_t head = 0; head < share; ++head) {
    const int64_t at = first + head;
    float delta = row_dot<T>(Activation::kIdentity, grad + head * p.e, out + head * p.e, e);
    if (valid && p.grad_lse != nullptr) delta -= p.grad_lse[at];
    if (valid && lane_id() % 8 == 0) plan.delta[at] = delta;
    if (p.self_k == nullptr) continue;
    const float score = p.scale * row_dot<T>(Activation::kIdentity, q + head * p.d, own_k, d);
    const float grad_weight = row_dot<T>(Activation::kIdentity, grad + head * p.e, own_v, e);
    if (valid && lane_id() % 8 == 0) {
      const float weight = exponential<T>(score - p.lse[at]);
      plan.own_weight[at] = weight;
      plan.own_grad[at] = weight * (grad_weight - delta);
    }
  }
  if (p.self_k == nullptr) return;
  __syncwarp();
  if (!exists) return;
  write_own_gradient(static_cast<T*>(p.grad_self_k) + unit * p.d, q, plan.own_grad + first, p.scale, share, p.d, valid);
  write_own_gradient(static_cast<T*>(p.grad_self_v) + unit * p.e, grad, plan.own_weight + first, 1.f, share, p.e,
                     valid);
}

}  // namespace

int launch_cross_attn_prepare(const CrossAttnParams& params, Stream stream) {
  const int64_t blocks = ceil_div(params.total_q * params.kv_heads, kPrepareThreads / 8);
  if (blocks == 0 || params.q_heads == 0) return cudaSuccess;
  if (blocks > INT32_MAX) throw std::invalid_argument("cross_attn kernels take at most 2^35 query rows and heads");
  return dispatch(params, [&](auto math, auto) {
    cross_attn_prepare<typename decltype(math)::T>
        <<<static_cast<unsigned>(blocks), kPrepareThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
    return cudaGetLastError();
  });
}

int launch_cross_attn_backward(const CrossAttnParams& params, Stream stream) {
  for (auto launch : {launch_cross_attn_prepare, launch_cross_attn_backward_queries, launch_cross_attn_backward_keys}) {
    const int error = launch(params, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace vista::cuda
