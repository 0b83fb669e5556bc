// The pass of ../backward.cu for compute capability 9.0: wgmma, operands by TMA.
//
// A block has 128 rows: two warpgroups of 64, whose rows of x and grad_out stay in shared memory, and a thread that
// brings the weights, kChunk hidden columns of up, gate and down^T at a time. The gradients of a chunk go from the
// accumulators of its three products into the operands of the next two, within registers, and by exchange between the
// four lanes that share a row to global memory, 16 bytes a lane. The products of a chunk with up and gate run on while
// the next chunk's first products are issued: a stage is released one step later, when they are known to be done.
#include "../../common/dispatch.cuh"
#include "../../common/sm90/tensor_map.h"
#include "../../common/sm90/tma.cuh"
#include "../../common/sm90/wgmma.cuh"
#include "../launch.cuh"
#include "../parts.h"
#include "../rows.cuh"

namespace vista::cuda::sm90 {
namespace {

template <class Element, int D>
struct BackwardShape {
  using T = Element;
  static constexpr int kRows = 128, kOwnRows = 64;  // of a block, of a warpgroup
  static constexpr int kThreads = 384;
  static constexpr int kChunk = 32;  // hidden columns in a stage
  static constexpr int kStages = D == 256 ? 2 : 4;
  static constexpr int kPanels = D / kBoxColumns;
  static constexpr int kRowPanel = kOwnRows * 128, kRowTile = kPanels * kRowPanel;      // bytes
  static constexpr int kChunkPanel = kChunk * 128, kChunkTile = kPanels * kChunkPanel;  // bytes
  static constexpr int kStage = 3 * kChunkTile;                                         // up, gate, down^T
  static constexpr int kSharedBytes = 4 * kRowTile + kStages * kStage;
};

struct BackwardMaps {
  CUtensorMap x, grad_out, grad_x, up, gate, down_t;
};

// Two neighbours of a row of a swizzled tile.
template <class Shape>
__device__ inline uint32_t* pair_at(uint8_t* tile, int row, int column) {
  return reinterpret_cast<uint32_t*>(tile + column / kBoxColumns * Shape::kRowPanel +
                                     swizzled(row, column % kBoxColumns));
}

// 1 / root mean square of the rows `row` and `row` + 8 of a tile, by the four lanes that share them.
template <class Shape>
__device__ inline void inverse_roots(float (&inverse)[2], const uint8_t* tile, int row, const SgluParams& p) {
  using T = typename Shape::T;
  inverse[0] = inverse[1] = 1.f;
  if (!p.norm) return;
  constexpr int kVectors = Shape::kPanels * 2;  // of a lane
  float squares[2] = {0.f, 0.f};
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float x[8];  // of each panel two vectors: neighbouring lanes meet different banks
      const int vector = lane_id() % 4 * 2 + i % 2;
      unpack_vector<T>(load_vector(reinterpret_cast<const T*>(tile + i / 2 * Shape::kRowPanel +
                                                              swizzled(row + 8 * half, vector * 8))),
                       x);
#pragma unroll
      for (int j = 0; j < 8; ++j) squares[half] = fmaf(x[j], x[j], squares[half]);
    }
  sum_lanes(squares);
#pragma unroll
  for (int half = 0; half < 2; ++half) inverse[half] = rsqrtf(squares[half] / static_cast<float>(p.dim) + p.eps);
}

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
  int64_t at, lower;  // elements from the first row's to those of row g and of row g + 8
  bool rows[2];       // which of the rows exist
  int columns;        // how many of hidden are left
};

// A chunk of hidden columns of one of the results: 64 rows x 32, as the operand that it is.
template <class T>
__device__ inline void store_chunk(void* to, const Fragment (&chunk)[2], const Place& place) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 bits = gather_columns({chunk[0][half], chunk[0][2 + half], chunk[1][half], chunk[1][2 + half]});
    if (place.rows[half] && place.columns > 0)
      write_vector(static_cast<T*>(to) + place.at + (half == 0 ? 0 : place.lower), bits);
  }
}

