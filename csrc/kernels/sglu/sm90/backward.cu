// The pass of ../backward.cu for compute capability 9.0: wgmma, operands by TMA.
//
// A block has 128 rows: two warpgroups of 64, whose rows of x and grad_out stay in shared memory, and a thread that
// brings the weights, kChunk hidden columns of up, gate and down^T at a time. The gradients of a chunk go from the
// accumulators of its three products into the operands of the next two, within registers, and by exchange between the
// four lanes that share a row to global memory, 16 bytes a lane. The products of a chunk with up and gate run on while
// the next chunk's first products are issued: a stage is released one step later, when they are known to be done. As
// many blocks as multiprocessors work through the rows, as in forward.cu.
#include "../../common/dispatch.cuh"
#include "../launch.cuh"
#include "../parts.h"
#include "tiles.cuh"

namespace vista::cuda::sm90 {
namespace {

template <class Element, int D>
struct BackwardShape {
  using T = Element;
  static constexpr int kRows = 2 * kOwnRows, kThreads = 384;
  static constexpr int kChunk = 32;  // hidden columns in a stage
  static constexpr int kStages = D == 256 ? 2 : 4;
  static constexpr int kPanels = D / kBoxColumns;
  static constexpr int kOwnTile = kPanels * kRowPanel;  // bytes, as all below
  static constexpr int kChunkPanel = kChunk * 128, kUpGate = 2 * kPanels * kChunkPanel;
  static constexpr int kStage = kUpGate + kPanels * kChunkPanel;  // up above gate in each panel, then down^T
  static constexpr int kSharedBytes = 4 * kOwnTile + kStages * kStage;
};

struct BackwardMaps {
  CUtensorMap x, grad_out, grad_x, up, gate, down_t;
};

// Each of the four lanes that share a row has word[i], two of the columns 8i to 8i + 7. Now lane i has them all.
__device__ inline uint4 gather_columns(const uint32_t (&word)[4]) {
  const bool odd = lane_id() % 2 != 0, upper = lane_id() % 4 / 2 != 0;
  // Between neighbours: word[1] of the even lane against word[0] of the odd one, and so word[3] against word[2].
  const uint32_t a = __shfl_xor_sync(0xffffffffu, odd ? word[0] : word[1], 1);
  const uint32_t b = __shfl_xor_sync(0xffffffffu, odd ? word[2] : word[3], 1);
  const uint32_t low[2] = {odd ? a : word[0], odd ? word[1] : a}, high[2] = {odd ? b : word[2], odd ? word[3] : b};
  // Between pairs: `high` of the lower pair against `low` of the upper one.
  const uint32_t c = __shfl_xor_sync(0xffffffffu, upper ? low[0] : high[0], 2);
  const uint32_t d = __shfl_xor_sync(0xffffffffu, upper ? low[1] : high[1], 2);
  return upper ? uint4{c, d, high[0], high[1]} : uint4{low[0], low[1], c, d};
}

// Where a lane stores 8 columns of a chunk, in the rows g and g + 8 of its warp.
struct Place {
  int64_t at;    // element of row g
  int lower;     // elements from there to row g + 8
  bool rows[2];  // which of the rows exist
  bool columns;  // whether the columns do
};

// A chunk of hidden columns of one of the results: 64 rows x 32, as the operand that it is.
template <class T>
__device__ inline void store_chunk(void* to, const Fragment* chunk, const Place& place) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 bits = gather_columns({chunk[0][half], chunk[0][2 + half], chunk[1][half], chunk[1][2 + half]});
    if (place.rows[half] && place.columns)
      write_vector(static_cast<T*>(to) + place.at + (half == 0 ? 0 : place.lower), bits);
  }
}

template <class Shape>
struct BackwardBarriers {
  Barrier rows[2];  // of each warpgroup
  Ring<Shape::kStages> weights;
};

