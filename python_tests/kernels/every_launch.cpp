// Every launch function with arguments that reach every kernel instance. Nothing is computed: without a driver a call
// comes back with an error (test_load.py), with the emulator's runtime it says what it launches
// (tools/kernel_launches.py). An exception would cross into C, hence end the process.
#include <functional>
#include <stdexcept>
#include <vector>

#include "vista/cuda/cache_rows.h"
#include "vista/cuda/cross_attn.h"
#include "vista/cuda/gemm.h"
#include "vista/cuda/launch.h"
#include "vista/cuda/projected_qla.h"
#include "vista/cuda/qla.h"
#include "vista/cuda/rms_norm.h"
#include "vista/cuda/sglu.h"

using namespace vista;
using namespace vista::cuda;

namespace {

using Launches = std::vector<std::function<int()>>;

constexpr DType kDTypes[] = {DType::kFloat, DType::kBFloat16, DType::kHalf};

alignas(256) uint8_t device_memory[256];  // an address, never read

void add_qla(Launches& launches) {
  QlaParams params{};
  params.activation = params.state_activation = Activation::kSilu;
  params.total = params.max_seq_len = 2 * kQlaChunkRows;  // whose sums have to be reduced
  params.batch = params.heads = 1;
  params.seq_offsets = {device_memory, false};
  params.q = params.k = params.v = params.grad_out = device_memory;
  params.state = params.grad_state = reinterpret_cast<float*>(device_memory);
  params.out = params.grad_q = params.grad_k = params.grad_v = params.workspace = device_memory;
  params.state_out = params.grad_state_out = reinterpret_cast<float*>(device_memory);
  for (DType dtype : kDTypes)
    for (bool allow_tf32 : {false, true})
      for (int64_t dim : {32, 64, 128, 256}) {
        params.dtype = dtype;
        params.allow_tf32 = allow_tf32;
        params.d = params.e = dim;
        for (auto launch : {launch_qla_plan, launch_qla_state, launch_qla_apply, launch_qla_apply_backward,
                            launch_qla_state_backward})
          launches.push_back([=] { return launch(params, nullptr); });
      }
}

void add_projected_qla(Launches& launches) {
  ProjectedQlaParams params{};
  QlaParams& qla = params.qla;
  qla.activation = qla.state_activation = Activation::kSilu;
  qla.total = qla.max_seq_len = 2 * kQlaChunkRows;
  qla.batch = 1;
  qla.seq_offsets = {device_memory, false};
  qla.grad_out = params.x = params.weight_q = params.weight_k = params.weight_v = device_memory;
  qla.state = qla.grad_state = reinterpret_cast<float*>(device_memory);
  qla.out = qla.grad_q = qla.grad_k = qla.grad_v = qla.workspace = device_memory;
  qla.state_out = qla.grad_state_out = reinterpret_cast<float*>(device_memory);
  for (DType dtype : {DType::kBFloat16, DType::kHalf})
    for (int64_t dim : {128, 256, 512})
      for (int64_t head_dim : {32, 64, 128})
        for (int64_t heads : {1, 8}) {
          params.dim = dim;
          qla.dtype = dtype;
          qla.d = qla.e = head_dim;
          qla.heads = heads;
          launches.push_back([=] { return launch_projected_qla_state(params, nullptr); });
          launches.push_back([=] { return launch_projected_qla_apply(params, nullptr); });
          if (dim == 512 && head_dim == 128) continue;  // whose backward is not built
          launches.push_back([=] { return launch_projected_qla_state_backward(params, nullptr); });
          launches.push_back([=] { return launch_projected_qla_apply_backward(params, nullptr); });
        }
}

void add_cross_attn(Launches& launches) {
  CrossAttnParams params{};
  params.total_q = params.total_kv = params.max_q_len = params.max_kv_len = 64;
  params.groups = params.sequences = params.q_heads = params.kv_heads = 1;
  params.q_offsets = params.kv_offsets = params.kv_index = {device_memory, false};
  params.q = params.k = params.v = params.self_k = params.self_v = params.grad_out = device_memory;
  params.out = params.grad_q = params.grad_k = params.grad_v = params.workspace = device_memory;
  params.grad_self_k = params.grad_self_v = device_memory;
  params.lse = reinterpret_cast<float*>(device_memory);
  launches.push_back([=] { return launch_cross_attn_plan(params, true, nullptr); });
  params.total_q = params.max_q_len = 1 << 14;  // enough for sums over chunks of queries
  for (DType dtype : kDTypes)
    for (int64_t dim : {32, 64, 128, 256}) {
      params.dtype = dtype;
      params.d = params.e = dim;
      launches.push_back([=] { return launch_cross_attn(params, nullptr); });
      launches.push_back([=] { return launch_cross_attn_backward(params, nullptr); });
      CrossAttnParams cached = params;
      CachedRows& cache = cached.cache;
      cache.k_layout = cache.v_layout = make_row_layout(RowScheme::kInt8, 2, dim);
      cache.k_rows = cache.v_rows = device_memory;
      cache.num_slots = 1;
      cache.slots = {device_memory, true};
      cache.num_bad = reinterpret_cast<int64_t*>(device_memory);
      launches.push_back([=] { return launch_cached_cross_attn(cached, nullptr); });
    }
}

void add_linear_silu(Launches& launches) {
  LinearSiluParams params{};
  params.in_features = 256;
  params.x = params.weight = params.bias = params.out = device_memory;
  for (DType dtype : {DType::kBFloat16, DType::kHalf})
    for (const void* grad_out : {static_cast<const void*>(nullptr), static_cast<const void*>(device_memory)})
      for (int64_t out_features : {64, 128, 256}) {  // of many rows: each has its tile
        params.dtype = dtype;
        params.grad_out = grad_out;
        params.rows = 1 << 20;
        params.out_features = out_features;
        launches.push_back([=] { return launch_linear_silu(params, nullptr); });
      }
}

void add_sglu(Launches& launches) {
  SgluParams params{};
  params.total = 64;
  params.hidden = 64;
  params.norm = params.residual = true;
  params.x = params.up = params.gate = params.down = params.down_t = params.grad_out = device_memory;
  params.out = params.grad_x = params.grad_up_rows = params.grad_gate_rows = params.hidden_rows = device_memory;
  for (DType dtype : {DType::kBFloat16, DType::kHalf})
    for (int64_t dim : {64, 128, 256}) {
      params.dtype = dtype;
      params.dim = dim;
      launches.push_back([=] { return launch_sglu(params, nullptr); });
      launches.push_back([=] { return launch_sglu_backward(params, nullptr); });
    }
}

void add_rms_norm(Launches& launches) {
  for (DType dtype : kDTypes)
    for (int64_t dim : {64, 63}) {  // vectors, and elements
      const RmsNormParams params{dtype, 8, dim, 0.f, device_memory, device_memory, device_memory};
      launches.push_back([=] { return launch_rms_norm_backward(params, nullptr); });
    }
}

void add_cache_rows(Launches& launches) {
  auto* num_bad = reinterpret_cast<int64_t*>(device_memory);
  for (int64_t misaligned : {0, 4}) {
    uint8_t* data = device_memory + misaligned;
    for (DType dtype : kDTypes)
      for (RowScheme scheme : {RowScheme::kInt8, RowScheme::kInt4, RowScheme::kFp8E4M3})
        for (int64_t dim : {64, 512}) {  // a group within a warp, and a longer one
          const RowLayout layout = make_row_layout(scheme, 2, dim, dim);
          const QuantizeParams to{layout, dtype, 1, data, device_memory};
          const Indices slots{device_memory, true};
          const DequantizeParams from{layout, dtype, 1, 1, device_memory, slots, data, num_bad, BadSlots::kCount};
          launches.push_back([=] { return quantize_rows(to, nullptr); });
          launches.push_back([=] { return gather_rows(from, nullptr); });
          launches.push_back([=] { return dequantize_rows(from, nullptr); });
        }
    const ScatterParams scatter{
        1, 1, 128, data, {device_memory, true}, device_memory, num_bad, BadSlots::kCount, device_memory};
    launches.push_back([=] { return scatter_rows(scatter, nullptr); });
  }
}

const Launches& all() {
  static const Launches launches = [] {
    Launches list;
    add_qla(list);
    add_projected_qla(list);
    add_cross_attn(list);
    add_linear_silu(list);
    add_sglu(list);
    add_rms_norm(list);
    add_cache_rows(list);
    return list;
  }();
  return launches;
}

}  // namespace

extern "C" {
int vista_number_of_launches() { return static_cast<int>(all().size()); }
// -1: not built for the card.
int vista_launch(int index) {
  try {
    return all()[index]();
  } catch (const std::invalid_argument&) {
    return -1;
  }
}
const char* vista_error_text(int error) { return error_text(error); }
}
