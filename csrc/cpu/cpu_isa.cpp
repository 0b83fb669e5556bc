#include "vista/cpu_isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(VISTA_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vista::cpu {
namespace {

// Linux hands out the tiles' registers, 8 KB a thread, to processes that ask (kernel documentation, x86/xstate). Asking
// twice is harmless.
bool tiles_granted() {
#if defined(VISTA_X86) && defined(__linux__) && defined(__x86_64__)
  constexpr unsigned kTileBits = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTileBits) != kTileBits) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa widest_isa() {
#ifdef VISTA_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("avx512vnni"))
    return tiles_granted() ? Isa::kAmx : Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::kAvx2;
#endif
  return Isa::kBase;
}

Isa chosen_isa() {
  const Isa widest = widest_isa();
  const char* name = std::getenv("VISTA_CPU_ISA");
  if (name == nullptr || *name == '\0') return widest;
  constexpr int kCount = sizeof kIsaNames / sizeof *kIsaNames;
  std::string known;
  for (int i = 0; i < kCount; ++i) {
    if (std::string(name) == kIsaNames[i]) {
      if (static_cast<Isa>(i) <= widest) return static_cast<Isa>(i);
      throw std::runtime_error(
          std::string("VISTA_CPU_ISA must be an instruction set of this processor, the widest is ") +
          kIsaNames[static_cast<int>(widest)] + ", found " + name);
    }
    known += std::string(i == 0 ? "" : (i + 1 < kCount ? ", " : " or ")) + kIsaNames[i];
  }
  throw std::runtime_error("VISTA_CPU_ISA must be " + known + ", found '" + name + "'");
}

}  // namespace

Isa best_isa() {
  static const Isa isa = chosen_isa();
  return isa;
}

}  // namespace vista::cpu
