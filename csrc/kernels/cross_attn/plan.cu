// Offsets and kv_index -> plan (plan.cuh). One block: a batch is small beside its rows. Counts are by integer atomics,
// whose order does not matter.
#include "launch.cuh"
#include "parts.cuh"
#include "plan.cuh"

namespace vista::cuda {
namespace {

// A thread's own run of n entries.
struct Run {
  int64_t first, last;
  __device__ explicit Run(int64_t n) {
    const int64_t each = ceil_div(n, kPlanThreads);
    first = threadIdx.x * each < n ? threadIdx.x * each : n;
    last = first + each < n ? first + each : n;
  }
};

// sums[i] <- counts before i, for i in [0, n]
template <class F>
__device__ void sum_counts(int64_t n, int32_t* sums, F count) {
  const Run run(n);
  uint64_t own = 0;
  for (int64_t i = run.first; i < run.last; ++i) own += count(i);
  __syncthreads();
  uint64_t before = sum_before(own);
  for (int64_t i = run.first; i < run.last; ++i) {
    const uint64_t here = count(i);
    sums[i] = static_cast<int32_t>(before);
    before += here;
  }
  const bool last = n == 0 ? threadIdx.x == 0 : run.first < n && run.last == n;
  if (last) sums[n] = static_cast<int32_t>(before);
}

__device__ void plan_tiles(const Indices& offsets, int64_t parts, int64_t total, int64_t longest, int tile_rows,
                           int32_t* starts) {
  sum_counts(parts + 1, starts, [&](int64_t i) {
    const int64_t begin = index_at(offsets, i);
    if (i == 0 && begin != 0) __trap();
    const int64_t end = i == parts ? total : index_at(offsets, i + 1);
    if (end < begin || end > total || (i < parts && end - begin > longest)) __trap();
    return static_cast<uint64_t>(ceil_div(end - begin, tile_rows));
  });
}

__device__ void count_bad_slots(const CachedRows& cache, int64_t groups) {
  uint64_t bad = 0;
  for (int64_t g = threadIdx.x; g < groups; g += kPlanThreads) {
    const int64_t slot = index_at(cache.slots, g);
    bad += slot < 0 || slot >= cache.num_slots;
  }
  if (bad > 0 && cache.bad_slots == BadSlots::kTrap) __trap();
  __syncthreads();
  bad += sum_before(bad);
  if (threadIdx.x == kPlanThreads - 1) *cache.num_bad = static_cast<int64_t>(bad);
}

// The inverse of kv_index: a stable sort of the groups by the sequence that they read, digit by digit. A thread counts
// and then places a run of neighbours, so that groups which read the same stay in ascending order.
__device__ void sort_readers(const CrossAttnParams& p, const Plan& plan) {
  constexpr int kBits = 3, kDigits = 1 << kBits;
  __shared__ int32_t places[kDigits * kPlanThreads + 1];
  const Run run(p.groups);
  int passes = 1;
  while ((p.sequences - 1) >> (passes * kBits) > 0) ++passes;
  const int32_t* from = nullptr;  // the groups as they come
  for (int pass = 0; pass < passes; ++pass) {
    int32_t* to = (passes - pass) % 2 == 1 ? plan.readers : plan.sorting;
    const auto group_at = [&](int64_t i) { return from == nullptr ? static_cast<int32_t>(i) : from[i]; };
    const auto place_of = [&](int32_t group) -> int32_t& {
      return places[(index_at(p.kv_index, group) >> (pass * kBits)) % kDigits * kPlanThreads + threadIdx.x];
    };
    for (int digit = 0; digit < kDigits; ++digit) places[digit * kPlanThreads + threadIdx.x] = 0;
    for (int64_t i = run.first; i < run.last; ++i) ++place_of(group_at(i));
    __syncthreads();
    sum_counts(kDigits * kPlanThreads, places, [&](int64_t i) { return static_cast<uint64_t>(places[i]); });
    __syncthreads();
    for (int64_t i = run.first; i < run.last; ++i) to[place_of(group_at(i))++] = group_at(i);
    __syncthreads();
    from = to;
  }
}

__device__ void plan_readers(const CrossAttnParams& p, const Plan& plan) {
  for (int64_t i = threadIdx.x; i < p.sequences; i += kPlanThreads) plan.first_reader[i] = 0;
  __syncthreads();
  for (int64_t g = threadIdx.x; g < p.groups; g += kPlanThreads)
    atomicAdd(plan.first_reader + index_at(p.kv_index, g), 1);
  __syncthreads();
  sum_counts(p.sequences, plan.first_reader, [&](int64_t i) { return static_cast<uint64_t>(plan.first_reader[i]); });
  sort_readers(p, plan);
  sum_counts(p.groups, plan.reader_rows, [&](int64_t i) {
    const int64_t group = plan.readers[i];
    return static_cast<uint64_t>(index_at(p.q_offsets, group + 1) - index_at(p.q_offsets, group));
  });
  __syncthreads();
}

__device__ void plan_keys(const CrossAttnParams& p, const Plan& plan) {
  const ReaderRange readers(p, plan);
  const auto tiles_of = [&](int64_t i) { return static_cast<int64_t>(plan.key_tiles[i + 1]) - plan.key_tiles[i]; };
  const auto items_of = [&](int64_t i) {
    const int64_t tiles = tiles_of(i);
    return tiles == 0 || i == p.sequences ? tiles : tiles * chunks_of(readers.rows_of(i), tiles);
  };
  sum_counts(p.sequences + 1, plan.key_items, [&](int64_t i) { return static_cast<uint64_t>(items_of(i)); });
  __syncthreads();
  sum_counts(p.sequences, plan.partial_items, [&](int64_t i) {
    const int64_t items = items_of(i);
    return static_cast<uint64_t>(items > tiles_of(i) ? items : 0);
  });
}

__global__ void __launch_bounds__(kPlanThreads, 1)
    cross_attn_plan(const CrossAttnParams p, bool backward, int query_rows) {
  const Plan plan(p, backward);
  plan_tiles(p.q_offsets, p.groups, p.total_q, p.max_q_len, query_rows, plan.query_tiles);
  if (reads_cache(p)) return count_bad_slots(p.cache, p.groups);
  plan_tiles(p.kv_offsets, p.sequences, p.total_kv, p.max_kv_len, kTileRows, plan.key_tiles);
  if (p.kv_index.data != nullptr)
    for (int64_t g = threadIdx.x; g < p.groups; g += kPlanThreads) {
      const int64_t sequence = index_at(p.kv_index, g);
      if (sequence < 0 || sequence >= p.sequences) __trap();
    }
  if (!backward) return;
  __syncthreads();
  if (p.kv_index.data != nullptr && p.sequences > 0) plan_readers(p, plan);
  plan_keys(p, plan);
}

}  // namespace

size_t cross_attn_workspace_bytes(const CrossAttnParams& params, bool backward) {
  CrossAttnParams at_null = params;
  at_null.workspace = nullptr;
  return Plan(at_null, backward).bytes;
}

int launch_cross_attn_plan(const CrossAttnParams& params, bool backward, Stream stream) {
  check_counts(params);
  if (backward && params.total_q > INT32_MAX)
    throw std::invalid_argument("cross_attn kernels take at most 2^31 - 1 query rows in the backward");
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  cross_attn_plan<<<1, kPlanThreads, 0, on>>>(params, backward, backward ? kTileRows : cross_attn_forward_run(params));
  return cudaGetLastError();
}

}  // namespace vista::cuda
