// The small matrix products of a warp: 16 x N accumulators from operands in shared memory, in three forms.
//
// Every Math keeps the accumulators as mma.m16n8 does: thread (g = lane / 4, t = lane % 4) holds of each 8 columns the
// rows g and g + 8 and the columns 2t and 2t + 1 as acc[j] = {(g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)}. So kernels
// are written once for all. Operands are row-major with pitches (in elements) that keep the rows 16-byte aligned; an
// odd pitch in 16-byte units avoids bank conflicts.
#pragma once

#include "async_copy.cuh"
#include "dtype.cuh"

namespace vista::cuda {

template <int N>
using Accumulator = float[N / 8][4];

// The left operand [16][K] of a product, as mma.m16n8k16 takes it: the 16 columns k are where an accumulator of 16 rows
// has its columns 16 k, so that a result becomes an operand, and an operand meets a result, without leaving registers.
template <int K>
using Fragments = uint32_t[K / 16][4];

template <int N>
__device__ inline void clear(Accumulator<N>& acc) {
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[j][i] = 0.f;
}

__device__ inline int lane_id() { return threadIdx.x % 32; }

__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// bf16 and fp16: m16n8k16, operands by ldmatrix.
template <class Element>
struct MmaMath {
  using T = Element;

  // acc += A^T B, A [K][16], B [K][N]
  template <int K, int N, int kPitchA, int kPitchB>
  static __device__ void tn(Accumulator<N>& acc, const T* a, const T* b) {
    product<K, N, Operand<16 * kPitchA, 0, true>, Operand<16 * kPitchB, 16, true>>(acc, blocks_across<kPitchA>(a),
                                                                                   blocks_down<kPitchB>(b));
  }

  // acc += A B, A [16][K], B [K][N]
  template <int K, int N, int kPitchA, int kPitchB>
  static __device__ void nn(Accumulator<N>& acc, const T* a, const T* b) {
    product<K, N, Operand<16, 0, false>, Operand<16 * kPitchB, 16, true>>(acc, blocks_down<kPitchA>(a),
                                                                          blocks_down<kPitchB>(b));
  }

  // acc += A B^T, A [16][K], B [N][K]
  template <int K, int N, int kPitchA, int kPitchB>
  static __device__ void nt(Accumulator<N>& acc, const T* a, const T* b) {
    product<K, N, Operand<16, 0, false>, Operand<16, 16 * kPitchB, false>>(acc, blocks_down<kPitchA>(a),
                                                                           blocks_across<kPitchB>(b));
  }

  // The left operand A [16][K] from shared memory; the products below keep it in registers.
  template <int K, int kPitch>
  static __device__ void load(Fragments<K>& a, const T* rows) {
    const uint32_t from = blocks_down<kPitch>(rows);
#pragma unroll
    for (int k = 0; k < K / 16; ++k) Operand<16, 0, false>::load(a[k], from, k, 0);
  }

  // acc += A B, B [K][N]
  template <int K, int N, int kPitchB>
  static __device__ void nn(Accumulator<N>& acc, const Fragments<K>& a, const T* b) {
    product<K, N, Operand<16 * kPitchB, 16, true>>(acc, a, blocks_down<kPitchB>(b));
  }

  // acc += A B^T, B [N][K]
  template <int K, int N, int kPitchB>
  static __device__ void nt(Accumulator<N>& acc, const Fragments<K>& a, const T* b) {
    product<K, N, Operand<16, 16 * kPitchB, false>>(acc, a, blocks_across<kPitchB>(b));
  }

 private:
  // By how many elements 16 of k and 16 of n move it, and whether its 8 x 8 blocks are transposed on the way.
  template <int kOfK, int kOfN, bool kTransposed>
  struct Operand {
    static __device__ void load(uint32_t (&r)[4], uint32_t base, int k, int n) {
      const uint32_t address = base + (k * kOfK + n * kOfN) * sizeof(T);
      if constexpr (kTransposed)
        load_matrices_transposed(r, address);
      else
        load_matrices(r, address);
    }
  };

  // This lane's row address for the four 8 x 8 blocks of a 16 x 16 one: downwards first, or across first.
  template <int kPitch>
  static __device__ uint32_t blocks_down(const T* at) {
    const int lane = lane_id();
    return shared_address(at + lane % 16 * kPitch + lane / 16 * 8);
  }
  template <int kPitch>
  static __device__ uint32_t blocks_across(const T* at) {
    const int lane = lane_id();
    return shared_address(at + (lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 8);
  }

  template <int K, int N, class B>
  static __device__ void product(Accumulator<N>& acc, const Fragments<K>& a, uint32_t from_b) {
#pragma unroll
    for (int k = 0; k < K / 16; ++k) add_products<N, B>(acc, a[k], from_b, k);
  }

  template <int K, int N, class A, class B>
  static __device__ void product(Accumulator<N>& acc, uint32_t from_a, uint32_t from_b) {
#pragma unroll
    for (int k = 0; k < K / 16; ++k) {
      uint32_t a[4];
      A::load(a, from_a, k, 0);
      add_products<N, B>(acc, a, from_b, k);
    }
  }

  template <int N, class B>
  static __device__ void add_products(Accumulator<N>& acc, const uint32_t (&a)[4], uint32_t from_b, int k) {
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      uint32_t b[4];
      B::load(b, from_b, k, n);
      mma(acc[2 * n], a, b[0], b[1], T{});
      mma(acc[2 * n + 1], a, b[2], b[3], T{});
    }
  }
};

// fp32 rounded to tf32 as it leaves shared memory: m16n8k8.
struct Tf32Math {
  using T = float;

