// Rows of values of any dtype as vectors of float, without a detour through a buffer.
#pragma once

#include "lanes.h"
#include "row_vectors.h"

namespace vista::cpu {
namespace VISTA_ISA {

// A row of any dtype, kLanes values at a time; what lies beyond its end reads as zeros and is not written.
template <DType kDType, typename Value>
struct ValueRow {
  Value* base;
  int64_t n;

  vf at(int64_t i) const {
    if (i + kLanes <= n) return read<kDType>(static_cast<const char*>(base) + i * value_bytes(kDType));
    float part[kLanes];
    load_row(kDType, base, i, part, least(n - i, kLanes), kLanes);
    return load(part);
  }

  void put_at(int64_t i, vf x) const {
    if (i + kLanes <= n) return put<kDType>(static_cast<char*>(base) + i * value_bytes(kDType), x, false);
    float part[kLanes];
    store(part, x);
    store_row(kDType, base, i, part, n - i);
  }
};

template <DType kDType>
ValueRow<kDType, const void> row_of(const void* base, int64_t row, int64_t dim) {
  return {static_cast<const char*>(base) + row * dim * value_bytes(kDType), dim};
}
template <DType kDType>
ValueRow<kDType, void> row_of(void* base, int64_t row, int64_t dim) {
  return {static_cast<char*>(base) + row * dim * value_bytes(kDType), dim};
}

}  // namespace VISTA_ISA
}  // namespace vista::cpu
