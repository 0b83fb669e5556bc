// What CUTLASS's visitor trees compute here, on fragments of fp32 values.
#pragma once

#include <cutlass/numeric_types.h>

#include "../common/activation.cuh"

namespace vista::cuda {

template <class T>
using CutlassType = std::conditional_t<std::is_same_v<T, Half>, cutlass::half_t, cutlass::bfloat16_t>;

using Silu = Phi<Activation::kSilu>;

// The fp32 values are rounded to 16 bits next, whichever: Phi wants to know that much.
template <class Fragment>
struct SiluOf {
  CUTLASS_DEVICE Fragment operator()(const Fragment& pre) const {
    Fragment out;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Fragment::kElements; ++i) out[i] = Silu::value<BFloat16>(pre[i]);
    return out;
  }
};

template <class Fragment>
struct SiluGradient {
  CUTLASS_DEVICE Fragment operator()(const Fragment& pre, const Fragment& grad) const {
    Fragment out;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Fragment::kElements; ++i) {
      float x = pre[i];
      out[i] = grad[i] * Silu::slope<BFloat16>(x);
    }
    return out;
  }
};

}  // namespace vista::cuda