template <class Shape>
__device__ void bring_weights(const BackwardMaps& maps, int tiles, int steps, uint8_t* weights,
                              BackwardBarriers<Shape>& here) {
  Turn<Shape::kStages> turn;
  for (int64_t i = 0; i < static_cast<int64_t>(tiles) * steps; ++i, turn.next()) {
    const int row = static_cast<int>(i % steps) * Shape::kChunk;
    uint8_t* stage = weights + turn.stage * Shape::kStage;
    here.weights.acquire(turn, Shape::kStage);
    Barrier& full = here.weights.full[turn.stage];
    for (int panel = 0; panel < Shape::kPanels; ++panel) {
      uint8_t* up = stage + 2 * panel * Shape::kChunkPanel;
      const int column = panel * kBoxColumns;
      load_tile(up, maps.up, row, column, full);
      load_tile(up + Shape::kChunkPanel, maps.gate, row, column, full);
      load_tile(stage + Shape::kUpGate + panel * Shape::kChunkPanel, maps.down_t, row, column, full);
    }
  }
}

// grad_x, from t, in the place of x: each element by the thread that needed it.
template <class T, int D>
__device__ inline void finish_rows(const Accumulator<D>& t, uint8_t* x, uint8_t* grad, int row,
                                   const float (&inverse)[2], const SgluParams& p) {
  const int first_column = lane_id() % 4 * 2;
  float factor[2] = {0.f, 0.f};
  if (p.norm) {
    float along[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 two = unpack2(*pair_at(x, row + 8 * half, 8 * j + first_column), T{});
        along[half] = fmaf(t[j][2 * half], two.x, fmaf(t[j][2 * half + 1], two.y, along[half]));
      }
    sum_lanes(along);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      factor[half] = inverse[half] * inverse[half] * along[half] / static_cast<float>(p.dim);
  }
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 result{t[j][2 * half], t[j][2 * half + 1]};
      uint32_t* place = pair_at(x, row + 8 * half, 8 * j + first_column);
      if (p.norm) {
        const float2 two = unpack2(*place, T{});
        result.x = fmaf(-factor[half], two.x, result.x);
        result.y = fmaf(-factor[half], two.y, result.y);
      }
      if (p.residual) {
        const float2 two = unpack2(*pair_at(grad, row + 8 * half, 8 * j + first_column), T{});
        result.x += two.x;
        result.y += two.y;
      }
      *place = pack2(result.x, result.y, T{});
    }
}

