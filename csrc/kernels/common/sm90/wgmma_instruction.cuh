// wgmma.mma_async m64nNk16 with fp32 accumulators as one function per shape and element. The text of the instruction
// names every register, hence the macros, which end with this file.
#pragma once

#include "../dtype.cuh"

namespace vista::cuda::sm90 {

// d (+)= A B, of which A lies in shared memory or in registers and B in shared memory. Major 0: along k, 1: along m or
// n.
template <class T, int N>
struct Instruction;

// Places in the text and operands of 16 accumulators: a fragment's columns 8j to 8j + 31.
#define VISTA_PLACES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define VISTA_PLACES_1 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define VISTA_PLACES_2 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define VISTA_PLACES_3 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define VISTA_PLACES_4 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define VISTA_PLACES_5 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define VISTA_PLACES_6 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define VISTA_PLACES_7 \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define VISTA_PLACES_32 VISTA_PLACES_0
#define VISTA_PLACES_64 VISTA_PLACES_32 VISTA_PLACES_1
#define VISTA_PLACES_96 VISTA_PLACES_64 VISTA_PLACES_2
#define VISTA_PLACES_128 VISTA_PLACES_96 VISTA_PLACES_3
#define VISTA_PLACES_192 VISTA_PLACES_128 VISTA_PLACES_4 VISTA_PLACES_5
#define VISTA_PLACES_256 VISTA_PLACES_192 VISTA_PLACES_6 VISTA_PLACES_7

#define VISTA_FOUR(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define VISTA_SIXTEEN(j) VISTA_FOUR(j), VISTA_FOUR(j + 1), VISTA_FOUR(j + 2), VISTA_FOUR(j + 3)
#define VISTA_SUMS_32 VISTA_SIXTEEN(0)
#define VISTA_SUMS_64 VISTA_SUMS_32, VISTA_SIXTEEN(4)
#define VISTA_SUMS_96 VISTA_SUMS_64, VISTA_SIXTEEN(8)
#define VISTA_SUMS_128 VISTA_SUMS_96, VISTA_SIXTEEN(12)
#define VISTA_SUMS_192 VISTA_SUMS_128, VISTA_SIXTEEN(16), VISTA_SIXTEEN(20)
#define VISTA_SUMS_256 VISTA_SUMS_192, VISTA_SIXTEEN(24), VISTA_SIXTEEN(28)

// P0 to P6: the places behind the accumulators.
#define VISTA_WGMMA_OF(T, TYPE, N, P0, P1, P2, P3, P4, P5, P6)                                              \
  template <>                                                                                               \
  struct Instruction<T, N> {                                                                                \
    template <int kMajorA, int kMajorB>                                                                     \
    static __device__ void run(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool accumulate) {             \
      asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " P2                                 \
                   ", 0;\n"                                                                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" VISTA_PLACES_##N    \
                   "}, " P0 ", " P1 ", accumulate, 1, 1, " P3 ", " P4 ";\n}"                                \
                   : VISTA_SUMS_##N                                                                         \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kMajorA), "n"(kMajorB));        \
    }                                                                                                       \
    template <int kMajorB>                                                                                  \
    static __device__ void run(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) { \
      asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " P5                                 \
                   ", 0;\n"                                                                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" VISTA_PLACES_##N    \
                   "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", accumulate, 1, 1, " P6 ";\n}"              \
                   : VISTA_SUMS_##N                                                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), \
                     "n"(kMajorB));                                                                         \
    }                                                                                                       \
  };
#define VISTA_WGMMA(N, ...)                        \
  VISTA_WGMMA_OF(BFloat16, "bf16", N, __VA_ARGS__) \
  VISTA_WGMMA_OF(Half, "f16", N, __VA_ARGS__)

VISTA_WGMMA(32, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
VISTA_WGMMA(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
VISTA_WGMMA(96, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
VISTA_WGMMA(128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
VISTA_WGMMA(192, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
VISTA_WGMMA(256, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

#undef VISTA_WGMMA
#undef VISTA_WGMMA_OF
#undef VISTA_SUMS_256
#undef VISTA_SUMS_192
#undef VISTA_SUMS_128
#undef VISTA_SUMS_96
#undef VISTA_SUMS_64
#undef VISTA_SUMS_32
#undef VISTA_SIXTEEN
#undef VISTA_FOUR
#undef VISTA_PLACES_256
#undef VISTA_PLACES_192
#undef VISTA_PLACES_128
#undef VISTA_PLACES_96
#undef VISTA_PLACES_64
#undef VISTA_PLACES_32
#undef VISTA_PLACES_7
#undef VISTA_PLACES_6
#undef VISTA_PLACES_5
#undef VISTA_PLACES_4
#undef VISTA_PLACES_3
#undef VISTA_PLACES_2
#undef VISTA_PLACES_1
#undef VISTA_PLACES_0

}  // namespace vista::cuda::sm90
