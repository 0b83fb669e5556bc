// Products of a chunk's rows with weights that stay in shared memory.
//
// x comes in slabs of 64 rows and 64 columns through a ring, whatever its width; the weights lie there as slabs of 64
// columns too. A row of a slab is 128 bytes, whose 16-byte vectors are permuted by the row's number: eight rows of one
// vector are in different banks, and nothing is spent on padding. The sum of a row's squares is taken from the slabs as
// they pass, so that the norm costs no pass of its own; its factor is applied to the fp32 product.
#pragma once

#include "../qla/matrix.cuh"
#include "vista/cuda/projected_qla.h"

namespace vista::cuda {

constexpr int kSlab = 64;      // columns
constexpr int kTileRows = 64;  // rows of x that a block works on
constexpr int kRing = 3;
constexpr int kRingBytes = kRing * kTileRows * kSlab * 2;
constexpr int kFactorBytes = kTileRows * 4;

// A vector of a slab, in elements of 16 bits.
__device__ inline int slab_offset(int row, int vector) { return row * kSlab + (vector ^ row % 8) * 8; }

// Slab `slab` of kRows rows out of `base`; zeros where row_of(row) is negative and beyond the columns. 8 threads take a
// row.
template <class T, int kRows, int kThreads, class RowOf>
__device__ inline void copy_slab(T* shared, const T* base, int slab, int64_t columns, RowOf row_of) {
  const int vector = threadIdx.x % 8;
  const int64_t column = slab * kSlab + vector * 8;
#pragma unroll 4
  for (int row = threadIdx.x / 8; row < kRows; row += kThreads / 8) {
    const int64_t from = row_of(row);
    const bool valid = from >= 0 && column < columns;
    copy_async(shared + slab_offset(row, vector), valid ? base + from * columns + column : base, valid);
  }
}

// A warp's tiles of 16 rows of a product.
template <int kTall, int kWide>
using Tall = Accumulator<kWide>[kTall];

// acc += A B^T over a slab: A [16 * kTall][64], B [kWide][64], both from a row that is a multiple of 8.
template <class T, int kTall, int kWide>
__device__ inline void multiply_slab(Tall<kTall, kWide>& acc, const T* a, const T* b) {
  const int lane = lane_id(), permuted = lane % 8 * 16;
  const uint32_t from_a = shared_address(a + lane % 16 * kSlab) + (lane / 16 * 16 ^ permuted);
  const uint32_t from_b = shared_address(b + (lane % 8 + lane / 16 * 8) * kSlab) + (lane / 8 % 2 * 16 ^ permuted);
  constexpr int kSixteenRows = 16 * kSlab * sizeof(T);
#pragma unroll
  for (int k = 0; k < kSlab / 16; ++k) {
    uint32_t left[kTall][4];
#pragma unroll
    for (int i = 0; i < kTall; ++i) load_matrices(left[i], (from_a ^ 32 * k) + i * kSixteenRows);
#pragma unroll
    for (int n = 0; n < kWide / 16; ++n) {
      uint32_t right[4];
      load_matrices(right, (from_b ^ 32 * k) + n * kSixteenRows);
#pragma unroll
      for (int i = 0; i < kTall; ++i) {
        mma(acc[i][2 * n], left[i], right[0], right[1], T{});
        mma(acc[i][2 * n + 1], left[i], right[2], right[3], T{});
      }
    }
  }
}

// The tiles of a chunk times weights of kColumns columns. A warp owns 16 * kTall rows of a tile and kWide columns.
template <class T_, int kColumns, int kTall_, int kWide_>
struct Projection {
  using T = T_;
  static constexpr int kTall = kTall_, kWide = kWide_;
  static constexpr int kAcross = kColumns / kWide, kDown = kTileRows / (16 * kTall);
  static constexpr int kThreads = kAcross * kDown * 32;
  static constexpr int kPerRow = kThreads / kTileRows;  // threads that sum up the squares of a row

