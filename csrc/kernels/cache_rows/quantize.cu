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
  int group_vectors;
  int lanes_log2;  // 2^lanes_log2 lanes share a group
};

// The bytes that no group writes.
__device__ inline void write_padding(const QuantizeArgs& args, uint8_t* row, int thread, int threads) {
  if (thread == 0 && args.payload_end < args.scales_offset) row[args.payload_end] = 0;
  for (int64_t at = args.biases_end + thread; at < args.row_bytes; at += threads) row[at] = 0;
}

// A team of lanes holds a group in registers, kSpan vectors a lane; a lane works for kSlots / kSpan groups at a time.
// Neighbouring teams have neighbouring groups, so that a warp's accesses are contiguous.
template <typename T, RowScheme kScheme, int kSpan>
__global__ void __launch_bounds__(kThreads, 3) quantize_vectors(const QuantizeArgs args) {
  constexpr int kValues = kVectorValues<T>;
  constexpr int kSets = kSlots / kSpan;
  constexpr int kBytes = kValues / kValuesPerByte<kScheme>;
  constexpr int kWordValues = kBytes < 4 ? kValues : 4 * kValuesPerByte<kScheme>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int lanes = 1 << args.lanes_log2, teams = 32 >> args.lanes_log2;
  const int team = lane >> args.lanes_log2, member = lane & (lanes - 1);
  const int first = warp * (kSets * teams) + team;  // group, counted from the tile's first one
  const int64_t tile_group = static_cast<int64_t>(blockIdx.x) * (kWarps * kSets * teams);
  const int groups = static_cast<int>(min(args.groups - tile_group, static_cast<int64_t>(kWarps * kSets * teams)));
  const int group_vectors = args.group_vectors;
  const auto is_own = [&](int set, int vector) { return first + set * teams < groups && vector < group_vectors; };

  for (int64_t user = blockIdx.y; user < args.users; user += gridDim.y) {
    const T* x = static_cast<const T*>(args.x) + (user * args.groups + tile_group) * (group_vectors * kValues);
    float values[kSets][kSpan][kValues];
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        const int vector = member + i * lanes;
        if (is_own(set, vector))
          load_vector(x + ((first + set * teams) * group_vectors + vector) * kValues, values[set][i]);
      }
    }

    Extremes<kScheme> extremes[kSets];
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        if (!is_own(set, member + i * lanes)) continue;
#pragma unroll
        for (int v = 0; v < kValues; ++v) extremes[set].add(values[set][i][v]);
      }
    }
    for (int step = 1; step < lanes; step *= 2) {
#pragma unroll
      for (int set = 0; set < kSets; ++set) extremes[set].exchange(step);
    }

    // Each set's divisions are done once, by the member of its number, who writes its scale.
    Extremes<kScheme> own = extremes[0];
#pragma unroll
    for (int set = 1; set < kSets; ++set)
      if (member == set) own = extremes[set];
    const GroupCode<kScheme> own_code(own);
    uint8_t* row = args.rows + user * args.row_bytes;
    if (member < kSets && is_own(member, 0)) {
      const int64_t at = 2 * (tile_group + first + member * teams);
      *reinterpret_cast<uint16_t*>(row + args.scales_offset + at) = own_code.scale_bits;
      if constexpr (kScheme == RowScheme::kInt4)
        *reinterpret_cast<uint16_t*>(row + args.biases_offset + at) = own_code.bias_bits;
    }

    uint8_t* payload = row + tile_group * (group_vectors * kBytes);
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      const GroupCode<kScheme> code = own_code.from_lane((team << args.lanes_log2) + set);
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        const int vector = member + i * lanes;
        if (!is_own(set, vector)) continue;
        uint32_t words[2] = {};
#pragma unroll
        for (int v = 0; v < kValues; v += kWordValues)
          words[v / kWordValues] = code.template encode_word<kWordValues>(values[set][i] + v);
        store_codes<kBytes>(payload + ((first + set * teams) * group_vectors + vector) * kBytes, words);
      }
    }
    if (blockIdx.x == 0) write_padding(args, row, threadIdx.x, kThreads);
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
    const int64_t blocks = divide_up(args.users * args.groups, kWarps);
    quantize_values<T, kScheme>
        <<<static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX)), kThreads, 0, stream>>>(args);
    return cudaGetLastError();
  }
  const bool one = vectors <= 32;
  args.group_vectors = static_cast<int>(vectors);
  args.lanes_log2 = 2;  // at least kSlots lanes: see own_code
  while (args.lanes_log2 < 5 && (1 << args.lanes_log2) < vectors) ++args.lanes_log2;
  const int64_t tile_groups = kWarps * (32 >> args.lanes_log2) * (one ? kSlots : 1);
  const dim3 grid = grid_for(divide_up(args.groups, tile_groups), args.users);
  if (one) {
    quantize_vectors<T, kScheme, 1><<<grid, kThreads, 0, stream>>>(args);
  } else {
    quantize_vectors<T, kScheme, kSlots><<<grid, kThreads, 0, stream>>>(args);
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
