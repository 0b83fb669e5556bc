// What the passes of the backward need of each query row, and the gradients of own items: one reading of O, dO, Q and
// the own items. 8 lanes work on one row and key/value head, with its query heads in order, so that a gradient has one
// writer. In fp32 those gradients wait for the corrected delta, and take a second reading of Q and dO.
#include "backward.cuh"
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

// A row and key/value head, of 8 lanes.
struct Unit {
  int64_t index, share, first;  // query heads, and the first of them in [total_q, q_heads]
  bool exists, valid;

  __device__ explicit Unit(const CrossAttnParams& p)
      : index(static_cast<int64_t>(blockIdx.x) * (kPrepareThreads / 8) + threadIdx.x / 8),
        share(p.q_heads / p.kv_heads),
        first(index * share) {
    const int64_t row = index / p.kv_heads;
    exists = row < p.total_q;
    valid = exists && row < index_at(p.q_offsets, p.groups);
  }
};

template <class T>
__device__ void write_own_gradients(const CrossAttnParams& p, const Plan& plan, const Unit& unit) {
  if (!unit.exists) return;
  const T* q = static_cast<const T*>(p.q) + unit.first * p.d;
  const T* grad = static_cast<const T*>(p.grad_out) + unit.first * p.e;
  write_own_gradient(static_cast<T*>(p.grad_self_k) + unit.index * p.d, q, plan.own_grad + unit.first, p.scale,
                     unit.share, p.d, unit.valid);
  write_own_gradient(static_cast<T*>(p.grad_self_v) + unit.index * p.e, grad, plan.own_weight + unit.first, 1.f,
                     unit.share, p.e, unit.valid);
}

template <class T>
__global__ void __launch_bounds__(kPrepareThreads, 8) cross_attn_prepare(const CrossAttnParams p) {
  const Plan plan(p, true);
  const Unit unit(p);
  const bool valid = unit.valid;
  const T* q = static_cast<const T*>(p.q) + unit.first * p.d;
  const T* out = static_cast<const T*>(p.out) + unit.first * p.e;
  const T* grad = static_cast<const T*>(p.grad_out) + unit.first * p.e;
  const T* own_k = static_cast<const T*>(p.self_k) + unit.index * p.d;
  const T* own_v = static_cast<const T*>(p.self_v) + unit.index * p.e;
  const int64_t d = valid ? p.d : 0, e = valid ? p.e : 0;  // all lanes of a warp meet in the dot products
#pragma unroll 1
  for (int64_t head = 0; head < unit.share; ++head) {
    const int64_t at = unit.first + head;
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
  if (p.self_k == nullptr || kCorrectDelta<T>) return;
  __syncwarp();
  write_own_gradients<T>(p, plan, unit);
}

__global__ void __launch_bounds__(kPrepareThreads) cross_attn_own_gradients(const CrossAttnParams p) {
  write_own_gradients<float>(p, Plan(p, true), Unit(p));
}

int launch_by_rows(void (*kernel)(CrossAttnParams), const CrossAttnParams& p, Stream stream) {
  const int64_t blocks = ceil_div(p.total_q * p.kv_heads, kPrepareThreads / 8);
  if (blocks == 0 || p.q_heads == 0) return cudaSuccess;
  if (blocks > INT32_MAX) throw std::invalid_argument("cross_attn kernels take at most 2^35 query rows and heads");
  kernel<<<static_cast<unsigned>(blocks), kPrepareThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace

int launch_cross_attn_prepare(const CrossAttnParams& params, Stream stream) {
  return dispatch(params, [&](auto math, auto) {
    return launch_by_rows(cross_attn_prepare<typename decltype(math)::T>, params, stream);
  });
}

int launch_cross_attn_own_gradients(const CrossAttnParams& params, Stream stream) {
  const bool waited = params.dtype == DType::kFloat && params.self_k != nullptr;
  return waited ? launch_by_rows(cross_attn_own_gradients, params, stream) : static_cast<int>(cudaSuccess);
}

int launch_cross_attn_backward(const CrossAttnParams& params, Stream stream) {
  for (auto launch : {launch_cross_attn_prepare, launch_cross_attn_backward_queries, launch_cross_attn_own_gradients,
                      launch_cross_attn_backward_keys}) {
    const int error = launch(params, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace vista::cuda