  const T* x;  // the chunk's first row
  int64_t dim;
  int rows, slabs, tiles;
  bool normalise;
  float eps;
  float* factors;  // [64] what the norm multiplies each row of the tile by
  T *ring, *weights;
  int own_row, own_column;  // of the warp
  // Where in its chunk the next slab to copy is, and the place in the ring that is read next.
  int next_tile = 0, next_slab = 0, next_stage = 0, stage = 0;

  // `shared`: kFactorBytes, the ring, `between` bytes of somebody else's, the weights.
  __device__ Projection(const ProjectedQlaParams& p, const Work& w, unsigned char* shared, int between)
      : x(static_cast<const T*>(p.x) + w.begin * p.dim),
        dim(p.dim),
        rows(w.rows),
        slabs(static_cast<int>(ceil_div(p.dim, kSlab))),
        tiles(static_cast<int>(ceil_div(w.rows, kTileRows))),
        normalise(p.normalise),
        eps(p.norm_eps),
        factors(reinterpret_cast<float*>(shared)),
        ring(reinterpret_cast<T*>(shared + kFactorBytes)),
        weights(reinterpret_cast<T*>(shared + kFactorBytes + kRingBytes + between)) {
    const int warp = threadIdx.x / 32;
    own_row = warp / kAcross * 16 * kTall;
    own_column = warp % kAcross * kWide;
  }

  // Begins to copy kCount of the weights' columns, to `first` and what follows: row row_of(c) of `weight`, or zeros
  // where that is negative.
  template <int kCount, class RowOf>
  __device__ void copy_weights(int first, const void* weight, RowOf row_of) {
    for (int slab = 0; slab < slabs; ++slab)
      copy_slab<T, kCount, kThreads>(weights + (slab * kColumns + first) * kSlab, static_cast<const T*>(weight), slab,
                                     dim, row_of);
  }

  // Begins to copy the first slabs; what was begun before arrives with the first.
  __device__ void start() {
    if (!normalise && threadIdx.x < kTileRows) factors[threadIdx.x] = 1.f;
    for (int i = 0; i < kRing - 1; ++i) copy_next();
  }

  // acc <- the rows of `tile`, which must be the next one, times the weights, but not yet times the factors, which are
  // there for all as it returns. also(): copies to go with those of the tile's first slab. They have arrived as the
  // next call returns.
  template <class Also>
  __device__ void multiply(int tile, Tall<kTall, kWide>& acc, Also also) {
#pragma unroll
    for (int i = 0; i < kTall; ++i) clear<kWide>(acc[i]);
    float squares = 0.f;
#pragma unroll 1
    for (int slab = 0; slab < slabs; ++slab) {
      // One slab a tile: what goes with the next tile would be allowed to arrive a slab too late.
      if (slabs == 1)
        wait_copies<0>();
      else
        wait_copies<kRing - 2>();
      __syncthreads();  // the slab is there for all, and nobody reads the place before it any more
      if (slab == 0) also();
      copy_next();
      const T* a = ring + stage * kTileRows * kSlab;
      multiply_slab<T, kTall, kWide>(acc, a + own_row * kSlab, weights + (slab * kColumns + own_column) * kSlab);
      if (normalise) squares += sum_of_squares(a);
      stage = stage == kRing - 1 ? 0 : stage + 1;
    }
    if (normalise) publish(tile, squares);
    __syncthreads();
  }

 private:
  __device__ void copy_next() {
    if (next_tile < tiles) {
      const int first = next_tile * kTileRows;
      copy_slab<T, kTileRows, kThreads>(ring + next_stage * kTileRows * kSlab, x, next_slab, dim,
                                        [&](int row) { return first + row < rows ? first + row : -1; });
      next_stage = next_stage == kRing - 1 ? 0 : next_stage + 1;
      if (++next_slab == slabs) next_slab = 0, ++next_tile;
    }
    commit_copies();
  }