template <class T, int D>
__global__ void __launch_bounds__(BackwardShape<T, D>::kThreads, 1)
    sglu_backward(const __grid_constant__ BackwardMaps maps, const SgluParams p) {
  using Shape = BackwardShape<T, D>;
  constexpr int kChunk = Shape::kChunk;
  using Rows = Operand<Major::kK, kOwnRows>;
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ BackwardBarriers<Shape> here;
  uint8_t* weights = shared + 4 * Shape::kOwnTile;
  const int warpgroup = threadIdx.x / 128;
  const int tiles = own_tiles(p), steps = static_cast<int>((p.hidden + kChunk - 1) / kChunk);
  if (threadIdx.x == 0) {
    for (Barrier& rows : here.rows) rows.init(1);
    here.weights.init(2);
    publish_barriers();
  }
  __syncthreads();
  if (warpgroup == 2) {
    keep_registers<24>();
    if (threadIdx.x == 256) bring_weights<Shape>(maps, tiles, steps, weights, here);
    return;
  }

  claim_registers<240>();
  uint8_t *x = shared + warpgroup * 2 * Shape::kOwnTile, *grad = x + Shape::kOwnTile;
  const int row = threadIdx.x % 128 / 32 * 16 + lane_id() / 4;  // and row + 8
  const bool leads = threadIdx.x % 128 == 0;
  const auto bring_rows = [&](int tile) {
    here.rows[warpgroup].arrive_expecting(2 * Shape::kOwnTile);
    load_rows<D>(x, maps.x, own_begin(tile, warpgroup), here.rows[warpgroup]);
    load_rows<D>(grad, maps.grad_out, own_begin(tile, warpgroup), here.rows[warpgroup]);
  };
  if (leads) bring_rows(0);

  Accumulator<D> t;
  // Declared here: a definition while the products before are under way would make the compiler wait for those.
  Accumulator<2 * kChunk> both;  // u and v
  Accumulator<kChunk> g;         // grad_out down
  clear<2 * kChunk>(both);
  clear<kChunk>(g);
  Turn<Shape::kStages> turn;
  for (int tile = 0; tile < tiles; ++tile) {
    const int64_t first_row = own_begin(tile, warpgroup) + row;
    here.rows[warpgroup].wait(tile % 2);
    float inverse[2];
    inverse_roots<T, D>(inverse, x, row, p);
    clear<D>(t);
    for (int step = 0; step < steps; ++step) {
      const uint8_t* stage = weights + turn.stage * Shape::kStage;
      here.weights.full[turn.stage].wait(turn.parity);
      begin_products(both, g);
      multiply<T, D>(both, Rows(x), Operand<Major::kK, 2 * kChunk>(stage), false);
      multiply<T, D>(g, Rows(grad), Operand<Major::kK, kChunk>(stage + Shape::kUpGate), false);
      commit_products();
      wait_products<1>(t);  // the last chunk's
      if (step > 0 && leads) here.weights.empty[turn.before()].arrive();
      turn.next();
      wait_products<0>(both, g);

      Fragment gradients[4], hidden[2];  // of up and of gate: 64 of k, as they lie in the stage
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float of_up[2], of_gate[2], of_product[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int at = 2 * half + i;
            const float r = inverse[half], u = r * both[j][at], v = r * both[j + kChunk / 8][at],
                        of_hidden = r * g[j][at];
            of_up[i] = of_hidden * v;
            of_gate[i] = of_hidden * u;
            of_product[i] = u * v;
          }
          const int k = j / 2, place = j % 2 * 2 + half;
          gradients[k][place] = pack2(of_up[0], of_up[1], T{});
          gradients[2 + k][place] = pack2(of_gate[0], of_gate[1], T{});
          hidden[k][place] = pack2(of_product[0], of_product[1], T{});
        }
      // Before the product, which owns the fragments from then on; the other warpgroup keeps the tensor cores busy.
      const int column = step * kChunk + lane_id() % 4 * 8, hidden_width = static_cast<int>(p.hidden);
      const Place place{first_row * p.hidden + column,
                        8 * hidden_width,
                        {first_row < p.total, first_row + 8 < p.total},
                        column < hidden_width};
      store_chunk<T>(p.grad_up_rows, gradients, place);
      store_chunk<T>(p.grad_gate_rows, gradients + 2, place);
      store_chunk<T>(p.hidden_rows, hidden, place);
      begin_products(t);
      multiply<T>(t, gradients, Operand<Major::kMN, 2 * kChunk>(stage), true);
      commit_products();
    }
    wait_products<0>(t);

    if (leads) here.weights.empty[turn.before()].arrive();
    finish_rows<T, D>(t, x, grad, row, inverse, p);
    write_rows<D>(maps.grad_x, own_begin(tile, warpgroup), x, p, warpgroup);
    if (leads && tile + 1 < tiles) bring_rows(tile + 1);
  }
}

template <class T, int D>
int launch(const SgluParams& p, Stream stream) {
  using Shape = BackwardShape<T, D>;
  BackwardMaps maps;
  const auto rows = [&](CUtensorMap& map, const void* data) {
    return encode(map, {data, p.dtype, p.total, p.dim, p.dim}, kOwnRows);
  };
  const auto weights = [&](CUtensorMap& map, const void* data) {
    return encode(map, {data, p.dtype, p.hidden, p.dim, p.dim}, Shape::kChunk);
  };
  int multiprocessors = 0;
  for (cudaError_t error : {count_multiprocessors(multiprocessors), rows(maps.x, p.x), rows(maps.grad_out, p.grad_out),
                            rows(maps.grad_x, p.grad_x), weights(maps.up, p.up), weights(maps.gate, p.gate),
                            weights(maps.down_t, p.down_t), allow_shared(sglu_backward<T, D>, Shape::kSharedBytes)})
    if (error != cudaSuccess) return error;
  const int64_t tiles = (p.total + Shape::kRows - 1) / Shape::kRows;
  const unsigned blocks = static_cast<unsigned>(tiles < multiprocessors ? tiles : multiprocessors);
  sglu_backward<T, D><<<blocks, Shape::kThreads, Shape::kSharedBytes, static_cast<cudaStream_t>(stream)>>>(maps, p);
  return cudaGetLastError();
}

}  // namespace

int launch_sglu_backward(const SgluParams& params, Stream stream) {
  return dispatch(params, [&](auto math, auto dim) -> int {
    if (params.total == 0) return cudaSuccess;  // nothing that a tensor map could describe
    return launch<typename decltype(math)::T, decltype(dim)::value>(params, stream);
  });
}

}  // namespace vista::cuda::sm90
