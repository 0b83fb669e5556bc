// What the host decides before a launch, shared by the files of each architecture.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../common/dtype.cuh"
#include "vista/cuda/gemm.h"

namespace vista::cuda {

// Throws std::invalid_argument for what is not built.
void check_linear_silu(const LinearSiluParams& params);

// The tile for the current device.
cudaError_t choose_tile(const LinearSiluParams& params, bool sm90, GemmTile& tile, int& multiprocessors);

// f(element, Tile, backward) for the one of Tiles that was chosen.
template <class... Tiles, class F>
int with_instance(const LinearSiluParams& p, GemmTile chosen, F f) {
  int code = cudaErrorInvalidConfiguration;
  const auto run = [&](auto tile) {
    const auto with_element = [&](auto element) {
      return p.grad_out != nullptr ? f(element, tile, std::true_type{}) : f(element, tile, std::false_type{});
    };
    code = p.dtype == DType::kHalf ? with_element(Half{}) : with_element(BFloat16{});
  };
  const auto is = [&](auto tile) { return tile.kRows == chosen.rows && tile.kColumns == chosen.columns; };
  ((is(Tiles{}) ? run(Tiles{}) : void()), ...);
  return code;
}

}  // namespace vista::cuda
