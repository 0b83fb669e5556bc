// Scatter in two kernels: the first finds the last row of every slot in a hash table, the second copies those rows.
#include <cuda_runtime.h>

#include "access.cuh"
#include "vista/cuda/cache_rows.h"

namespace vista::cuda {
namespace rows {

// The workspace. Empty slots and rows are -1: a memset of 0xff makes the table.
struct SlotTable {
  int64_t* slots;    // [capacity] open addressing
  int64_t* last;     // [capacity] last row of that slot
  int64_t* entries;  // [n] where in the table a row's slot is; -1 for a bad slot
  int shift;         // capacity is 2^(64 - shift), at least 2 n: a search ends soon
};

inline int table_bits(int64_t n) {
  int bits = 1;
  while ((int64_t{1} << bits) < 2 * n) ++bits;
  return bits;
}

__device__ inline int64_t find_or_insert(const SlotTable& table, int64_t slot) {
  const int64_t mask = static_cast<int64_t>(~uint64_t{0} >> table.shift);
  int64_t entry = static_cast<int64_t>(static_cast<uint64_t>(slot) * 0x9e3779b97f4a7c15ull >> table.shift);
  while (true) {
    const int64_t found = static_cast<int64_t>(atomicCAS(reinterpret_cast<unsigned long long*>(table.slots + entry),
                                                         ~0ull, static_cast<unsigned long long>(slot)));
    if (found == -1 || found == slot) return entry;
    entry = (entry + 1) & mask;
  }
}

struct ScatterArgs {
  uint8_t* cache;
  const uint8_t* rows;
  Indices slots;
  SlotTable table;
  int64_t* num_bad;
  BadSlots bad_slots;
  int64_t n, num_slots, row_bytes;
};

__global__ void __launch_bounds__(kThreads) resolve_slots(const ScatterArgs args) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < args.n; i += threads) {
    const int64_t slot = load_index(args.slots, i);
    if (slot < 0 || slot >= args.num_slots) {
      if (args.bad_slots == BadSlots::kTrap) __trap();
      count_bad(args.num_bad);
      args.table.entries[i] = -1;
      continue;
    }
    const int64_t entry = find_or_insert(args.table, slot);
    atomicMax(reinterpret_cast<long long*>(args.table.last + entry), static_cast<long long>(i));
    args.table.entries[i] = entry;
  }
}

// Copies in steps of Unit: 16 bytes, or one where rows are not aligned.
template <typename Unit>
__global__ void __launch_bounds__(kThreads) copy_rows(const ScatterArgs args) {
  const int64_t units = args.row_bytes / static_cast<int64_t>(sizeof(Unit));
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kSlots) + threadIdx.x;
  for (int64_t i = blockIdx.y; i < args.n; i += gridDim.y) {
    const int64_t entry = args.table.entries[i];
    if (entry < 0 || args.table.last[entry] != i) continue;
    const Unit* from = reinterpret_cast<const Unit*>(args.rows + i * args.row_bytes);
    Unit* to = reinterpret_cast<Unit*>(args.cache + args.table.slots[entry] * args.row_bytes);
    Unit values[kSlots];
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
      if (first + s * kThreads < units) values[s] = from[first + s * kThreads];
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
      if (first + s * kThreads < units) to[first + s * kThreads] = values[s];
  }
}

template <typename Unit>
int launch_copy(const ScatterArgs& args, cudaStream_t stream) {
  const int64_t units = args.row_bytes / static_cast<int64_t>(sizeof(Unit));
  copy_rows<Unit><<<grid_for(divide_up(units, kThreads * kSlots), args.n), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace rows

int64_t scatter_workspace_bytes(int64_t n) {
  return static_cast<int64_t>(sizeof(int64_t)) * (2 * (int64_t{1} << rows::table_bits(n)) + n);
}

int scatter_rows(const ScatterParams& params, Stream stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  int code = cudaMemsetAsync(params.num_bad, 0, sizeof(int64_t), on);
  if (code != cudaSuccess || params.n == 0) return code;
  const int bits = rows::table_bits(params.n);
  const int64_t capacity = int64_t{1} << bits;
  int64_t* workspace = static_cast<int64_t*>(params.workspace);
  rows::ScatterArgs args{};
  args.cache = params.cache;
  args.rows = params.rows;
  args.slots = params.slots;
  args.table = {workspace, workspace + capacity, workspace + 2 * capacity, 64 - bits};
  args.num_bad = params.num_bad;
  args.bad_slots = params.bad_slots;
  args.n = params.n;
  args.num_slots = params.num_slots;
  args.row_bytes = params.row_bytes;
  code = cudaMemsetAsync(workspace, 0xff, 2 * capacity * sizeof(int64_t), on);
  if (code != cudaSuccess) return code;
  const int64_t blocks = std::min<int64_t>(rows::divide_up(params.n, rows::kThreads), INT32_MAX);
  rows::resolve_slots<<<static_cast<unsigned>(blocks), rows::kThreads, 0, on>>>(args);
  code = cudaGetLastError();
  if (code != cudaSuccess || params.row_bytes == 0) return code;
  const bool whole = params.row_bytes % 16 == 0 && rows::aligned(params.cache, 16) && rows::aligned(params.rows, 16);
  return whole ? rows::launch_copy<uint4>(args, on) : rows::launch_copy<uint8_t>(args, on);
}

}  // namespace vista::cuda
