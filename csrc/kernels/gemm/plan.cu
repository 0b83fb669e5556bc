#include <stdexcept>
#include <string>

#include "plan.h"

namespace vista::cuda {
namespace {

constexpr int64_t kUnit = 8;  // elements of 16 bits in 16 bytes

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_width(int64_t n) { return n > 0 && n % kUnit == 0 && n <= INT32_MAX; }

}  // namespace

bool linear_silu_is_built(DType dtype, int64_t in_features, int64_t out_features) {
  return dtype != DType::kFloat && is_width(in_features) && is_width(out_features);
}

void check_linear_silu(const LinearSiluParams& p) {
  const auto need = [](bool holds, const std::string& what) {
    if (!holds) throw std::invalid_argument("linear_silu kernels " + what);
  };
  need(p.dtype == DType::kBFloat16 || p.dtype == DType::kHalf, "are built for bfloat16 and float16");
  need(is_width(p.in_features) && is_width(p.out_features),
       "take positive multiples of 8 below 2^31 as in_features and out_features, found " +
           std::to_string(p.in_features) + " and " + std::to_string(p.out_features));
  // A tile may reach past the last row; its coordinates are 32 bits wide.
  need(p.rows >= 0 && p.rows <= INT32_MAX - 256, "take from 0 to 2^31 - 257 rows, found " + std::to_string(p.rows));
  for (const void* pointer : {p.x, p.weight, p.bias, p.grad_out, static_cast<const void*>(p.out)})
    need(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, "take arrays at multiples of 16 bytes");
}

// Without clusters a block reads (rows + columns) * in_features values for its tile, from L2 mostly, and on a fast card
// that takes longer than the products: the cost of a tile is its perimeter, that of a launch the cost of all waves.
// Wide tiles win where there is work for every multiprocessor, small ones where there is not, or where a wide one would
// be mostly empty. At equal cost the smaller tile, whose epilogue hides behind another's products.
GemmTile linear_silu_tile(int64_t rows, int64_t out_features, int multiprocessors, bool sm90) {
  constexpr GemmTile kTiles[] = {{64, 64}, {128, 128}, {128, 256}};  // the last on sm90 only: 256 accumulators a thread
  GemmTile best{};
  int64_t least = INT64_MAX;
  for (const GemmTile& tile : kTiles) {
    if (tile.columns == 256 && !sm90) continue;
    const int64_t tiles = ceil_div(rows, tile.rows) * ceil_div(out_features, tile.columns);
    const int64_t cost = ceil_div(tiles, multiprocessors) * (tile.rows + tile.columns);
    if (cost < least) {
      least = cost;
      best = tile;
    }
  }
  return best;
}

cudaError_t choose_tile(const LinearSiluParams& p, bool sm90, GemmTile& tile, int& multiprocessors) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  // An attribute is remembered by the runtime: no synchronization, and allowed in a capture.
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) tile = linear_silu_tile(p.rows, p.out_features, multiprocessors, sm90);
  return error;
}

}  // namespace vista::cuda
