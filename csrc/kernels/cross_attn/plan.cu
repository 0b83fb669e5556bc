// Offsets and kv_index -> plan (plan.cuh). One block for the tiles: a batch is small beside its rows. The inverse of
// kv_index is a counting sort: counts by integer atomics, whose order does not matter, then one warp a sequence that
// looks for its readers among all groups. That is sequences * groups / 32 steps, little until both are about 10^5.
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
  if (run.first < n && run.last == n) sums[n] = static_cast<int32_t>(before);
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

__global__ void __launch_bounds__(kPlanThreads, 1)
    cross_attn_plan(const CrossAttnParams p, bool backward, int query_rows) {
  const Plan plan(p, backward);
  plan_tiles(p.q_offsets, p.groups, p.total_q, p.max_q_len, query_rows, plan.query_tiles);
  if (p.cache.k_rows != nullptr) return count_bad_slots(p.cache, p.groups);
  plan_tiles(p.kv_offsets, p.sequences, p.total_kv, p.max_kv_len, kTileRows, plan.key_tiles);
  if (p.kv_index.data == nullptr) return;
  if (backward)
    for (int64_t i = threadIdx.x; i < p.sequences; i += kPlanThreads) plan.first_reader[i] = 0;
  __syncthreads();
  for (int64_t g = threadIdx.x; g < p.groups; g += kPlanThreads) {
    const int64_t sequence = index_at(p.kv_index, g);
    if (sequence < 0 || sequence >= p.sequences) __trap();
    if (backward) atomicAdd(plan.first_reader + sequence, 1);
  }
  if (!backward || p.sequences == 0) return;
  __syncthreads();
  sum_counts(p.sequences, plan.first_reader, [&](int64_t i) { return static_cast<uint64_t>(plan.first_reader[i]); });
}

constexpr int kReaderThreads = 256;

__global__ void __launch_bounds__(kReaderThreads) cross_attn_readers(const CrossAttnParams p) {
  const Plan plan(p, true);
  const int64_t sequence = static_cast<int64_t>(blockIdx.x) * (kReaderThreads / 32) + threadIdx.x / 32;
  if (sequence >= p.sequences) return;
  const int lane = threadIdx.x % 32;
  int32_t at = plan.first_reader[sequence];
  const int32_t end = plan.first_reader[sequence + 1];
  for (int64_t base = 0; base < p.groups && at < end; base += 32) {
    const int64_t group = base + lane;
    const bool reads = group < p.groups && index_at(p.kv_index, group) == sequence;
    const unsigned found = __ballot_sync(0xffffffffu, reads);
    if (reads) plan.readers[at + __popc(found & ((1u << lane) - 1))] = static_cast<int32_t>(group);
    at += __popc(found);
  }
}

}  // namespace

size_t cross_attn_workspace_bytes(const CrossAttnParams& params, bool backward) {
  CrossAttnParams at_null = params;
  at_null.workspace = nullptr;
  return Plan(at_null, backward).bytes;
}

int launch_cross_attn_plan(const CrossAttnParams& params, bool backward, Stream stream) {
  check_counts(params);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  cross_attn_plan<<<1, kPlanThreads, 0, on>>>(params, backward, backward ? kTileRows : cross_attn_forward_run(params));
  if (backward && params.kv_index.data != nullptr && params.sequences > 0)
    cross_attn_readers<<<static_cast<unsigned>(ceil_div(params.sequences, kReaderThreads / 32)), kReaderThreads, 0,
                         on>>>(params);
  return cudaGetLastError();
}

}  // namespace vista::cuda
