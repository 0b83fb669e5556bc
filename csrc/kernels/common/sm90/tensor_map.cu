#include <cudaTypedefs.h>

#include <stdexcept>
#include <string>

#include "tensor_map.h"

namespace vista::cuda::sm90 {
namespace {

void check(const MatrixView& m, int box_rows) {
  const auto need = [](bool holds, const char* what, int64_t found) {
    if (!holds) throw std::invalid_argument(std::string("tensor map: ") + what + ", found " + std::to_string(found));
  };
  constexpr int64_t kMostExtent = int64_t{1} << 31;  // coordinates are signed
  need(m.dtype == DType::kBFloat16 || m.dtype == DType::kHalf, "elements must be bfloat16 or float16, by vista::DType",
       static_cast<int64_t>(m.dtype));
  need(reinterpret_cast<uintptr_t>(m.data) % 16 == 0, "data must lie at a multiple of 16 bytes",
       reinterpret_cast<intptr_t>(m.data));
  need(m.rows > 0 && m.rows < kMostExtent, "rows must be from 1 to 2^31 - 1", m.rows);
  need(m.columns > 0 && m.columns < kMostExtent, "columns must be from 1 to 2^31 - 1", m.columns);
  need(m.stride % 8 == 0 && m.stride >= m.columns && m.stride < (int64_t{1} << 39),
       "the stride must be a multiple of 8, not less than the columns and below 2^39", m.stride);
  need(box_rows > 0 && box_rows <= 256, "a box must have from 1 to 256 rows", box_rows);
}

// The driver is not linked: the package must load without one.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    const bool good = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return good ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function) : nullptr;
  }();
  return found;
}

}  // namespace

cudaError_t encode(CUtensorMap& map, const MatrixView& m, int box_rows) {
  check(m, box_rows);
  if (encoder() == nullptr) return cudaErrorInsufficientDriver;
  const auto type = m.dtype == DType::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t extent[] = {static_cast<cuuint64_t>(m.columns), static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t stride[] = {static_cast<cuuint64_t>(m.stride) * 2};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t every[] = {1, 1};
  const CUresult result =
      encoder()(&map, type, 2, const_cast<void*>(m.data), extent, stride, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace vista::cuda::sm90
