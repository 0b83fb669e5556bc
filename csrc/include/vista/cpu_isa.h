// The instruction sets of csrc/cpu, and the one in use.
#pragma once

namespace vista::cpu {

// Each includes those before it. kAmx: AVX-512 and bfloat16 tiles.
enum class Isa { kBase, kAvx2, kAvx512, kAmx };
constexpr const char* kIsaNames[] = {"base", "avx2", "avx512", "amx"};  // in that order

// The widest that this processor and system run, or the one that VISTA_CPU_ISA names (base, avx2, avx512, amx). Throws
// std::runtime_error for another name, and for one that does not run here.
Isa best_isa();

// One of the tables of function pointers; kernels without tiles of their own use those of AVX-512.
template <typename Kernels>
const Kernels& choose(const Kernels& base, const Kernels& avx2, const Kernels& avx512, const Kernels& amx) {
  static const Isa isa = best_isa();
  return isa == Isa::kAmx ? amx : (isa == Isa::kAvx512 ? avx512 : (isa == Isa::kAvx2 ? avx2 : base));
}
template <typename Kernels>
const Kernels& choose(const Kernels& base, const Kernels& avx2, const Kernels& avx512) {
  return choose(base, avx2, avx512, avx512);
}

}  // namespace vista::cpu
