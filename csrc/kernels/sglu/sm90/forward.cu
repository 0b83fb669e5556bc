// The pass of ../forward.cu for compute capability 9.0: wgmma, operands by TMA.
//
// A block has 128 rows: two warpgroups of 64, whose rows of x stay in shared memory, and a thread that brings the
// weights through two rings: kChunk rows of up and as many of gate, one behind the other, so that one product gives u
// and v; and 64 columns of down. The product of u and v, in fp32 and with the norm's factor, becomes the operand of the
// second product within registers. That one runs on while the next chunk's first is issued, and is known to be done a
// step later. As many blocks as multiprocessors work through the rows: the weights of the next rows are on their way
// while results are written, and while one warpgroup waits for rows, the other computes.
#include "../../common/dispatch.cuh"
#include "../launch.cuh"
#include "../parts.h"
#include "tiles.cuh"

namespace vista::cuda::sm90 {
namespace {

template <class Element, int D>
struct ForwardShape {
  using T = Element;
  static constexpr int kRows = 2 * kOwnRows, kThreads = 384;
  // Hidden columns in a step. The narrower a product, the more shared memory it reads for what it computes; but the
  // sums of D = 256 leave no room for more.
  static constexpr int kChunk = D == 256 ? 32 : 64;
  static constexpr int kSteps = kBoxColumns / kChunk;  // that share a stage of down
  static constexpr int kPanels = D / kBoxColumns;
  static constexpr int kOwnTile = kPanels * kRowPanel;                                 // bytes, as all below
  static constexpr int kHalfPanel = kChunk * 128, kUpGate = 2 * kPanels * kHalfPanel;  // up above gate
  static constexpr int kDown = D * 128;
  static constexpr int kUpGateStages = 3, kDownStages = D == 256 ? 2 : 3;
  static constexpr int kSharedBytes = 2 * kOwnTile + kUpGateStages * kUpGate + kDownStages * kDown;
};

struct ForwardMaps {
  CUtensorMap x, out, up, gate, down;
};

template <class Shape>
struct ForwardBarriers {
  Barrier rows[2];  // of each warpgroup
  Ring<Shape::kUpGateStages> up_gate;
  Ring<Shape::kDownStages> down;
};

template <class Shape>
__device__ void bring_weights(const ForwardMaps& maps, int tiles, int steps, uint8_t* up_gates, uint8_t* downs,
                              ForwardBarriers<Shape>& here) {
  Turn<Shape::kUpGateStages> first;
  Turn<Shape::kDownStages> second;
  for (int64_t i = 0; i < static_cast<int64_t>(tiles) * steps; ++i, first.next()) {
    const int step = static_cast<int>(i % steps), begin_hidden = step * Shape::kChunk;
    here.up_gate.acquire(first, Shape::kUpGate);
    uint8_t* up_gate = up_gates + first.stage * Shape::kUpGate;
    for (int panel = 0; panel < Shape::kPanels; ++panel) {
      uint8_t* at = up_gate + 2 * panel * Shape::kHalfPanel;
      load_tile(at, maps.up, begin_hidden, panel * kBoxColumns, here.up_gate.full[first.stage]);
      load_tile(at + Shape::kHalfPanel, maps.gate, begin_hidden, panel * kBoxColumns, here.up_gate.full[first.stage]);
    }
    if (step % Shape::kSteps != 0) continue;
    here.down.acquire(second, Shape::kDown);
    load_tile(downs + second.stage * Shape::kDown, maps.down, 0, begin_hidden, here.down.full[second.stage]);
    second.next();
  }
}

template <class T, int D>
__global__ void __launch_bounds__(ForwardShape<T, D>::kThreads, 1)
    sglu_forward(const __grid_constant__ ForwardMaps maps, const SgluParams p) {
  using Shape = ForwardShape<T, D>;
  constexpr int kChunk = Shape::kChunk;
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ ForwardBarriers<Shape> here;
  uint8_t *up_gates = shared + 2 * Shape::kOwnTile, *downs = up_gates + Shape::kUpGateStages * Shape::kUpGate;
  const int warpgroup = threadIdx.x / 128;
  const int tiles = own_tiles(p);
  const int steps = static_cast<int>((p.hidden + kChunk - 1) / kChunk);
  if (threadIdx.x == 0) {
    for (Barrier& rows : here.rows) rows.init(1);
    here.up_gate.init(2);
    here.down.init(2);
    publish_barriers();
  }
  __syncthreads();
  if (warpgroup == 2) {
    keep_registers<40>();
    if (threadIdx.x == 256) bring_weights<Shape>(maps, tiles, steps, up_gates, downs, here);
    return;
  }

  claim_registers<232>();
  uint8_t* x = shared + warpgroup * Shape::kOwnTile;
  const int row = threadIdx.x % 128 / 32 * 16 + lane_id() / 4;  // and row + 8
  const bool leads = threadIdx.x % 128 == 0;
  const auto bring_rows = [&](int tile) {
    here.rows[warpgroup].arrive_expecting(Shape::kOwnTile);
    load_rows<D>(x, maps.x, own_begin(tile, warpgroup), here.rows[warpgroup]);
  };
  if (leads) bring_rows(0);

  Accumulator<D> out;
  Accumulator<2 * kChunk> both;  // u and v
  clear<2 * kChunk>(both);
  Turn<Shape::kUpGateStages> first;
  Turn<Shape::kDownStages> second;
  for (int tile = 0; tile < tiles; ++tile) {
    here.rows[warpgroup].wait(tile % 2);
    float factor[2];
    inverse_roots<T, D>(factor, x, row, p);
    factor[0] *= factor[0];
    factor[1] *= factor[1];
    clear<D>(out);
    for (int step = 0; step < steps; ++step) {
      here.up_gate.full[first.stage].wait(first.parity);
      begin_products(both);
      multiply<T, D>(both, Operand<Major::kK, kOwnRows>(x),
                     Operand<Major::kK, 2 * kChunk>(up_gates + first.stage * Shape::kUpGate), false);
      commit_products();
      wait_products<1>(out);  // of the last step
      const int part = step % Shape::kSteps;
      if (part == 0 && step > 0) {
        if (leads) here.down.empty[second.stage].arrive();
        second.next();
      }
      wait_products<0>(both);
      if (leads) here.up_gate.empty[first.stage].arrive();
      first.next();

      Fragment product[kChunk / 16];
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float *u = both[j] + 2 * half, *v = both[j + kChunk / 8] + 2 * half;
          product[j / 2][j % 2 * 2 + half] = pack2(factor[half] * u[0] * v[0], factor[half] * u[1] * v[1], T{});
        }
      if (part == 0) here.down.full[second.stage].wait(second.parity);
      begin_products(out);
      multiply<T>(out, product, Operand<Major::kK, D>(downs + second.stage * Shape::kDown + part * kChunk * 2), true);
      commit_products();
    }
    wait_products<0>(out);
    if (leads) here.down.empty[second.stage].arrive();
    second.next();

    // The results take the place of x, each element by the thread that needed it.
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t* place = pair_at(x, row + 8 * half, 8 * j + lane_id() % 4 * 2);
        float2 result{out[j][2 * half], out[j][2 * half + 1]};
        if (p.residual) {
          const float2 two = unpack2(*place, T{});
          result.x += two.x;
          result.y += two.y;
        }
        *place = pack2(result.x, result.y, T{});
      }
    write_rows<D>(maps.out, own_begin(tile, warpgroup), x, p, warpgroup);
    if (leads && tile + 1 < tiles) bring_rows(tile + 1);
  }
}

