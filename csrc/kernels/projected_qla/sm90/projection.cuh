// Products of a chunk's rows with weights that stay in shared memory, for compute capability 9.0.
//
// A block is two warpgroups with 128 columns each and a thread that brings x: panels of 64 rows and 64 columns through
// a ring, which both multiply by their own weights. A panel may hold rows of the next sequence: whoever uses a row asks
// whether it exists. The sums of squares are taken from the panels while the product runs.
#pragma once

#include "../../common/sm90/row_norm.cuh"
#include "../../common/sm90/tensor_map.h"
#include "../../common/sm90/tma.cuh"
#include "../../common/sm90/wgmma.cuh"
#include "../launch.cuh"

namespace vista::cuda::sm90 {

constexpr int kConsumers = 2;                     // warpgroups
constexpr int kThreads = (kConsumers + 1) * 128;  // and the producer's
constexpr int kOwnColumns = 128;                  // of a warpgroup
constexpr int kPanel = kTileRows * 128;           // bytes of a panel of x
constexpr int kWeightPanel = kOwnColumns * 128;   // of a warpgroup's weights
constexpr int kConsumerThreads = kConsumers * 128;

template <int kStages>
struct Barriers {
  Barrier weights;
  Ring<kStages> ring;

  // By all threads. Every warp of the consumers releases a stage, which its own threads have read.
  __device__ void init() {
    if (threadIdx.x == 0) {
      weights.init(1);
      ring.init(kConsumers * 4);
      publish_barriers();
    }
    __syncthreads();
  }
};

// By the producer: the panels of a tile.
template <int kStages>
__device__ inline void bring_tile(const CUtensorMap& x, int row, int panels, uint8_t* stages, Barriers<kStages>& here,
                                  Turn<kStages>& turn) {
  for (int panel = 0; panel < panels; ++panel, turn.next()) {
    here.ring.acquire(turn, kPanel);
    load_tile(stages + turn.stage * kPanel, x, row, panel * kBoxColumns, here.ring.full[turn.stage]);
  }
}

// By the producer: the tiles of a chunk.
template <int kStages>
__device__ inline void bring_rows(const CUtensorMap& x, const Work& w, int panels, uint8_t* stages,
                                  Barriers<kStages>& here) {
  Turn<kStages> turn;
  for (int row = 0; row < w.rows; row += kTileRows)
    bring_tile(x, static_cast<int>(w.begin) + row, panels, stages, here, turn);
}

// A consumer's side of it, with kColumns of its own.
template <class T, int kStages, int kColumns>
struct Consumer {
  const ProjectedQlaParams& p;
  Barriers<kStages>& here;
  const uint8_t *stages, *weights;  // those of this warpgroup
  int panels;
  int row = threadIdx.x % 128 / 32 * 16 + lane_id() / 4;  // of a tile, and row + 8, are this thread's
  Turn<kStages> turn;

  // acc <- the next tile's rows times the weights; factors <- what the norm multiplies this thread's rows by.
  // Whatever products were under way before are done too.
  __device__ void multiply_tile(Accumulator<kColumns>& acc, float (&factors)[2]) {
    float squares[2] = {0.f, 0.f};
    pin(acc);
    int last = 0;
#pragma unroll 1
    for (int panel = 0; panel < panels; ++panel, turn.next()) {
      here.ring.full[turn.stage].wait(turn.parity);
      const uint8_t* rows = stages + turn.stage * kPanel;
      begin_products();
      multiply<T, kBoxColumns>(acc, Operand<Major::kK, kTileRows>(rows),
                               Operand<Major::kK, kColumns>(weights + panel * kColumns * 128), panel > 0);
      commit_products();
      if (p.normalise) add_squares<T>(squares, rows, row);
      if (panel > 0) {
        wait_products<1>();
        release(last);
      }
      last = turn.stage;
    }
    wait_products<0>(acc);
    release(last);
    factors[0] = factors[1] = 1.f;
    if (p.normalise) inverse_roots(factors, squares, p.dim, p.norm_eps);
  }

