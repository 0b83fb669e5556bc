#include <cuda_runtime.h>

#include "access.cuh"
#include "vista/cuda/cache_rows.h"

namespace vista::cuda {
namespace rows {

struct DequantizeArgs {
  const uint8_t* cache;
  void* out;
  Indices slots;  // no data: user i reads row i
  int64_t* num_bad;
  BadSlots bad_slots;
  int64_t users, num_slots;
  int64_t scales_offset, biases_offset, row_bytes;
  int64_t vectors, group_vectors;      // of a user, of a group
  int64_t stride_groups, stride_rest;  // kThreads vectors are stride_groups groups and stride_rest vectors
  int64_t tiles;                       // of a user
};

// The user's row, or null for zeros.
__device__ inline const uint8_t* find_row(const DequantizeArgs& args, int64_t user, bool counts) {
  if (args.slots.data == nullptr) return args.cache + user * args.row_bytes;
  const int64_t slot = load_index(args.slots, user);
  if (slot >= 0 && slot < args.num_slots) return args.cache + slot * args.row_bytes;
  if (args.bad_slots == BadSlots::kTrap) __trap();
  if (counts) count_bad(args.num_bad);
  return nullptr;
}

// kValues of T to a vector: 16 bytes of them, or one where a group is not made of whole aligned vectors.
template <typename T, RowScheme kScheme, int kValues>
__global__ void __launch_bounds__(kThreads) dequantize_vectors(const DequantizeArgs args) {
  constexpr bool kBiased = kScheme == RowScheme::kInt4;
  constexpr int kBytes = kValues == 1 ? 1 : kValues / kValuesPerByte<kScheme>;
  for (int64_t tile = blockIdx.x; tile < args.users * args.tiles; tile += gridDim.x) {
    const int64_t user = tile / args.tiles, part = tile - user * args.tiles;
    const uint8_t* row = find_row(args, user, part == 0 && threadIdx.x == 0);
    T* out = static_cast<T*>(args.out) + user * args.vectors * kValues;
    const int64_t first = part * (kThreads * kSlots) + threadIdx.x;

    uint32_t words[kSlots][2];
    float scales[kSlots] = {}, biases[kSlots] = {};
    int64_t group = first / args.group_vectors, within = first - group * args.group_vectors;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int64_t vector = first + i * kThreads;
      if (row != nullptr && vector < args.vectors) {
        load_codes<kBytes>(row + vector * kValues / kValuesPerByte<kScheme>, words[i]);
        scales[i] = load_half<kValues != 1>(row + args.scales_offset + 2 * group);
        if constexpr (kBiased) biases[i] = load_half<kValues != 1>(row + args.biases_offset + 2 * group);
      } else {
        words[i][0] = words[i][1] = 0;
      }
      group += args.stride_groups;
      within += args.stride_rest;
      if (within >= args.group_vectors) {
        within -= args.group_vectors;
        ++group;
      }
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int64_t vector = first + i * kThreads;
      if (vector >= args.vectors) continue;
      constexpr int kWordValues = 4 * kValuesPerByte<kScheme>;
      float values[kValues];
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        const int place = kValues == 1 && kBiased ? static_cast<int>(vector % 2) : v % kWordValues;
        values[v] = decode<kScheme>(words[i][v / kWordValues], place, scales[i], biases[i]);
      }
      if constexpr (kValues == 1) out[vector] = narrow<T>(values[0]);
      if constexpr (kValues != 1) store_vector(out + vector * kValues, values);
    }
  }
}

template <typename T, RowScheme kScheme, int kValues>
int launch_dequantize(DequantizeArgs args, const RowLayout& layout, cudaStream_t stream) {
  args.vectors = layout.tokens * layout.dim / kValues;
  args.group_vectors = layout.group / kValues;
  args.stride_groups = kThreads / args.group_vectors;
  args.stride_rest = kThreads % args.group_vectors;
  args.tiles = divide_up(args.vectors, kThreads * kSlots);
  dequantize_vectors<T, kScheme, kValues><<<grid_for(args.users * args.tiles), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

int dequantize(const DequantizeParams& params, const Indices& slots, cudaStream_t stream) {
  const RowLayout& layout = params.layout;
  DequantizeArgs args{};
  args.cache = params.cache;
  args.out = params.out;
  args.slots = slots;
  args.num_bad = params.num_bad;
  args.bad_slots = params.bad_slots;
  args.users = params.n;
  args.num_slots = params.num_slots;
  args.scales_offset = layout.scales_offset;
  args.biases_offset = layout.biases_offset;
  args.row_bytes = layout.row_bytes;
  return dispatch(params.dtype, layout.scheme, [&](auto value, auto scheme) {
    using T = decltype(value);
    constexpr RowScheme kScheme = decltype(scheme)::value;
    const bool whole = layout.group % kVectorValues<T> == 0 && aligned(params.out, 16) && aligned(params.cache, 8);
    return whole ? launch_dequantize<T, kScheme, kVectorValues<T>>(args, layout, stream)
                 : launch_dequantize<T, kScheme, 1>(args, layout, stream);
  });
}

}  // namespace rows

int gather_rows(const DequantizeParams& params, Stream stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const int code = cudaMemsetAsync(params.num_bad, 0, sizeof(int64_t), on);
  if (code != cudaSuccess || params.n == 0) return code;
  return rows::dequantize(params, params.slots, on);
}

int dequantize_rows(const DequantizeParams& params, Stream stream) {
  if (params.n == 0) return cudaSuccess;
  return rows::dequantize(params, Indices{}, static_cast<cudaStream_t>(stream));
}

}  // namespace vista::cuda
