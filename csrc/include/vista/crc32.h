// The CRC-32 of zlib, PNG and Ethernet, at the speed of memory: what a record carries.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vista::cpu {

// `crc` is that of the bytes before, 0 at the start, as in zlib's crc32().
uint32_t crc32(uint32_t crc, const void* data, size_t size);

// The same without special instructions.
uint32_t crc32_base(uint32_t crc, const void* data, size_t size);

}  // namespace vista::cpu
