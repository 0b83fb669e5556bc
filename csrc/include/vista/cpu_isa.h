// The widest instruction set of csrc/cpu that this processor runs.
#pragma once

namespace vista::cpu {

enum class Isa { kBase, kAvx2, kAvx512 };

inline Isa best_isa() {
#ifdef VISTA_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("avx512vnni"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::kAvx2;
#endif
  return Isa::kBase;
}

// One of three tables of function pointers.
template <typename Kernels>
const Kernels& choose(const Kernels& base, const Kernels& avx2, const Kernels& avx512) {
  static const Isa isa = best_isa();
  return isa == Isa::kAvx512 ? avx512 : (isa == Isa::kAvx2 ? avx2 : base);
}

}  // namespace vista::cpu
