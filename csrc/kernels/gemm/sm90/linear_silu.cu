// linear_silu for compute capability 9.x: TMA, wgmma and warp specialisation by CUTLASS 3.x.
#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>

#include "../../common/dispatch.cuh"
#include "../epilogue.cuh"
#include "../plan.h"

namespace vista::cuda {
namespace {

namespace fusion = cutlass::epilogue::fusion;

// A producer warp and two warpgroups of consumers, one block on a multiprocessor, persistent. 128 x 256 is shared by
// the two (64 rows each: 128 accumulators a thread). Narrower tiles are one warpgroup's: it works on the next tile
// while the other is in its epilogue.
template <int kTileRows, int kTileColumns>
struct Sm90Tile {
  static constexpr int kRows = kTileRows, kColumns = kTileColumns;
  static constexpr bool kShared = kColumns == 256;
  using Shape = cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, cute::_64>;
  using Mainloop = std::conditional_t<kShared, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                                      cutlass::gemm::KernelTmaWarpSpecializedPingpong>;
  using Epilogue = std::conditional_t<kShared, cutlass::epilogue::TmaWarpSpecializedCooperative,
                                      cutlass::epilogue::TmaWarpSpecialized>;
  static constexpr int kThreads = 384;
};

template <class Element, class Tile, bool kBackward>
struct Sm90LinearSilu {
  static constexpr int kAlignment = 8;
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  using RowMajor = cutlass::layout::RowMajor;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using Bias = fusion::Sm90RowBroadcast<0, typename Tile::Shape, Element, float>;
  using Pre = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::plus, float, float, kRound>, fusion::Sm90AccFetch, Bias>;
  // grad_out comes as the epilogue's source, through shared memory that the result then takes over.
  using Source = std::conditional_t<kBackward, Element, void>;
  using Forward = fusion::Sm90EVT<fusion::Sm90Compute<SiluOf, Element, float, kRound>, Pre>;
  using Backward =
      fusion::Sm90EVT<fusion::Sm90Compute<SiluGradient, Element, float, kRound>, Pre, fusion::Sm90SrcFetch<Element>>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename Tile::Shape, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Source, RowMajor, kAlignment, Element, RowMajor,
      kAlignment, typename Tile::Epilogue, std::conditional_t<kBackward, Backward, Forward>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAlignment, Element,
      cutlass::layout::ColumnMajor, kAlignment, float, typename Tile::Shape, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      typename Tile::Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int>, Mainloop, Epilogue,
                                                      cutlass::gemm::PersistentScheduler>;
  static_assert(Kernel::MaxThreadsPerBlock == Tile::kThreads);

  static typename Kernel::Params make_params(const LinearSiluParams& p, int multiprocessors) {
    const auto pointer = [](const void* data) { return static_cast<const Element*>(data); };
    const typename Pre::Arguments pre{{}, {pointer(p.bias), Element(0), {}}, {}};
    typename Kernel::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = {static_cast<int>(p.rows), static_cast<int>(p.out_features),
                               static_cast<int>(p.in_features)};
    arguments.mainloop.ptr_A = pointer(p.x);
    arguments.mainloop.dA = {p.in_features, {}, 0};
    arguments.mainloop.ptr_B = pointer(p.weight);
    arguments.mainloop.dB = {p.in_features, {}, 0};
    if constexpr (kBackward) {
      arguments.epilogue.thread = {pre, {}, {}};
      arguments.epilogue.ptr_C = pointer(p.grad_out);
    } else {
      arguments.epilogue.thread = {pre, {}};
    }
    arguments.epilogue.dC = {p.out_features, {}, 0};
    arguments.epilogue.ptr_D = static_cast<Element*>(p.out);
    arguments.epilogue.dD = {p.out_features, {}, 0};
    arguments.hw_info.sm_count = multiprocessors;
    return Kernel::to_underlying_arguments(arguments, nullptr);
  }
};

template <class T, class Tile, bool kBackward>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_silu_sm90(const __grid_constant__
                     typename Sm90LinearSilu<CutlassType<T>, Tile, kBackward>::Kernel::Params params) {
  extern __shared__ __align__(128) char shared[];
  typename Sm90LinearSilu<CutlassType<T>, Tile, kBackward>::Kernel{}(params, shared);
}

template <class T, class Tile, bool kBackward>
int launch(const LinearSiluParams& p, int multiprocessors, Stream stream) {
  using Gemm = Sm90LinearSilu<CutlassType<T>, Tile, kBackward>;
  constexpr int kShared = Gemm::Kernel::SharedStorageSize;
  const auto kernel = linear_silu_sm90<T, Tile, kBackward>;
  const cudaError_t error = allow_shared(kernel, kShared);
  if (error != cudaSuccess) return error;
  const auto params = Gemm::make_params(p, multiprocessors);
  kernel<<<Gemm::Kernel::get_grid_shape(params), Tile::kThreads, kShared, static_cast<cudaStream_t>(stream)>>>(params);
  return cudaGetLastError();
}

}  // namespace

int launch_linear_silu_sm90(const LinearSiluParams& p, Stream stream) {
  check_linear_silu(p);
  if (p.rows == 0) return cudaSuccess;
  GemmTile tile{};
  int multiprocessors = 0;
  const cudaError_t error = choose_tile(p, true, tile, multiprocessors);
  if (error != cudaSuccess) return error;
  return with_instance<Sm90Tile<64, 64>, Sm90Tile<128, 128>, Sm90Tile<128, 256>>(
      p, tile, [&](auto element, auto instance, auto backward) {
        return launch<decltype(element), decltype(instance), decltype(backward)::value>(p, multiprocessors, stream);
      });
}

}  // namespace vista::cuda