 private:
  __device__ void release(int stage) {
    __syncwarp();
    if (lane_id() == 0) here.ring.empty[stage].arrive();
  }
};

// Two neighbours of a row in panels of 64 columns.
template <class T>
__device__ inline void put_pair(uint8_t* panel, int row, int column, float x, float y) {
  *reinterpret_cast<uint32_t*>(panel + swizzled(row, column)) = pack2(x, y, T{});
}

__host__ __device__ inline int panels_of(const ProjectedQlaParams& p) {
  return static_cast<int>(ceil_div(p.dim, kBoxColumns));
}

// Where a block of kHeads heads for each consumer is. False for a block beyond the work.
template <int kHeads>
__device__ inline bool find_heads(const QlaParams& p, Work& w) {
  const int64_t groups = ceil_div(p.heads, kConsumers * kHeads);
  w.head = static_cast<int>(blockIdx.x % groups) * kConsumers * kHeads;
  return find_item(p, static_cast<int32_t>(blockIdx.x / groups), w);
}

// x, and the two weights of the state and its backward: 64 columns of keys above 64 of values for each consumer.
struct KeyValueMaps {
  CUtensorMap x, weight_k, weight_v;
};

// By the producer: the rows of both weights from `row` on.
template <int kStages>
__device__ void bring_keys_and_values(const KeyValueMaps& maps, int row, int panels, uint8_t* weights,
                                      Barriers<kStages>& here) {
  here.weights.arrive_expecting(kConsumers * panels * kWeightPanel);
  for (int panel = 0; panel < kConsumers * panels; ++panel) {
    uint8_t* to = weights + panel * kWeightPanel;
    const int own = row + panel / panels * 64, column = panel % panels * kBoxColumns;
    load_tile(to, maps.weight_k, own, column, here.weights);
    load_tile(to + 64 * 128, maps.weight_v, own, column, here.weights);
  }
}

inline cudaError_t encode_rows(CUtensorMap& map, const ProjectedQlaParams& p) {
  return encode(map, {p.x, p.qla.dtype, p.qla.total, p.dim, p.dim}, kTileRows);
}

inline cudaError_t encode_weight(CUtensorMap& map, const ProjectedQlaParams& p, const void* weight, int box_rows) {
  return encode(map, {weight, p.qla.dtype, p.qla.heads * p.qla.d, p.dim, p.dim}, box_rows);
}

// `fixed_bytes` of shared memory beside the weights, blocks of kHeads heads for each consumer.
template <int kHeads, class Maps>
int launch_blocks(void (*kernel)(Maps, ProjectedQlaParams), const Maps& maps, int fixed_bytes,
                  const ProjectedQlaParams& p, Stream stream, int weight_panel = kWeightPanel) {
  const int64_t blocks = most_items(p.qla) * ceil_div(p.qla.heads, kConsumers * kHeads);
  check_blocks(p, blocks);
  const int bytes = fixed_bytes + kConsumers * panels_of(p) * weight_panel;
  const cudaError_t error = allow_shared(kernel, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(maps, p);
  return cudaGetLastError();
}

template <int kHeads>
int launch_keys_and_values(void (*kernel)(KeyValueMaps, ProjectedQlaParams), int fixed_bytes,
                           const ProjectedQlaParams& p, Stream stream) {
  KeyValueMaps maps;
  for (cudaError_t error : {encode_rows(maps.x, p), encode_weight(maps.weight_k, p, p.weight_k, 64),
                            encode_weight(maps.weight_v, p, p.weight_v, 64)})
    if (error != cudaSuccess) return error;
  return launch_blocks<kHeads>(kernel, maps, fixed_bytes, p, stream);
}

// Calls launch(Element{}, Dim<head dim>{}).
template <class Launch>
int dispatch_sm90(const ProjectedQlaParams& p, Launch launch) {
  const auto with_dim = [&](auto element) {
    return p.qla.d == 32 ? launch(element, Dim<32>{}) : launch(element, Dim<64>{});
  };
  return p.qla.dtype == DType::kHalf ? with_dim(Half{}) : with_dim(BFloat16{});
}

}  // namespace vista::cuda::sm90
