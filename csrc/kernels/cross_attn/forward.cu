#include <algorithm>

#include "forward.cuh"

namespace vista::cuda {

// As many rows as share the keys of a block, but enough blocks for a large device where there are few rows.
int cross_attn_forward_run(const CrossAttnParams& p) {
  constexpr int64_t kMostRows = 1024;
  const int64_t enough_blocks = p.enough_blocks > 0 ? p.enough_blocks : 512;
  const int64_t keys = reads_cache(p) ? p.cache.k_layout.tokens : p.max_kv_len;
  return dispatch(p, [&](auto math, auto dim) {
    using Shape = ForwardShape<decltype(math), decltype(dim)::value>;
    if (keys > Shape::kPlaces * Shape::kKeys) return Shape::kRound;
    const int64_t rounds = ceil_div(p.total_q * p.q_heads, enough_blocks * Shape::kRound);
    return static_cast<int>(std::clamp<int64_t>(rounds * Shape::kRound, Shape::kRound, kMostRows));
  });
}

int launch_cross_attn(const CrossAttnParams& params, Stream stream) {
  return launch_forward<PackedKeys>(params, stream);
}

}  // namespace vista::cuda
