#include <cuda_runtime.h>

#include "access.cuh"
#include "vista/cuda/cache_rows.h"

namespace vista::cuda {
namespace rows {

struct QuantizeArgs {
  const void* x;
  uint8_t* rows;
  int64_t users;
  int64_t group;   // values
  int64_t groups;  // of a user
  int64_t payload_end, scales_offset, biases_offset, biases_end, row_bytes;
  int64_t tiles;  // of a user
  int lanes;      // that share a group, a power of two
};

// The bytes that no group writes.
__device__ inline void write_padding(const QuantizeArgs& args, uint8_t* row, int thread, int threads) {
  if (thread == 0 && args.payload_end < args.scales_offset) row[args.payload_end] = 0;
  for (int64_t at = args.biases_end + thread; at < args.row_bytes; at += threads) row[at] = 0;
}

// A team of lanes holds a group in registers, kSpan vectors a lane; a lane works for kSlots / kSpan groups at a time.
// Neighbouring teams have neighbouring groups, so that a warp's accesses are contiguous.
template <typename T, RowScheme kScheme, int kSpan>
__global__ void __launch_bounds__(kThreads) quantize_vectors(const QuantizeArgs args) {
  constexpr int kValues = kVectorValues<T>;
  constexpr int kSets = kSlots / kSpan;
  constexpr int kBytes = kValues / kValuesPerByte<kScheme>;
  constexpr int kWordValues = kBytes < 4 ? kValues : 4 * kValuesPerByte<kScheme>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int teams = 32 / args.lanes, team = lane / args.lanes, member = lane % args.lanes;
  const int vectors = static_cast<int>(args.group / kValues);

  for (int64_t tile = blockIdx.x; tile < args.users * args.tiles; tile += gridDim.x) {
    const int64_t user = tile / args.tiles, part = tile - user * args.tiles;
    const T* x = static_cast<const T*>(args.x) + user * args.groups * args.group;
    uint8_t* row = args.rows + user * args.row_bytes;
    const int64_t first = (part * kWarps + warp) * (kSets * teams) + team;

    float values[kSets][kSpan][kValues];
    Extremes<kScheme> extremes[kSets];
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      const int64_t group = first + set * teams;
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        const int vector = member + i * args.lanes;
        if (group >= args.groups || vector >= vectors) continue;
        load_vector(x + group * args.group + vector * kValues, values[set][i]);
      }
    }
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      const int64_t group = first + set * teams;
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        if (group >= args.groups || member + i * args.lanes >= vectors) continue;
#pragma unroll
        for (int v = 0; v < kValues; ++v) extremes[set].add(values[set][i][v]);
      }
    }
    for (int step = 1; step < args.lanes; step *= 2) {
#pragma unroll
      for (int set = 0; set < kSets; ++set) extremes[set].exchange(step);
    }
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      const int64_t group = first + set * teams;
      if (group >= args.groups) continue;
      const GroupCode<kScheme> code(extremes[set]);
      if (member == 0) {
        *reinterpret_cast<uint16_t*>(row + args.scales_offset + 2 * group) = code.scale_bits;
        if constexpr (kScheme == RowScheme::kInt4)
          *reinterpret_cast<uint16_t*>(row + args.biases_offset + 2 * group) = code.bias_bits;
      }
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        const int vector = member + i * args.lanes;
        if (vector >= vectors) continue;
        uint32_t words[2] = {};
#pragma unroll
        for (int v = 0; v < kValues; v += kWordValues)
          words[v / kWordValues] = code.template encode_word<kWordValues>(values[set][i] + v);
        store_codes<kBytes>(row + (group * vectors + vector) * kBytes, words);
      }
    }
    if (part == 0) write_padding(args, row, threadIdx.x, kThreads);
  }
}

// Groups that no team holds (longer than 128 vectors, or not whole vectors): a warp reads its group twice.
template <typename T, RowScheme kScheme>
__global__ void __launch_bounds__(kThreads) quantize_values(const QuantizeArgs args) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t task = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32; task < args.users * args.groups;
       task += warps) {
    const int64_t user = task / args.groups, group = task - user * args.groups;
    const T* x = static_cast<const T*>(args.x) + task * args.group;
    uint8_t* row = args.rows + user * args.row_bytes;
    Extremes<kScheme> extremes;
    for (int64_t i = lane; i < args.group; i += 32) extremes.add(widen(x[i]));
    for (int step = 1; step < 32; step *= 2) extremes.exchange(step);
    const GroupCode<kScheme> code(extremes);
    if (lane == 0) {
      store_half_anywhere(row + args.scales_offset + 2 * group, code.scale_bits);
      if constexpr (kScheme == RowScheme::kInt4)
        store_half_anywhere(row + args.biases_offset + 2 * group, code.bias_bits);
    }
    constexpr int kValues = kValuesPerByte<kScheme>;
    const int64_t bytes = args.group / kValues;
    for (int64_t i = lane; i < bytes; i += 32) {
      float values[kValues];
#pragma unroll
      for (int v = 0; v < kValues; ++v) values[v] = widen(x[i * kValues + v]);
      row[group * bytes + i] = static_cast<uint8_t>(code.template encode_word<kValues>(values));
    }
    if (group == 0) write_padding(args, row, lane, 32);
  }
}

template <typename T, RowScheme kScheme>
int quantize(QuantizeArgs args, cudaStream_t stream) {
  constexpr int kValues = kVectorValues<T>;
  const int64_t vectors = args.group / kValues;
  const bool whole =
      args.group % kValues == 0 && vectors <= 32 * kSlots && aligned(args.x, 16) && aligned(args.rows, 8);
  if (!whole) {
    const unsigned blocks = grid_for(divide_up(args.users * args.groups, kWarps));
    quantize_values<T, kScheme><<<blocks, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
  }
  args.lanes = 1;
  while (args.lanes < vectors && args.lanes < 32) args.lanes *= 2;
  const bool one = vectors <= 32;
  args.tiles = divide_up(args.groups, kWarps * (32 / args.lanes) * (one ? kSlots : 1));
  const unsigned blocks = grid_for(args.users * args.tiles);
  if (one) {
    quantize_vectors<T, kScheme, 1><<<blocks, kThreads, 0, stream>>>(args);
  } else {
    quantize_vectors<T, kScheme, kSlots><<<blocks, kThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace rows

int quantize_rows(const QuantizeParams& params, Stream stream) {
  if (params.n == 0) return cudaSuccess;
  const RowLayout& layout = params.layout;
  const bool biased = layout.scheme == RowScheme::kInt4;
  rows::QuantizeArgs args{};
  args.x = params.x;
  args.rows = params.rows;
  args.users = params.n;
  args.group = layout.group;
  args.groups = layout.groups();
  args.payload_end = layout.tokens * layout.dim / (biased ? 2 : 1);
  args.scales_offset = layout.scales_offset;
  args.biases_offset = layout.biases_offset;
  args.biases_end = layout.biases_offset + (biased ? 2 * args.groups : 0);
  args.row_bytes = layout.row_bytes;
  return rows::dispatch(params.dtype, layout.scheme, [&](auto value, auto scheme) {
    return rows::quantize<decltype(value), decltype(scheme)::value>(args, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace vista::cuda
