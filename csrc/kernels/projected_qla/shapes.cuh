// The kernel instances, and which of them serves a call.
//
// A block keeps the weights of some columns for as long as it lives. More columns mean fewer blocks that read the same
// rows of x and larger tiles for a warp, hence fewer reads of shared memory for a product: 256 columns (8 warps of 32 x
// 64) need 131 KB at dim 256, 128 columns half. So a call gets the instance with most columns that do something, of
// those whose weights fit the device beside what else the kernel needs.
//
// By shared memory of a block, the widest x for which there is one (state, apply, state_backward, apply_backward):
//                 d = 32 or 64          d = 128
//     sm_90       704 704 704 512       704 640 256 448
//     sm_80       448 448 448 256       448 384 128 192
//     sm_86, 89   192 192 192   0       192 128   0   0
// Two projections (K and V) of a head of 128 are 256 columns; where they do not fit, blocks of the state take a quarter
// of it each and make every key and value twice. The backward of the state has no such way: dK needs all columns of V.
// What does not fit is composed by the caller.
#pragma once

#include "projection.cuh"

namespace vista::cuda {

// Of a group of kHeads neighbouring heads of head dim kDim a block takes kPart columns of each projection.
template <class T_, int kDim_, int kPart_, int kHeads_, int kProjections>
struct Shape {
  using T = T_;
  static constexpr int kDim = kDim_, kPart = kPart_, kHeads = kHeads_;
  static constexpr int kParts = kDim / kPart;
  static constexpr int kColumns = kProjections * kPart * kHeads;
  static constexpr int kPitch = padded<T>(kColumns), kTileBytes = kTileRows * kPitch * 2;
  static constexpr int kMatrixPitch = padded<T>(kDim), kMatrixBytes = kHeads * kDim * kMatrixPitch * 2;
};

// 8 warps of 32 rows and a quarter of the columns: keys, then values. 16 rows of a state each, or a half of them.
template <class T, int kDim, int kPart, int kHeads>
struct StateShape : Shape<T, kDim, kPart, kHeads, 2> {
  using Base = Shape<T, kDim, kPart, kHeads, 2>;
  using Rows = Projection<T, Base::kColumns, 2, Base::kColumns / 4>;
  static constexpr int kThreads = Rows::kThreads, kBlocks = 1;
  static constexpr int kOwnBytes = Base::kTileBytes;  // keys and values
  static constexpr int kSum = kPart * kPart * kHeads / 128;
};

// A warp has all columns of its rows in one head: its queries are an operand without a way through shared memory.
template <class T, int kDim, int kHeads>
struct ApplyShape : Shape<T, kDim, kDim, kHeads, 1> {
  using Base = Shape<T, kDim, kDim, kHeads, 1>;
  using Rows = Projection<T, Base::kColumns, 128 / kDim, kDim>;
  static constexpr int kThreads = Rows::kThreads, kBlocks = kThreads <= 128 ? 2 : 1;
  static constexpr int kSlice = 32,
                       kSlicePitch = padded<T>(kSlice);     // columns of out on their way through shared memory
  static constexpr int kSliceBytes = 16 * kSlicePitch * 2;  // of a warp
  static constexpr int kOwnBytes = Base::kMatrixBytes + kThreads / 32 * kSliceBytes;
};

template <class T, int kDim, int kHeads>
struct StateBackwardShape : Shape<T, kDim, kDim, kHeads, 2> {
  using Base = Shape<T, kDim, kDim, kHeads, 2>;
  using Rows = Projection<T, Base::kColumns, 2, Base::kColumns / 4>;
  static constexpr int kThreads = Rows::kThreads, kBlocks = 1;
  static constexpr int kWide = Base::kColumns / 4;
  static constexpr int kPiece = kWide < kDim ? kWide : kDim;  // of a warp's columns in one head
  static constexpr int kOwnBytes = Base::kTileBytes + Base::kMatrixBytes;
};

// 128 columns: 16 rows of a head's W for each of 8 warps.
template <class T, int kDim>
struct ApplyBackwardShape : Shape<T, kDim, kDim, 128 / kDim, 1> {
  using Base = Shape<T, kDim, kDim, 128 / kDim, 1>;
  static constexpr int kWide = 32;
  using Rows = Projection<T, Base::kColumns, 2, kWide>;
  static constexpr int kThreads = Rows::kThreads, kBlocks = 1;
  static constexpr int kGrads = 2;  // tiles of dO at work
  static constexpr int kOwnBytes = (1 + kGrads) * Base::kTileBytes + Base::kMatrixBytes;
};

template <class S>
int64_t shared_bytes(int64_t dim) {
  return kFactorBytes + kRingBytes + S::kOwnBytes + ceil_div(dim, kSlab) * kSlab * S::kColumns * 2;
}

// In the order of their columns.
template <class... Shapes>
struct Instances {
  // Calls f(Shape{}) with the best instance for the call on a device with `most` bytes of shared memory for a block.
  // False if there is none.
  template <class F>
  static bool choose(const ProjectedQlaParams& p, int64_t most, F f) {
    int64_t best = -1, useful = 0, index = 0;
    const auto consider = [&](auto shape) {
      using S = decltype(shape);
      const int64_t columns = (S::kHeads < p.qla.heads ? S::kHeads : p.qla.heads) * S::kPart;
      if (p.qla.d == S::kDim && shared_bytes<S>(p.dim) <= most && columns > useful) best = index, useful = columns;
      ++index;
    };
    (consider(Shapes{}), ...);
    index = 0;
    ((index++ == best ? f(Shapes{}) : void()), ...);
    return best >= 0;
  }
};

template <class T>
using StateInstances = Instances<StateShape<T, 32, 32, 2>, StateShape<T, 32, 32, 4>, StateShape<T, 64, 64, 1>,
                                 StateShape<T, 64, 64, 2>, StateShape<T, 128, 64, 1>, StateShape<T, 128, 128, 1>>;
template <class T>
using ApplyInstances = Instances<ApplyShape<T, 32, 4>, ApplyShape<T, 32, 8>, ApplyShape<T, 64, 2>, ApplyShape<T, 64, 4>,
                                 ApplyShape<T, 128, 1>, ApplyShape<T, 128, 2>>;
template <class T>
using StateBackwardInstances =
    Instances<StateBackwardShape<T, 32, 2>, StateBackwardShape<T, 32, 4>, StateBackwardShape<T, 64, 1>,
              StateBackwardShape<T, 64, 2>, StateBackwardShape<T, 128, 1>>;
template <class T>
using ApplyBackwardInstances =
    Instances<ApplyBackwardShape<T, 32>, ApplyBackwardShape<T, 64>, ApplyBackwardShape<T, 128>>;

inline cudaError_t shared_bytes_of_device(int& bytes) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// choose() of the table for the call's dtype.
template <template <class> class Table, class F>
bool choose_instance(const ProjectedQlaParams& p, int64_t most, F f) {
  if (p.qla.e != p.qla.d || p.dim < 8 || p.dim % 8 != 0) return false;
  switch (p.qla.dtype) {
    case DType::kBFloat16: return Table<BFloat16>::choose(p, most, f);
    case DType::kHalf: return Table<Half>::choose(p, most, f);
    default: return false;
  }
}

}  // namespace vista::cuda