template <class T, int D>
int launch(const SgluParams& p, Stream stream) {
  using Shape = ForwardShape<T, D>;
  ForwardMaps maps;
  const auto rows = [&](CUtensorMap& map, const void* data) {
    return encode(map, {data, p.dtype, p.total, p.dim, p.dim}, kOwnRows);
  };
  const auto weights = [&](CUtensorMap& map, const void* data) {
    return encode(map, {data, p.dtype, p.hidden, p.dim, p.dim}, Shape::kChunk);
  };
  int multiprocessors = 0;
  for (cudaError_t error :
       {count_multiprocessors(multiprocessors), rows(maps.x, p.x), rows(maps.out, p.out), weights(maps.up, p.up),
        weights(maps.gate, p.gate), encode(maps.down, {p.down, p.dtype, p.dim, p.hidden, p.hidden}, D),
        allow_shared(sglu_forward<T, D>, Shape::kSharedBytes)})
    if (error != cudaSuccess) return error;
  const int64_t tiles = (p.total + Shape::kRows - 1) / Shape::kRows;
  const unsigned blocks = static_cast<unsigned>(tiles < multiprocessors ? tiles : multiprocessors);
  sglu_forward<T, D><<<blocks, Shape::kThreads, Shape::kSharedBytes, static_cast<cudaStream_t>(stream)>>>(maps, p);
  return cudaGetLastError();
}

}  // namespace

int launch_sglu(const SgluParams& params, Stream stream) {
  return dispatch(params, [&](auto math, auto dim) -> int {
    if (params.total == 0) return cudaSuccess;  // nothing that a tensor map could describe
    return launch<typename decltype(math)::T, decltype(dim)::value>(params, stream);
  });
}

}  // namespace vista::cuda::sm90
