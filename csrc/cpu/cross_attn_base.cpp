#define VISTA_ISA base
#define VISTA_LANES 4
#include "cross_attn_kernels.h"
#include "vista/cpu_isa.h"

namespace vista::cpu {

const CrossAttnKernels cross_attn_kernels_base{base::cross_attn_forward, base::cross_attn_backward_short,
                                               base::cross_attn_backward_queries, base::cross_attn_backward_keys};

int64_t cross_attn_scratch_floats(int64_t d, int64_t e) {
  const int64_t dp = base::pad(d), ep = base::pad(e), dq = (d + 31) / 32 * 32, eq = (e + 31) / 32 * 32;
  const int64_t vectors = (kQueryBlock + 3 * kKeyBlock + kQueryRun + 2) * (dp + ep) + 2 * kQueryBlock * kKeyBlock;
  // Beside these: what the kernels in tiles keep (TileScratch and ShortTiles in cross_attn_amx.cpp) or the backward of
  // short sequences.
  const int64_t wide = dq > eq ? dq : eq;
  const int64_t tiles = kQueryRun * (dq / 2 + ep) + kKeyTile / 2 * (wide + dq + ep + 3 * kQueryBlock);
  const int64_t whole = kShortKeys * (3 * (dp + ep) + (dp > ep ? dp : ep) + 2 * kQueryBlock);
  const int64_t whole_tiles = kShortKeys * (wide + dq + eq + 3 * dp + 2 * ep + 7 * kQueryBlock) / 2 +
                              kQueryBlock / 2 * (dq + eq + dp + ep + wide);
  const int64_t larger = tiles > whole ? tiles : whole;
  return vectors + (larger > whole_tiles ? larger : whole_tiles);
}

const CrossAttnKernels& cross_attn_kernels() {
#ifdef VISTA_X86
  return choose(cross_attn_kernels_base, cross_attn_kernels_avx2, cross_attn_kernels_avx512, cross_attn_kernels_amx);
#else
  return cross_attn_kernels_base;
#endif
}

}  // namespace vista::cpu
