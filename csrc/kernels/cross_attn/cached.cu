// The forward on quantized rows of a cache: tiles are dequantized as they enter shared memory.
#include "forward.cuh"

namespace vista::cuda {
namespace {

void check_layout(const char* name, const RowLayout& layout, int64_t width) {
  if (layout.dim != width || layout.row_bytes > INT32_MAX)
    throw std::invalid_argument("cross_attn kernels take " + std::string(name) + " rows of " + std::to_string(width) +
                                " values a token and less than 2^31 bytes, found " + std::to_string(layout.dim) +
                                " and " + std::to_string(layout.row_bytes));
}

}  // namespace

int launch_cached_cross_attn(const CrossAttnParams& params, Stream stream) {
  const CachedRows& cache = params.cache;
  if (cache.num_slots > INT32_MAX)
    throw std::invalid_argument("cross_attn kernels take caches of at most 2^31 - 1 slots");
  check_layout("k", cache.k_layout, params.kv_heads * params.d);
  check_layout("v", cache.v_layout, params.kv_heads * params.e);
  if (cache.k_layout.tokens != cache.v_layout.tokens || cache.k_layout.scheme != cache.v_layout.scheme)
    throw std::invalid_argument("cross_attn kernels take k and v rows of one scheme and as many tokens");
  return launch_forward<CachedKeys>(params, stream);
}

}  // namespace vista::cuda
