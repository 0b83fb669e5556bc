// What this machine does at best: a copy past the caches, and multiply-adds out of registers. bench/floors.py compiles
// this for the machine that it runs on; nothing of it is part of the package.
#include <cstddef>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
typedef float Vector __attribute__((vector_size(64)));
#else
typedef float Vector __attribute__((vector_size(32)));
#endif
constexpr int kChains = 12;  // enough to hide the latency of an add, few enough for 16 registers

void copy_once(char* target, const char* source, std::size_t bytes) {
#if defined(__AVX512F__)
  for (std::size_t i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(source + i));
  _mm_sfence();
#elif defined(__AVX2__)
  for (std::size_t i = 0; i < bytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
  _mm_sfence();
#else
  std::memcpy(target, source, bytes);
#endif
}

}  // namespace

// Bytes: a multiple of 64; the target aligned to 64.
extern "C" void copy_past_caches(char* target, const char* source, std::size_t bytes, long repeats) {
  for (long i = 0; i < repeats; ++i) copy_once(target, source, bytes);
}

extern "C" void copy_through_caches(char* target, const char* source, std::size_t bytes, long repeats) {
  for (long i = 0; i < repeats; ++i) std::memcpy(target, source, bytes);
}

// Returns a sum, so that none of it is left out; `flops` in a round: see below.
extern "C" float multiply_add(float start, long rounds) {
  Vector sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = Vector{} + (start + static_cast<float>(i));
  const Vector factor = Vector{} + 0.5f, term = Vector{} + start;
  for (long round = 0; round < rounds; ++round)
    for (int i = 0; i < kChains; ++i) sums[i] = sums[i] * factor + term;
  float total = 0;
  for (int i = 0; i < kChains; ++i) total += sums[i][0];
  return total;
}

extern "C" long flops_of_a_round() { return 2L * kChains * static_cast<long>(sizeof(Vector) / sizeof(float)); }