template <class Shape>
__device__ void bring_operands(const BackwardMaps& maps, const SgluParams& p, int64_t begin, uint8_t* rows,
                               uint8_t* weights, Barrier& rows_here, Ring<Shape::kStages>& ring) {
  rows_here.arrive_expecting(4 * Shape::kRowTile);
  for (int part = 0; part < 4; ++part)
    for (int panel = 0; panel < Shape::kPanels; ++panel)
      load_tile(rows + part * Shape::kRowTile + panel * Shape::kRowPanel, part % 2 == 0 ? maps.x : maps.grad_out,
                static_cast<int>(begin) + part / 2 * Shape::kOwnRows, panel * kBoxColumns, rows_here);
  const int steps = static_cast<int>((p.hidden + Shape::kChunk - 1) / Shape::kChunk);
  Turn<Shape::kStages> turn;
  for (int step = 0; step < steps; ++step, turn.next()) {
    uint8_t* stage = weights + turn.stage * Shape::kStage;
    ring.acquire(turn, Shape::kStage);
    for (int panel = 0; panel < Shape::kPanels; ++panel) {
      uint8_t* at = stage + panel * Shape::kChunkPanel;
      const int row = step * Shape::kChunk, column = panel * kBoxColumns;
      load_tile(at, maps.up, row, column, ring.full[turn.stage]);
      load_tile(at + Shape::kChunkTile, maps.gate, row, column, ring.full[turn.stage]);
      load_tile(at + 2 * Shape::kChunkTile, maps.down_t, row, column, ring.full[turn.stage]);
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(BackwardShape<T, D>::kThreads, 1)
    sglu_backward(const __grid_constant__ BackwardMaps maps, const SgluParams p) {
  using Shape = BackwardShape<T, D>;
  constexpr int kChunk = Shape::kChunk;
  using Rows = Operand<Major::kK, Shape::kOwnRows>;
  using Columns = Operand<Major::kK, kChunk>;  // a chunk of weights, to multiply along dim
  using Depths = Operand<Major::kMN, kChunk>;  // the same, to multiply along hidden
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ Barrier rows_here;
  __shared__ Ring<Shape::kStages> ring;
  uint8_t* weights = shared + 4 * Shape::kRowTile;
  const int warpgroup = threadIdx.x / 128;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * Shape::kRows;
  if (threadIdx.x == 0) {
    rows_here.init(1);
    ring.init(2);
    publish_barriers();
  }
  __syncthreads();
  if (warpgroup == 2) {
    keep_registers<24>();
    if (threadIdx.x == 256) bring_operands<Shape>(maps, p, begin, shared, weights, rows_here, ring);
    return;
  }

  claim_registers<240>();
  uint8_t *x = shared + warpgroup * 2 * Shape::kRowTile, *grad = x + Shape::kRowTile;
  const int row = threadIdx.x % 128 / 32 * 16 + lane_id() / 4;  // and row + 8
  const int64_t own_begin = begin + warpgroup * Shape::kOwnRows;
  rows_here.wait(0);
  float inverse[2];
  inverse_roots<Shape>(inverse, x, row, p);

  Accumulator<D> t;
  clear<D>(t);
  // Declared here: a definition while the products before are under way would make the compiler wait for those.
  Accumulator<kChunk> u, v, g;
  clear<kChunk>(u);
  clear<kChunk>(v);
  clear<kChunk>(g);
  const int steps = static_cast<int>((p.hidden + kChunk - 1) / kChunk);
  Turn<Shape::kStages> turn;
  int before = 0;
  const int64_t own_place = own_begin + row;
  // It walks: its arithmetic within the loop would make the compiler wait for the products that are under way.
  Place place{own_place * p.hidden + lane_id() % 4 * 8,
              8 * p.hidden,
              {own_place < p.total, own_place + 8 < p.total},
              static_cast<int>(p.hidden) - lane_id() % 4 * 8};
  for (int step = 0; step < steps; ++step) {
    const uint8_t* stage = weights + turn.stage * Shape::kStage;
    ring.full[turn.stage].wait(turn.parity);
    begin_products(u, v, g);
    multiply<T, D>(u, Rows(x), Columns(stage), false);
    multiply<T, D>(v, Rows(x), Columns(stage + Shape::kChunkTile), false);
    multiply<T, D>(g, Rows(grad), Columns(stage + 2 * Shape::kChunkTile), false);
    commit_products();
    wait_products<1>(t);  // the last chunk's
    if (step > 0 && threadIdx.x % 128 == 0) ring.empty[before].arrive();
    before = turn.stage;
    turn.next();
    wait_products<0>(u, v, g);

    Fragment up_rows[2], gate_rows[2], hidden[2];
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float of_up[2], of_gate[2], of_product[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = 2 * half + i;
          const float r = inverse[half], of_u = r * u[j][at], of_v = r * v[j][at], of_hidden = r * g[j][at];
          of_up[i] = of_hidden * of_v;
          of_gate[i] = of_hidden * of_u;
          of_product[i] = of_u * of_v;
        }
        const int k = j / 2, place = j % 2 * 2 + half;
        up_rows[k][place] = pack2(of_up[0], of_up[1], T{});
        gate_rows[k][place] = pack2(of_gate[0], of_gate[1], T{});
        hidden[k][place] = pack2(of_product[0], of_product[1], T{});
      }
    begin_products(t);
    multiply<T>(t, up_rows, Depths(stage), true);
    multiply<T>(t, gate_rows, Depths(stage + Shape::kChunkTile), true);
    commit_products();
    store_chunk<T>(p.grad_up_rows, up_rows, place);
    store_chunk<T>(p.grad_gate_rows, gate_rows, place);
    store_chunk<T>(p.hidden_rows, hidden, place);
    place.at += kChunk;
    place.columns -= kChunk;
  }
  wait_products<0>(t);

  const int first_column = lane_id() % 4 * 2;
  float factor[2] = {0.f, 0.f};
  if (p.norm) {
    float along[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 two = unpack2(*pair_at<Shape>(x, row + 8 * half, 8 * j + first_column), T{});
        along[half] = fmaf(t[j][2 * half], two.x, fmaf(t[j][2 * half + 1], two.y, along[half]));
      }
    sum_lanes(along);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      factor[half] = inverse[half] * inverse[half] * along[half] / static_cast<float>(p.dim);
  }
  // The results take the place of x, each element by the thread that needed it.
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float result[2] = {t[j][2 * half], t[j][2 * half + 1]};
      uint32_t* place = pair_at<Shape>(x, row + 8 * half, 8 * j + first_column);
      if (p.norm) {
        const float2 two = unpack2(*place, T{});
        result[0] = fmaf(-factor[half], two.x, result[0]);
        result[1] = fmaf(-factor[half], two.y, result[1]);
      }
      if (p.residual) {
        const float2 two = unpack2(*pair_at<Shape>(grad, row + 8 * half, 8 * j + first_column), T{});
        result[0] += two.x;
        result[1] += two.y;
      }
      *place = pack2(result[0], result[1], T{});
    }
  publish_stores();
  sync_some(1 + warpgroup, 128);
  if (threadIdx.x % 128 == 0 && own_begin < p.total) {
    for (int panel = 0; panel < Shape::kPanels; ++panel)
      store_tile(maps.grad_x, static_cast<int>(own_begin), panel * kBoxColumns, x + panel * Shape::kRowPanel);
    commit_stores();
    wait_stores_read<0>();
  }
}

template <class T, int D>
int launch(const SgluParams& p, Stream stream) {
  using Shape = BackwardShape<T, D>;
  BackwardMaps maps;
  const auto describe = [&](CUtensorMap& map, const void* data, int64_t rows, int box_rows) {
    return encode(map, {data, p.dtype, rows, p.dim, p.dim}, box_rows);
  };
  for (cudaError_t error :
       {describe(maps.x, p.x, p.total, Shape::kOwnRows), describe(maps.grad_out, p.grad_out, p.total, Shape::kOwnRows),
        describe(maps.grad_x, p.grad_x, p.total, Shape::kOwnRows), describe(maps.up, p.up, p.hidden, Shape::kChunk),
        describe(maps.gate, p.gate, p.hidden, Shape::kChunk), describe(maps.down_t, p.down_t, p.hidden, Shape::kChunk)})
    if (error != cudaSuccess) return error;
  const cudaError_t error = allow_shared(sglu_backward<T, D>, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  const unsigned blocks = static_cast<unsigned>((p.total + Shape::kRows - 1) / Shape::kRows);
  sglu_backward<T, D><<<blocks, Shape::kThreads, Shape::kSharedBytes, static_cast<cudaStream_t>(stream)>>>(maps, p);
  return cudaGetLastError();
}

}  // namespace

int launch_sglu_backward(const SgluParams& p, Stream stream) {
  check_sglu(p);
  if (p.total == 0) return cudaSuccess;
  if (p.dtype == DType::kHalf) return p.dim <= 128 ? launch<Half, 128>(p, stream) : launch<Half, 256>(p, stream);
  return p.dim <= 128 ? launch<BFloat16, 128>(p, stream) : launch<BFloat16, 256>(p, stream);
}

}  // namespace vista::cuda::sm90
