// A block's place in the work, and launches of the instance that serves a call.
#pragma once

#include "../qla/launch.cuh"
#include "shapes.cuh"

namespace vista::cuda {

// False for a block beyond the work. Groups of heads and parts vary fastest: their blocks read the same rows of x.
template <class S>
__device__ inline bool find_group(const QlaParams& p, Work& w) {
  const int64_t groups = ceil_div(p.heads, S::kHeads);
  const int64_t rest = blockIdx.x / groups;
  w.head = static_cast<int>(blockIdx.x % groups * S::kHeads);
  w.slice = static_cast<int>(rest % (S::kParts * S::kParts));
  return find_item(p, static_cast<int32_t>(rest / (S::kParts * S::kParts)), w);
}

// Heads of the block's group that exist.
template <class S>
__device__ inline int heads_of(const QlaParams& p, const Work& w) {
  return p.heads - w.head < S::kHeads ? static_cast<int>(p.heads) - w.head : S::kHeads;
}

// The rows of a weight that belong to columns of the group: `columns` of each head from `first` on.
template <class S>
__device__ inline auto weight_rows(const QlaParams& p, const Work& w, int first) {
  const int begin = w.head * S::kDim + first, heads = heads_of<S>(p, w);
  return [=](int column) {
    const int head = column / S::kPart;
    return head < heads ? begin + head * S::kDim + column % S::kPart : -1;
  };
}

// The maps P of the group's heads, or their gradients, one behind the other.
template <class S>
__device__ inline void load_matrices_of(typename S::T* to, const QlaParams& p, Work w, bool gradient) {
  const int heads = heads_of<S>(p, w);
  for (int head = 0; head < heads; ++head, ++w.head)
    load_matrix<typename S::T, S::kDim, S::kDim, S::kMatrixPitch>(to + head * S::kDim * S::kMatrixPitch, p, w, gradient,
                                                                  0, 0);
}

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char projected_qla_shared[];
  return projected_qla_shared;
}

inline void check_blocks(const ProjectedQlaParams& p, int64_t blocks) {
  if (blocks > INT32_MAX)
    throw std::invalid_argument("projected_qla kernels take at most 2^31 - 1 blocks: (total / " +
                                std::to_string(p.qla.chunk_rows) + " + batch) * heads is too large");
}

template <class S>
int launch_groups(void (*kernel)(ProjectedQlaParams), const ProjectedQlaParams& p, Stream stream) {
  const int64_t blocks = most_items(p.qla) * ceil_div(p.qla.heads, S::kHeads) * S::kParts * S::kParts;
  check_blocks(p, blocks);
  if (p.qla.batch + p.qla.total == 0) return cudaSuccess;
  const int bytes = static_cast<int>(shared_bytes<S>(p.dim));
  const cudaError_t error = allow_shared(kernel, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), S::kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

// launch(Shape{}) of the instance that serves the call.
template <template <class> class Table, class Launch>
int launch_instance(const ProjectedQlaParams& p, Launch launch) {
  check_alignment(p.qla);
  for (const void* pointer : {p.x, p.weight_q, p.weight_k, p.weight_v})
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0)
      throw std::invalid_argument("projected_qla kernels take rows and weights at multiples of 16 bytes");
  int most = 0;
  int error = shared_bytes_of_device(most);
  if (error != cudaSuccess) return error;
  if (!choose_instance<Table>(p, most, [&](auto shape) { error = launch(shape); }))
    throw std::invalid_argument(
        "projected_qla kernels are built for bfloat16 and float16, equal head dims of 32, 64 or 128 and a dim that is "
        "a multiple of 8 whose weights fit the device's shared memory, found head dims " +
        std::to_string(p.qla.d) + " and " + std::to_string(p.qla.e) + " and dim " + std::to_string(p.dim));
  return error;
}

}  // namespace vista::cuda