  // The order of the summands is free: taking the rows 2t and 2t + 1 for the k of t and t + 4 keeps the banks apart.
  template <int K, int N, int kPitchA, int kPitchB>
  static __device__ void tn(Accumulator<N>& acc, const float* a, const float* b) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    const float *from_a = a + 2 * t * kPitchA + g, *from_b = b + 2 * t * kPitchB + g;
#pragma unroll
    for (int k = 0; k < K; k += 8) {
      const float* row = from_a + k * kPitchA;
      const uint32_t fragment[4] = {round(row[0]), round(row[8]), round(row[kPitchA]), round(row[kPitchA + 8])};
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const float* column = from_b + k * kPitchB + 8 * j;
        mma_tf32(acc[j], fragment, round(column[0]), round(column[kPitchB]));
      }
    }
  }

  template <int K, int N, int kPitchA, int kPitchB>
  static __device__ void nn(Accumulator<N>& acc, const float* a, const float* b) {
    rows_times<K, N, kPitchA, kPitchB, 1>(acc, a, b);
  }

  template <int K, int N, int kPitchA, int kPitchB>
  static __device__ void nt(Accumulator<N>& acc, const float* a, const float* b) {
    rows_times<K, N, kPitchA, 1, kPitchB>(acc, a, b);
  }

 private:
  static __device__ uint32_t round(float x) {
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
  }

  template <int K, int N, int kPitchA, int kStepK, int kStepN>
  static __device__ void rows_times(Accumulator<N>& acc, const float* a, const float* b) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    const float *from_a = a + g * kPitchA + t, *from_b = b + t * kStepK + g * kStepN;
#pragma unroll
    for (int k = 0; k < K; k += 8) {
      const float* row = from_a + k;
      const uint32_t fragment[4] = {round(row[0]), round(row[8 * kPitchA]), round(row[4]), round(row[8 * kPitchA + 4])};
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const float* column = from_b + k * kStepK + 8 * j * kStepN;
        mma_tf32(acc[j], fragment, round(column[0]), round(column[4 * kStepK]));
      }
    }
  }
};

// True fp32.
struct FmaMath {
  using T = float;

  template <int K, int N, int kPitchA, int kPitchB>
  static __device__ void tn(Accumulator<N>& acc, const float* a, const float* b) {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll(N < 128 ? 4 : 1)
    for (int k = 0; k < K; ++k) outer(acc, a[k * kPitchA + g], a[k * kPitchA + g + 8], b + k * kPitchB + 2 * t);
  }

  template <int K, int N, int kPitchA, int kPitchB>
  static __device__ void nn(Accumulator<N>& acc, const float* a, const float* b) {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll 1
    for (int k = 0; k < K; k += 4) {
      float upper[4], lower[4];
      unpack_vector<float>(load_vector(a + g * kPitchA + k), upper);
      unpack_vector<float>(load_vector(a + (g + 8) * kPitchA + k), lower);
#pragma unroll
      for (int i = 0; i < 4; ++i) outer(acc, upper[i], lower[i], b + (k + i) * kPitchB + 2 * t);
    }
  }

  template <int K, int N, int kPitchA, int kPitchB>
  static __device__ void nt(Accumulator<N>& acc, const float* a, const float* b) {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll 1
    for (int k = 0; k < K; k += 4) {
      float upper[4], lower[4];
      unpack_vector<float>(load_vector(a + g * kPitchA + k), upper);
      unpack_vector<float>(load_vector(a + (g + 8) * kPitchA + k), lower);
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        float even[4], odd[4];
        unpack_vector<float>(load_vector(b + (8 * j + 2 * t) * kPitchB + k), even);
        unpack_vector<float>(load_vector(b + (8 * j + 2 * t + 1) * kPitchB + k), odd);
#pragma unroll
        for (int i = 0; i < 4; ++i) add(acc[j], upper[i], lower[i], even[i], odd[i]);
      }
    }
  }

 private:
  static __device__ void add(float (&c)[4], float upper, float lower, float even, float odd) {
    c[0] = fmaf(upper, even, c[0]);
    c[1] = fmaf(upper, odd, c[1]);
    c[2] = fmaf(lower, even, c[2]);
    c[3] = fmaf(lower, odd, c[3]);
  }

  template <int J>
  static __device__ void outer(float (&acc)[J][4], float upper, float lower, const float* row) {
#pragma unroll
    for (int j = 0; j < J; ++j) {
      const float2 two = load_pair(row + 8 * j);
      add(acc[j], upper, lower, two.x, two.y);
    }
  }
};

}  // namespace vista::cuda
