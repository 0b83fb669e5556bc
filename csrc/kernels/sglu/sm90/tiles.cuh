// Rows of a warpgroup in shared memory as TMA lays them: 64 of them, in panels of 64 columns.
#pragma once

#include "../../common/sm90/row_norm.cuh"
#include "../../common/sm90/tensor_map.h"
#include "../../common/sm90/tma.cuh"
#include "../../common/sm90/wgmma.cuh"
#include "../rows.cuh"

namespace vista::cuda::sm90 {

constexpr int kOwnRows = 64;
constexpr int kRowPanel = kOwnRows * 128;  // bytes

// The tiles of 128 rows of a block, one after the other: the blocks take turns.
__device__ inline int own_tiles(const SgluParams& p) {
  const int64_t tiles = (p.total + 2 * kOwnRows - 1) / (2 * kOwnRows);
  return static_cast<int>((tiles - blockIdx.x + gridDim.x - 1) / gridDim.x);
}

// The first row of a warpgroup in the block's tile.
__device__ inline int64_t own_begin(int tile, int warpgroup) {
  return ((static_cast<int64_t>(tile) * gridDim.x + blockIdx.x) * 2 + warpgroup) * kOwnRows;
}

// Of a warpgroup, by one of its threads. `done` gets D * kOwnRows * 2 bytes.
template <int D>
__device__ inline void load_rows(uint8_t* rows, const CUtensorMap& map, int64_t begin, Barrier& done) {
  for (int column = 0; column < D; column += kBoxColumns)
    load_tile(rows + column / kBoxColumns * kRowPanel, map, static_cast<int>(begin), column, done);
}

// Two neighbours of a row.
__device__ inline uint32_t* pair_at(uint8_t* rows, int row, int column) {
  return reinterpret_cast<uint32_t*>(rows + column / kBoxColumns * kRowPanel + swizzled(row, column % kBoxColumns));
}

// 1 / root mean square of the rows `row` and `row` + 8, by the four lanes that share them; 1 without norm.
template <class T, int D>
__device__ inline void inverse_roots(float (&inverse)[2], const uint8_t* rows, int row, const SgluParams& p) {
  inverse[0] = inverse[1] = 1.f;
  if (!p.norm) return;
  float squares[2] = {0.f, 0.f};
#pragma unroll
  for (int panel = 0; panel < D / kBoxColumns; ++panel) add_squares<T>(squares, rows + panel * kRowPanel, row);
  inverse_roots(inverse, squares, p.dim, p.eps);
}

// What a warpgroup has made of its rows, to global memory. Rows and columns beyond the matrix are not written. When the
// warpgroup's first thread returns, the tile may be overwritten by a copy.
template <int D>
__device__ inline void write_rows(const CUtensorMap& map, int64_t begin, const uint8_t* rows, const SgluParams& p,
                                  int warpgroup) {
  publish_stores();
  sync_some(1 + warpgroup, 128);
  if (threadIdx.x % 128 != 0 || begin >= p.total) return;
  for (int column = 0; column < D; column += kBoxColumns)
    store_tile(map, static_cast<int>(begin), column, rows + column / kBoxColumns * kRowPanel);
  commit_stores();
  wait_stores_read<0>();
}

}  // namespace vista::cuda::sm90
