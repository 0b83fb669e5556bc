// Products of a warpgroup: accumulators of 64 x N in registers, fp32, from bf16 or fp16.
//
// The accumulators are those of mma.cuh: warp w of the warpgroup holds rows 16w to 16w + 15 as an Accumulator<N>. So
// store_accumulator and the like serve both. All 128 threads of the warpgroup (4 warps, the first a multiple of 4) call
// everything here together. A block with one producer warp and two consumer warpgroups:
//
//   constexpr int kStages = 3, kDepth = 64, kBytes = (128 + N) * kDepth * 2;
//   extern __shared__ __align__(1024) uint8_t shared[];    // per stage: A [128][64], then B [N][64], both swizzled
//   __shared__ Ring<kStages> ring;
//   if (threadIdx.x == 0) { ring.init(2); publish_barriers(); }    // two warpgroups release a stage
//   __syncthreads();
//   Turn<kStages> turn;
//   if (warpgroup == 2) {                                  // the producer
//     keep_registers<40>();
//     if (threadIdx.x == 256)
//       for (int step = 0; step < steps; ++step, turn.next()) {
//         uint8_t* stage = shared + turn.stage * kBytes;
//         ring.acquire(turn, kBytes);
//         load_tile(stage, map_a, row, step * kDepth, ring.full[turn.stage]);
//         load_tile(stage + 128 * 128, map_b, 0, step * kDepth, ring.full[turn.stage]);
//       }
//   } else {                                               // the consumers
//     claim_registers<232>();
//     Accumulator<N> acc;
//     for (int step = 0; step < steps; ++step, turn.next()) {
//       const uint8_t* stage = shared + turn.stage * kBytes;
//       ring.full[turn.stage].wait(turn.parity);
//       begin_products(acc);
//       multiply<T, kDepth>(acc, Operand<Major::kK, 128>(stage + warpgroup * 64 * 128),
//                           Operand<Major::kK, N>(stage + 128 * 128), step > 0);
//       commit_products();
//       wait_products<0>(acc);                             // <1>: the previous step's, whose stage is then released
//       if (threadIdx.x % 128 == 0) ring.empty[turn.stage].arrive();
//     }
//   }
#pragma once

#include "../mma.cuh"
#include "wgmma_instruction.cuh"

namespace vista::cuda::sm90 {

enum class Major { kK = 0, kMN = 1 };

// An operand in shared memory: panels of 128-byte lines with 128-byte swizzle, as load_tile lays them, one after the
// other, from a multiple of 1024 bytes on.
//
//   kK   A [M][K] or B [N][K]: a line is a row of 64 k; kLines = rows of the tile; the next 64 k are the next panel
//   kMN  A [K][M] or B [K][N]: a line is 64 m or n at one k; kLines = depth of the tile; the next 64 m, n the next
//   panel
//
// A part that begins at row 8i (kK) or k = 8i (kMN) of the tile is the operand at i * 1024 bytes with the tile's
// kLines.
template <Major kMajor_, int kLines>
class Operand {
 public:
  static constexpr Major kMajor = kMajor_;
  static_assert(kLines % 8 == 0);

  __device__ explicit Operand(const void* tile) : descriptor_(encode(shared_address(tile))) {}

  // At the 16 of k that step `k` multiplies.
  __device__ uint64_t step(int k) const {
    const int bytes = kMajor == Major::kK ? k / 4 * kPanel + k % 4 * 32 : k * 16 * 128;
    return descriptor_ + (bytes >> 4);
  }

 private:
  static constexpr uint64_t kPanel = kLines * 128;

  // Start, distance of panels, distance of 8 lines, in units of 16 bytes; 128-byte swizzle. Along k the instruction
  // reads one panel, so the distance of panels is not used.
  static __device__ uint64_t encode(uint32_t start) {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kGroup = uint64_t{1024 >> 4} << 32;
    constexpr uint64_t kNextPanel = (kMajor == Major::kK ? 1 : kPanel >> 4) << 16;
    return kSwizzle128 | kGroup | kNextPanel | (start & 0x3ffff) >> 4;
  }

  uint64_t descriptor_;
};

// A in registers: 16 of k for this warp's 16 rows.
using Fragment = uint32_t[4];

// Columns 16k to 16k + 15 of an accumulator, rounded, as the A operand of another product.
template <class T, int J>
__device__ inline void to_fragment(Fragment& a, const float (&acc)[J][4], int k) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pack2(acc[2 * k + i / 2][i % 2 * 2], acc[2 * k + i / 2][i % 2 * 2 + 1], T{});
}

// The compiler does not see that products write the accumulators until they are waited for: it must not move its own
// accesses past this.
template <int J>
__device__ inline void pin(float (&acc)[J][4]) {
#pragma unroll
  for (int j = 0; j < J; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(acc[j][i])::"memory");
}

// Before the first product after the threads have written accumulators or fragments.
template <class... Accumulators>
__device__ inline void begin_products(Accumulators&... acc) {
  (pin(acc), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// acc += A B^T over kDepth of k, or = if not `accumulate`. Before wait_products nobody writes the operands' shared
// memory, and nobody writes or reads acc or the fragments: the PTX ISA leaves any access to registers of a product that
// is under way undefined (wgmma.wait_group).
template <class T, int kDepth, int J, Major kMajorA, int kLinesA, Major kMajorB, int kLinesB>
__device__ inline void multiply(float (&acc)[J][4], const Operand<kMajorA, kLinesA>& a,
                                const Operand<kMajorB, kLinesB>& b, bool accumulate) {
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k)
    Instruction<T, J * 8>::template run<static_cast<int>(kMajorA), static_cast<int>(kMajorB)>(acc, a.step(k), b.step(k),
                                                                                              accumulate || k > 0);
}

template <class T, int J, int K, Major kMajorB, int kLinesB>
__device__ inline void multiply(float (&acc)[J][4], const Fragment (&a)[K], const Operand<kMajorB, kLinesB>& b,
                                bool accumulate) {
#pragma unroll
  for (int k = 0; k < K; ++k)
    Instruction<T, J * 8>::template run<static_cast<int>(kMajorB)>(acc, a[k], b.step(k), accumulate || k > 0);
}

__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kLeft of the committed groups are under way. Name the accumulators that are complete then. Products are
// the warpgroup's: what they read in shared memory, for whichever warp, has been read.
template <int kLeft, class... Accumulators>
__device__ inline void wait_products(Accumulators&... acc) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
  (pin(acc), ...);
}

}  // namespace vista::cuda::sm90
