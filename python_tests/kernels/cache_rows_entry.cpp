// The launch functions with flat arguments, for ctypes.
#include "vista/cuda/cache_rows.h"

namespace {

vista::RowLayout layout_of(int64_t scheme, int64_t tokens, int64_t dim, int64_t group) {
  return vista::make_row_layout(static_cast<vista::RowScheme>(scheme), tokens, dim, group);
}

vista::cuda::BadSlots bad_slots(int64_t trap) {
  return trap ? vista::cuda::BadSlots::kTrap : vista::cuda::BadSlots::kCount;
}

}  // namespace

extern "C" int test_quantize_rows(int64_t scheme, int64_t tokens, int64_t dim, int64_t group, int64_t dtype, int64_t n,
                                  const void* x, uint8_t* rows) {
  return vista::cuda::quantize_rows(
      {layout_of(scheme, tokens, dim, group), static_cast<vista::DType>(dtype), n, x, rows}, nullptr);
}

extern "C" int test_dequantize_rows(int64_t scheme, int64_t tokens, int64_t dim, int64_t group, int64_t dtype,
                                    int64_t n, const uint8_t* rows, void* out) {
  vista::cuda::DequantizeParams params{};
  params.layout = layout_of(scheme, tokens, dim, group);
  params.dtype = static_cast<vista::DType>(dtype);
  params.n = n;
  params.cache = rows;
  params.out = out;
  return vista::cuda::dequantize_rows(params, nullptr);
}

extern "C" int test_gather_rows(int64_t scheme, int64_t tokens, int64_t dim, int64_t group, int64_t dtype, int64_t n,
                                int64_t num_slots, const uint8_t* cache, const void* slots, int64_t slots_are_int64,
                                void* out, int64_t* num_bad, int64_t trap) {
  return vista::cuda::gather_rows(
      {layout_of(scheme, tokens, dim, group), static_cast<vista::DType>(dtype), n, num_slots, cache,
       vista::cuda::Indices{slots, slots_are_int64 != 0}, out, num_bad, bad_slots(trap)},
      nullptr);
}

extern "C" int64_t test_scatter_workspace_bytes(int64_t n) { return vista::cuda::scatter_workspace_bytes(n); }

extern "C" int test_scatter_rows(int64_t n, int64_t num_slots, int64_t row_bytes, uint8_t* cache, const void* slots,
                                 int64_t slots_are_int64, const uint8_t* rows, int64_t* num_bad, int64_t trap,
                                 void* workspace) {
  return vista::cuda::scatter_rows({n, num_slots, row_bytes, cache, vista::cuda::Indices{slots, slots_are_int64 != 0},
                                    rows, num_bad, bad_slots(trap), workspace},
                                   nullptr);
}
