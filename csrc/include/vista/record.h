// A stored summary: this header, then the quantized row of row_layout.h. docs/row_layout.md is it in prose;
// vista_ext._C.record_header_layout is its Python view, and vista_ext.store.record builds its numpy dtype from that.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace vista {

constexpr uint32_t kRecordMagic = 0x41545356;  // the bytes "VSTA"
constexpr uint16_t kRecordFormat = 1;

struct RecordHeader {
  uint32_t magic;
  uint16_t format;
  uint8_t scheme;  // RowScheme
  uint8_t flags;   // 0; 1: an erasure, which is a header alone with zeros for the layout (vista_ext/store/erasure.py)
  uint32_t tokens;
  uint32_t dim;
  uint32_t group;
  uint32_t row_bytes;
  int64_t user_id;
  uint64_t model_version;
  int64_t event_time;    // seconds: how fresh the history was that was summarized
  uint32_t crc32;        // zlib's polynomial, over this header with this field zero, then the row
  uint8_t reserved[12];  // zero
};

// Readers take the bytes as they lie: any hole or swap would be another format.
static_assert(sizeof(RecordHeader) == 64 && std::is_trivially_copyable_v<RecordHeader>);
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "records are little-endian");

struct RecordField {
  const char* name;
  const char* type;  // in numpy's notation
  size_t offset;
};

template <typename T>
constexpr const char* record_type() {
  if (std::is_array_v<T>) return "|V12";  // named too: numpy copies no hole
  if (sizeof(T) == 1) return "<u1";
  if (sizeof(T) == 2) return "<u2";
  if (sizeof(T) == 4) return "<u4";
  return std::is_signed_v<T> ? "<i8" : "<u8";
}

#define VISTA_RECORD_FIELD(name) \
  RecordField { #name, record_type<decltype(RecordHeader::name)>(), offsetof(RecordHeader, name) }

constexpr std::array<RecordField, 13> kRecordFields{
    VISTA_RECORD_FIELD(magic),         VISTA_RECORD_FIELD(format),     VISTA_RECORD_FIELD(scheme),
    VISTA_RECORD_FIELD(flags),         VISTA_RECORD_FIELD(tokens),     VISTA_RECORD_FIELD(dim),
    VISTA_RECORD_FIELD(group),         VISTA_RECORD_FIELD(row_bytes),  VISTA_RECORD_FIELD(user_id),
    VISTA_RECORD_FIELD(model_version), VISTA_RECORD_FIELD(event_time), VISTA_RECORD_FIELD(crc32),
    VISTA_RECORD_FIELD(reserved)};

#undef VISTA_RECORD_FIELD

}  // namespace vista
