#include "vista/crc32.h"

#include <array>
#include <cstring>

#ifdef VISTA_X86
#include <immintrin.h>
#endif

namespace vista::cpu {
namespace {

constexpr uint32_t kPolynomial = 0xEDB88320;  // bit 31 is the coefficient of x^0

constexpr uint32_t times_x(uint32_t value) { return (value >> 1) ^ (value & 1 ? kPolynomial : 0); }

// tables[k][b]: byte b followed by k zero bytes.
constexpr std::array<std::array<uint32_t, 256>, 8> make_tables() {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = times_x(value);
    tables[0][byte] = value;
  }
  for (size_t k = 1; k < 8; ++k)
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 255];
    }
  return tables;
}

constexpr auto kTables = make_tables();

// The register without zlib's complement before and after.
uint32_t advance(uint32_t state, const unsigned char* data, size_t size) {
  for (; size >= 8; size -= 8, data += 8) {
    uint32_t low, high;
    std::memcpy(&low, data, 4);
    std::memcpy(&high, data + 4, 4);
    low ^= state;
    state = kTables[7][low & 255] ^ kTables[6][low >> 8 & 255] ^ kTables[5][low >> 16 & 255] ^ kTables[4][low >> 24] ^
            kTables[3][high & 255] ^ kTables[2][high >> 8 & 255] ^ kTables[1][high >> 16 & 255] ^
            kTables[0][high >> 24];
  }
  for (; size > 0; --size, ++data) state = (state >> 8) ^ kTables[0][(state ^ *data) & 255];
  return state;
}

#ifdef VISTA_X86

// x^n modulo the polynomial, as the carry-less product of bit-reversed operands needs it: shifted by one.
constexpr int64_t power_of_x(int n) {
  uint32_t value = 0x80000000;
  for (int i = 0; i < n; ++i) value = times_x(value);
  return static_cast<int64_t>(static_cast<uint64_t>(value) << 1);
}

#define VISTA_CLMUL __attribute__((target("pclmul,sse4.1")))

VISTA_CLMUL inline __m128i load(const unsigned char* data) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

// Moves 16 bytes ahead by the distance that `powers` stands for and adds what lies there. The halves differ by 64 bits.
VISTA_CLMUL inline __m128i fold(__m128i value, __m128i powers, __m128i there) {
  const __m128i low = _mm_clmulepi64_si128(value, powers, 0x00), high = _mm_clmulepi64_si128(value, powers, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), there);
}

// For at least 64 bytes. Four lanes hide the latency of the product. What is left in the end are 16 bytes with the
// same remainder as all that was read.
VISTA_CLMUL uint32_t advance_clmul(uint32_t state, const unsigned char* data, size_t size) {
  constexpr int kLane = 128;
  const __m128i by_four = _mm_set_epi64x(power_of_x(4 * kLane - 32), power_of_x(4 * kLane + 32));
  const __m128i by_one = _mm_set_epi64x(power_of_x(kLane - 32), power_of_x(kLane + 32));
  __m128i lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = load(data + 16 * i);
  lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(static_cast<int>(state)));
  for (data += 64, size -= 64; size >= 64; data += 64, size -= 64)
    for (int i = 0; i < 4; ++i) lanes[i] = fold(lanes[i], by_four, load(data + 16 * i));
  __m128i rest = lanes[0];
  for (int i = 1; i < 4; ++i) rest = fold(rest, by_one, lanes[i]);
  for (; size >= 16; data += 16, size -= 16) rest = fold(rest, by_one, load(data));
  alignas(16) unsigned char bytes[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(bytes), rest);
  return advance(advance(0, bytes, 16), data, size);
}

#undef VISTA_CLMUL

bool has_clmul() {
  static const bool has = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  return has;
}

#endif

}  // namespace

uint32_t crc32_base(uint32_t crc, const void* data, size_t size) {
  return ~advance(~crc, static_cast<const unsigned char*>(data), size);
}

uint32_t crc32(uint32_t crc, const void* data, size_t size) {
#ifdef VISTA_X86
  if (size >= 64 && has_clmul()) return ~advance_clmul(~crc, static_cast<const unsigned char*>(data), size);
#endif
  return crc32_base(crc, data, size);
}

}  // namespace vista::cpu
