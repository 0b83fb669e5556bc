// Stored records taken apart into headers and rows, many at a time and checksummed: what every store ends its reads
// with.
#pragma once

#include <pybind11/numpy.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace vista::host {

struct RecordSource {
  const char* data = nullptr;  // null: there is no such record
  size_t size = 0;
};

using Bytes = pybind11::array_t<uint8_t, pybind11::array::c_style>;
using Sizes = pybind11::array_t<int64_t, pybind11::array::c_style>;
using Checksums = pybind11::array_t<uint32_t, pybind11::array::c_style>;

// Where n records go, and what a reader must know to judge each.
struct RecordSink {
  // Throws std::invalid_argument unless the arrays fit each other and can be written.
  RecordSink(Bytes& headers, Bytes& rows, Sizes& sizes, Checksums& checksums);

  char* headers;        // n x 64
  char* rows;           // n x row_bytes; zeros where no record of the right size is
  int64_t* sizes;       // bytes that were found, -1 for no record
  uint32_t* checksums;  // of the record as it was copied, its checksum field taken as zero
  size_t count;
  size_t row_bytes;
};

// Needs no GIL. With `from_disk` the sources are mapped file pages, all of which are asked for before any is touched.
void unpack_records(const std::vector<RecordSource>& sources, const RecordSink& sink, bool from_disk);

}  // namespace vista::host
