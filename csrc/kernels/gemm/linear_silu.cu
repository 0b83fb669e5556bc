// linear_silu for every card from compute capability 8.0 on: cp.async, ldmatrix and mma.sync by CUTLASS 2.x.
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

// After the above, which it takes for granted.
#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "../common/dispatch.cuh"
#include "epilogue.cuh"
#include "plan.h"

namespace vista::cuda {
namespace {

namespace fusion = cutlass::epilogue::threadblock;

// 128 x 128: two blocks of four warps on an SM, by registers (64 x 64 accumulators a warp) and by shared memory (three
// stages of 16 KB) alike.
template <int kTileRows, int kTileColumns>
struct Sm80Tile {
  static constexpr int kRows = kTileRows, kColumns = kTileColumns;
  using Block = cutlass::gemm::GemmShape<kRows, kColumns, 32>;
  using Warp = cutlass::gemm::GemmShape<kRows / 2, kColumns / 2, 32>;
  static constexpr int kStages = kRows == 128 ? 3 : 4;
  static constexpr int kThreads = 128;
};

template <class Element, class Tile, bool kBackward>
struct Sm80LinearSilu {
  static constexpr int kAlignment = 8, kEpilogueStages = 1;
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
  using RowStride = cute::Stride<int64_t, cute::_1, int64_t>;
  using Threads =
      fusion::OutputTileThreadLayout<typename Tile::Block, typename Tile::Warp, Element, kAlignment, kEpilogueStages>;
  using Bias = fusion::VisitorRowBroadcast<Threads, Element, cute::Stride<cute::_0, cute::_1, int32_t>>;
  using Pre =
      fusion::Sm80EVT<fusion::VisitorCompute<cutlass::plus, float, float, kRound>, fusion::VisitorAccFetch, Bias>;
  using Forward = fusion::Sm80EVT<fusion::VisitorCompute<SiluOf, Element, float, kRound>, Pre>;
  using Backward = fusion::Sm80EVT<fusion::VisitorCompute<SiluGradient, Element, float, kRound>, Pre,
                                   fusion::VisitorAuxLoad<Threads, Element, RowStride>>;
  using Tree = fusion::Sm80EVT<fusion::VisitorAuxStore<Threads, Element, kRound, RowStride>,
                               std::conditional_t<kBackward, Backward, Forward>>;
  using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>;  // blocks in a row share x in L2
  // The default kernel for this tree but for kZfill: stages that no tile fills are zeroed, because the main loop reads
  // one tile ahead of what it multiplies.
  using Gemm = typename cutlass::gemm::kernel::DefaultGemmUniversal<
      Element, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, kAlignment, Element,
      cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, kAlignment, Element, cutlass::layout::RowMajor,
      float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, typename Tile::Block, typename Tile::Warp,
      cutlass::gemm::GemmShape<16, 8, 16>, cutlass::epilogue::thread::LinearCombination<Element, kAlignment>, Swizzle,
      Tile::kStages, cutlass::arch::OpMultiplyAdd, cutlass::gemm::SharedMemoryClearOption::kZfill>::GemmKernel;
  using Epilogue = fusion::EpilogueWithVisitorCallbacks<typename Gemm::Epilogue, Tree, kEpilogueStages>;
  using Kernel = cutlass::gemm::kernel::GemmWithEpilogueVisitor<typename Gemm::Mma, Epilogue, Swizzle>;
  static_assert(sizeof(typename Kernel::SharedStorage) <= kMostSharedBytes);

  static typename Kernel::Params make_params(const LinearSiluParams& p) {
    const auto pointer = [](const void* data) { return static_cast<Element*>(const_cast<void*>(data)); };
    const RowStride rows{p.out_features, {}, 0};
    const typename Pre::Arguments pre{{}, {pointer(p.bias), Element(0), {}}, {}};
    const typename Tree::Arguments tree = [&]() -> typename Tree::Arguments {
      if constexpr (kBackward)
        return {{pre, {pointer(p.grad_out), Element(0), rows}, {}}, {pointer(p.out), rows}};
      else
        return {{pre, {}}, {pointer(p.out), rows}};
    }();
    const cutlass::gemm::GemmCoord problem(static_cast<int>(p.rows), static_cast<int>(p.out_features),
                                           static_cast<int>(p.in_features));
    const typename Kernel::Arguments arguments(cutlass::gemm::GemmUniversalMode::kGemm, problem, 1, tree, p.x, p.weight,
                                               nullptr, nullptr, 0, 0, 0, 0, p.in_features, p.in_features, 0, 0);
    return {arguments, 0, 0};  // of multiprocessors and occupancy only stream-K would make use
  }
};

template <class T, class Tile, bool kBackward>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    linear_silu_sm80(typename Sm80LinearSilu<CutlassType<T>, Tile, kBackward>::Kernel::Params params) {
  using Kernel = typename Sm80LinearSilu<CutlassType<T>, Tile, kBackward>::Kernel;
  extern __shared__ __align__(16) char shared[];
  Kernel{}(params, *reinterpret_cast<typename Kernel::SharedStorage*>(shared));
}

template <class T, class Tile, bool kBackward>
int launch(const LinearSiluParams& p, Stream stream) {
  using Gemm = Sm80LinearSilu<CutlassType<T>, Tile, kBackward>;
  constexpr int kShared = sizeof(typename Gemm::Kernel::SharedStorage);
  const auto kernel = linear_silu_sm80<T, Tile, kBackward>;
  const cudaError_t error = allow_shared(kernel, kShared);
  if (error != cudaSuccess) return error;
  const auto params = Gemm::make_params(p);
  kernel<<<params.get_grid_dims(), Tile::kThreads, kShared, static_cast<cudaStream_t>(stream)>>>(params);
  return cudaGetLastError();
}

}  // namespace

int launch_linear_silu_sm80(const LinearSiluParams& p, Stream stream) {
  check_linear_silu(p);
  if (p.rows == 0) return cudaSuccess;
  GemmTile tile{};
  int multiprocessors = 0;
  const cudaError_t error = choose_tile(p, false, tile, multiprocessors);
  if (error != cudaSuccess) return error;
  return with_instance<Sm80Tile<64, 64>, Sm80Tile<128, 128>>(p, tile, [&](auto element, auto instance, auto backward) {
    return launch<decltype(element), decltype(instance), decltype(backward)::value>(p, stream);
  });
}

}  // namespace vista::cuda
