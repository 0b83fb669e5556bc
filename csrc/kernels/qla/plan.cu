// Offsets -> plan (plan.cuh). One block: a batch is small beside its rows. Two passes over a thread's own run of
// sequences with a scan over the threads between them; 8 bytes a sequence read twice and written once.
#include "plan.cuh"

namespace vista::cuda {
namespace {

struct Counts {
  int64_t items, slots;
};

__device__ Counts counts_of(const QlaParams& p, int64_t sequence) {
  const int64_t begin = index_at(p.seq_offsets, sequence);
  if (sequence == 0 && begin != 0) __trap();
  if (sequence == p.batch) return {ceil_div(p.total - begin, p.chunk_rows), 0};
  const int64_t end = index_at(p.seq_offsets, sequence + 1);
  const int64_t targets = targets_of(p, sequence);
  if (end < begin || end > p.total || end - begin > p.max_seq_len || targets < 0 || targets > end - begin) __trap();
  const int64_t chunks = ceil_div(end - begin, p.chunk_rows);
  return {chunks > 1 ? chunks : 1, chunks > 1 ? chunks : 0};
}

__global__ void __launch_bounds__(kPlanThreads, 1) qla_plan(const QlaParams p) {
  const int64_t n = p.batch + 1;
  const int64_t each = ceil_div(n, kPlanThreads);
  const int64_t first = threadIdx.x * each;
  const int64_t last = first + each < n ? first + each : n;
  uint64_t own = 0;  // both counts: they fit 32 bits, the host has checked their bound
  for (int64_t i = first; i < last; ++i) {
    const Counts counts = counts_of(p, i);
    own += static_cast<uint64_t>(counts.slots) << 32 | static_cast<uint64_t>(counts.items);
  }
  uint64_t before = sum_before(own);
  Start* starts = plan_of(p);
  for (int64_t i = first; i < last; ++i) {
    starts[i] = {static_cast<int32_t>(before), static_cast<int32_t>(before >> 32)};
    const Counts counts = counts_of(p, i);
    before += static_cast<uint64_t>(counts.slots) << 32 | static_cast<uint64_t>(counts.items);
  }
  if (first < n && last == n) starts[n] = {static_cast<int32_t>(before), static_cast<int32_t>(before >> 32)};
}

}  // namespace

size_t qla_workspace_bytes(const QlaParams& params, bool sums_rows) {
  if (params.chunk_rows < 1 || params.chunk_rows > 1 << 30)
    throw std::invalid_argument("qla: chunk_rows must be in [1, 2^30], found " + std::to_string(params.chunk_rows));
  const int64_t matrix = params.heads * params.d * params.e;
  return plan_bytes(params) + (sums_rows ? most_slots(params) * matrix * sizeof(float) : 0);
}

int launch_qla_plan(const QlaParams& params, Stream stream) {
  if (params.batch + params.total == 0) return cudaSuccess;
  qla_plan<<<1, kPlanThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  return cudaGetLastError();
}

}  // namespace vista::cuda
