#include "cache_rows.h"
#include "cuda.h"
#include "vista/cuda/cache_rows.h"

namespace vista {
namespace {

struct Cuda {
  static void quantize(const char* op, const RowLayout& layout, const Tensor& x, Tensor& rows) {
    cuda::QuantizeParams params{};
    params.layout = layout;
    params.dtype = kernel_dtype(x.scalar_type());
    params.n = x.size(0);
    params.x = x.const_data_ptr();
    params.rows = static_cast<uint8_t*>(rows.mutable_data_ptr());
    launch_on(op, x, "x " + shape_of(x), [&](cuda::Stream stream) { return cuda::quantize_rows(params, stream); });
  }

  static void dequantize(const char* op, const RowLayout& layout, const Tensor& rows, Tensor& out) {
    const cuda::DequantizeParams params = reading(layout, rows, out);
    launch_on(op, rows, "out " + shape_of(out),
              [&](cuda::Stream stream) { return cuda::dequantize_rows(params, stream); });
  }

  static Tensor gather(const char* op, const RowLayout& layout, const Tensor& cache, Tensor slots, IndexPolicy policy,
                       Tensor& out) {
    Tensor num_bad = torch::stable::new_empty(cache, {}, ScalarType::Long);
    cuda::DequantizeParams params = reading(layout, cache, out);
    params.num_slots = cache.size(0);
    params.slots = device_indices(op, "slots", slots, cache);
    params.num_bad = static_cast<int64_t*>(num_bad.mutable_data_ptr());
    params.bad_slots = bad_slots(policy);
    launch_on(op, cache, "out " + shape_of(out),
              [&](cuda::Stream stream) { return cuda::gather_rows(params, stream); });
    return num_bad;
  }

  static Tensor scatter(const char* op, Tensor& cache, Tensor slots, const Tensor& rows, IndexPolicy policy) {
    Tensor num_bad = torch::stable::new_empty(cache, {}, ScalarType::Long);
    Tensor workspace = torch::stable::new_empty(cache, {cuda::scatter_workspace_bytes(rows.size(0))}, ScalarType::Byte);
    cuda::ScatterParams params{};
    params.n = rows.size(0);
    params.num_slots = cache.size(0);
    params.row_bytes = cache.size(1);
    params.cache = static_cast<uint8_t*>(cache.mutable_data_ptr());
    params.slots = device_indices(op, "slots", slots, cache);
    params.rows = static_cast<const uint8_t*>(rows.const_data_ptr());
    params.num_bad = static_cast<int64_t*>(num_bad.mutable_data_ptr());
    params.bad_slots = bad_slots(policy);
    params.workspace = workspace.mutable_data_ptr();
    launch_on(op, cache, "rows " + shape_of(rows),
              [&](cuda::Stream stream) { return cuda::scatter_rows(params, stream); });
    return num_bad;
  }

 private:
  static cuda::DequantizeParams reading(const RowLayout& layout, const Tensor& cache, Tensor& out) {
    cuda::DequantizeParams params{};
    params.layout = layout;
    params.dtype = kernel_dtype(out.scalar_type());
    params.n = out.size(0);
    params.cache = static_cast<const uint8_t*>(cache.const_data_ptr());
    params.out = out.mutable_data_ptr();
    return params;
  }
};

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CUDA, m) { vista::CacheRowOps<vista::Cuda>::implement(m); }
