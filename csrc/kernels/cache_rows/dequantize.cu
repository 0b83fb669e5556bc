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
  int64_t vectors;  // of a user
  uint32_t group_vectors;
  uint32_t stride_groups, stride_rest;  // kThreads vectors are so many groups, and vectors
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
  constexpr int kTile = kThreads * kSlots;
  const int thread = threadIdx.x;
  const int64_t tile_vector = static_cast<int64_t>(blockIdx.x) * kTile;
  const int vectors = static_cast<int>(min(args.vectors - tile_vector, static_cast<int64_t>(kTile)));
  const int64_t tile_group = tile_vector / args.group_vectors;
  // The thread's first group, counted from the tile's, and its vector there.
  const uint32_t ahead = static_cast<uint32_t>(tile_vector - tile_group * args.group_vectors) + thread;
  const uint32_t first_group = ahead / args.group_vectors;
  const uint32_t first_within = ahead - first_group * args.group_vectors;

  for (int64_t user = blockIdx.y; user < args.users; user += gridDim.y) {
    const uint8_t* row = find_row(args, user, blockIdx.x == 0 && thread == 0);
    const uint8_t* payload = row + tile_vector * kValues / kValuesPerByte<kScheme>;
    const uint8_t* scales_at = row + args.scales_offset + 2 * tile_group;
    const uint8_t* biases_at = row + args.biases_offset + 2 * tile_group;
    uint32_t words[kSlots][2] = {};
    float scales[kSlots] = {}, biases[kSlots] = {};
    uint32_t group = first_group, within = first_within;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int vector = thread + i * kThreads;
      if (row != nullptr && vector < vectors) {
        load_codes<kBytes>(payload + vector * kValues / kValuesPerByte<kScheme>, words[i]);
        scales[i] = load_half<kValues != 1>(scales_at + 2 * group);
        if constexpr (kBiased) biases[i] = load_half<kValues != 1>(biases_at + 2 * group);
      }
      group += args.stride_groups;
      within += args.stride_rest;
      if (within >= args.group_vectors) {
        within -= args.group_vectors;
        ++group;
      }
    }

    T* out = static_cast<T*>(args.out) + (user * args.vectors + tile_vector + thread) * kValues;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int vector = thread + i * kThreads;
      if (vector >= vectors) continue;
      constexpr int kWordValues = 4 * kValuesPerByte<kScheme>;
      float values[kValues];
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        const int place = kValues == 1 && kBiased ? vector % 2 : v % kWordValues;  // a tile begins with a whole byte
        values[v] = decode<kScheme>(words[i][v / kWordValues], place, scales[i], biases[i]);
      }
      store_values(out + i * (kThreads * kValues), values, scales[i] != scales[i]);
    }
  }
}

template <typename T, RowScheme kScheme, int kValues>
int launch_dequantize(DequantizeArgs args, const RowLayout& layout, cudaStream_t stream) {
  args.vectors = layout.tokens * layout.dim / kValues;
  args.group_vectors = static_cast<uint32_t>(layout.group / kValues);
  args.stride_groups = kThreads / args.group_vectors;
  args.stride_rest = kThreads % args.group_vectors;
  const dim3 grid = grid_for(divide_up(args.vectors, kThreads * kSlots), args.users);
  dequantize_vectors<T, kScheme, kValues><<<grid, kThreads, 0, stream>>>(args);
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