  // This thread's share of its row's squares.
  __device__ float sum_of_squares(const T* slab) const {
    const int row = threadIdx.x / kPerRow;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 8 / kPerRow; ++i) {
      float values[8];
      unpack_vector<T>(load_vector(slab + slab_offset(row, threadIdx.x % kPerRow * (8 / kPerRow) + i)), values);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum = fmaf(values[j], values[j], sum);
    }
    return sum;
  }

  // A row behind the last one has a factor too, of zero, for its zeros must stay zeros without an epsilon.
  __device__ void publish(int tile, float squares) {
#pragma unroll
    for (int step = 1; step < kPerRow; step *= 2) squares += __shfl_xor_sync(0xffffffffu, squares, step);
    if (threadIdx.x % kPerRow != 0) return;
    const int row = threadIdx.x / kPerRow;
    const bool exists = tile * kTileRows + row < rows;
    factors[row] = exists ? rsqrtf(squares / static_cast<float>(dim) + eps) : 0.f;
  }
};

// A product, row by row times its factor, through phi into operands of 16 x 16 of T: an accumulator's layout is theirs.
template <int kTall, int kWide>
using TallFragments = Fragments<kWide>[kTall];

template <class T, int kTall, int kWide>
__device__ inline void activate_product(TallFragments<kTall, kWide>& to, const Tall<kTall, kWide>& acc,
                                        const float* factors, Activation kind) {
  with_activation(kind, [&](auto phi) {
#pragma unroll
    for (int i = 0; i < kTall; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = factors[16 * i + 8 * half + lane_id() / 4];
#pragma unroll
        for (int j = 0; j < kWide / 8; ++j)
          to[i][j / 2][j % 2 * 2 + half] = pack2(phi.template value<T>(factor * acc[i][j][2 * half]),
                                                 phi.template value<T>(factor * acc[i][j][2 * half + 1]), T{});
      }
  });
}

// acc += A B, B [K][N] in rows of kPitch
template <class T, int kTall, int K, int N, int kPitch>
__device__ inline void multiply_fragments(Tall<kTall, N>& acc, const TallFragments<kTall, K>& a, const T* b) {
  const uint32_t from = shared_address(b + lane_id() % 16 * kPitch + lane_id() / 16 * 8);
#pragma unroll
  for (int k = 0; k < K / 16; ++k)
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t right[4];
      load_matrices_transposed(right, from + (16 * k * kPitch + 16 * n) * sizeof(T));
#pragma unroll
      for (int i = 0; i < kTall; ++i) {
        mma(acc[i][2 * n], a[i][k], right[0], right[1], T{});
        mma(acc[i][2 * n + 1], a[i][k], right[2], right[3], T{});
      }
    }
}

// A product, row by row times its factor, through phi into rows of T. kKeep leaves in acc what the gradient of the
// activated row has to be multiplied by: the slope, and the factor once more.
template <bool kKeep, class T, int kTall, int kWide>
__device__ inline void store_product(Tall<kTall, kWide>& acc, const float* factors, Activation kind, T* to, int pitch) {
  const int row = lane_id() / 4, column = lane_id() % 4 * 2;
  with_activation(kind, [&](auto phi) {
#pragma unroll
    for (int i = 0; i < kTall; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = 16 * i + 8 * half + row;
        const float factor = factors[at];
#pragma unroll
        for (int j = 0; j < kWide / 8; ++j) {
          float2 x{factor * acc[i][j][2 * half], factor * acc[i][j][2 * half + 1]};
          if constexpr (kKeep) {
            acc[i][j][2 * half] = factor * phi.template slope<T>(x.x);
            acc[i][j][2 * half + 1] = factor * phi.template slope<T>(x.y);
          } else {
            x = {phi.template value<T>(x.x), phi.template value<T>(x.y)};
          }
          store_pair(to + at * pitch + 8 * j + column, Pair<T>::pack(x));
        }
      }
  });
}

}  // namespace vista::cuda
