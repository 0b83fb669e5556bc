// A launch of each family with arguments that would do, for test_load.py: without a driver they must come back with an
// error. A thrown exception would cross into C, hence end the process.
#include "vista/cuda/cache_rows.h"
#include "vista/cuda/launch.h"
#include "vista/cuda/qla.h"

namespace {

void* device_memory() {
  alignas(256) static char never_read[4096];
  return never_read;
}

}  // namespace

extern "C" {

int vista_quantize_rows() {
  vista::cuda::QuantizeParams params{};
  params.layout = vista::make_row_layout(vista::RowScheme::kInt8, 4, 64);
  params.dtype = vista::DType::kBFloat16;
  params.n = 1;
  params.x = device_memory();
  params.rows = static_cast<uint8_t*>(device_memory());
  return vista::cuda::quantize_rows(params, nullptr);
}

int vista_qla_plan() {
  vista::cuda::QlaParams params{};
  params.dtype = vista::DType::kBFloat16;
  params.total = params.max_seq_len = 8;
  params.batch = params.heads = 1;
  params.d = params.e = 64;
  params.seq_offsets = {device_memory(), false};
  params.k = params.v = params.workspace = device_memory();
  params.state_out = static_cast<float*>(device_memory());
  return vista::cuda::launch_qla_plan(params, nullptr);
}

const char* vista_error_text(int error) { return vista::cuda::error_text(error); }
}
