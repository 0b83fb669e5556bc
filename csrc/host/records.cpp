#include "records.h"

#include <pybind11/stl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

#include "bindings.h"
#include "vista/crc32.h"
#include "vista/record.h"

namespace py = pybind11;

namespace vista::host {
namespace {

constexpr size_t kHeaderBytes = sizeof(RecordHeader);
constexpr size_t kBytesPerThread = 1 << 20;  // below this a thread costs more than it saves

uint32_t checksum(const char* header, const char* row, size_t row_bytes) {
  RecordHeader copy;
  std::memcpy(&copy, header, kHeaderBytes);
  copy.crc32 = 0;
  return cpu::crc32(cpu::crc32(0, &copy, kHeaderBytes), row, row_bytes);
}

// Calls task(i) for every i below count, in any order.
template <typename Task>
void in_parallel(size_t count, size_t bytes, const Task& task) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < count; i = next++) task(i);
  };
  const size_t wanted =
      std::min<size_t>(bytes / kBytesPerThread + 1, std::max(1U, std::thread::hardware_concurrency()));
  std::vector<std::thread> helpers;
  helpers.reserve(wanted);
  try {
    while (helpers.size() + 1 < wanted) helpers.emplace_back(work);
  } catch (const std::system_error&) {  // the system has no thread left: those there are do it
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

void ask_for(const RecordSource& source) {
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(source.data) / page * page;
  const auto end = reinterpret_cast<uintptr_t>(source.data) + source.size;
  // Advice only: a kernel that does not take it reads the pages when they are touched.
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED);
}

template <typename Array>
void require(bool fits, const char* name, const std::string& expected, const Array& found) {
  if (fits) return;
  std::string shape;
  for (py::ssize_t i = 0; i < found.ndim(); ++i) shape += (i ? ", " : "") + std::to_string(found.shape(i));
  throw std::invalid_argument(std::string(name) + " must be a writable array [" + expected + "], found [" + shape +
                              "]");
}

RecordSource bytes_of(const py::buffer_info& info) {
  if (info.ndim > 1 || (info.ndim == 1 && info.shape[0] > 1 && info.strides[0] != info.itemsize))
    throw std::invalid_argument("a record must be contiguous bytes");
  return {static_cast<const char*>(info.ptr), static_cast<size_t>(info.size * info.itemsize)};
}

}  // namespace

RecordSink::RecordSink(Bytes& headers, Bytes& rows, Sizes& sizes, Checksums& checksums) {
  require(rows.ndim() == 2 && rows.writeable(), "rows", "n, row_bytes", rows);
  const py::ssize_t n = rows.shape(0);
  const std::string name = std::to_string(n);
  require(headers.ndim() == 2 && headers.shape(0) == n && headers.shape(1) == kHeaderBytes && headers.writeable(),
          "headers", name + ", " + std::to_string(kHeaderBytes), headers);
  require(sizes.ndim() == 1 && sizes.shape(0) == n && sizes.writeable(), "sizes", name, sizes);
  require(checksums.ndim() == 1 && checksums.shape(0) == n && checksums.writeable(), "checksums", name, checksums);
  this->headers = reinterpret_cast<char*>(headers.mutable_data());
  this->rows = reinterpret_cast<char*>(rows.mutable_data());
  this->sizes = sizes.mutable_data();
  this->checksums = checksums.mutable_data();
  count = static_cast<size_t>(n);
  row_bytes = static_cast<size_t>(rows.shape(1));
}

void unpack_records(const std::vector<RecordSource>& sources, const RecordSink& sink, bool from_disk) {
  const size_t bytes = sources.size() * (kHeaderBytes + sink.row_bytes);
  if (from_disk)
    in_parallel(sources.size(), bytes, [&](size_t i) {
      if (sources[i].data != nullptr) ask_for(sources[i]);
    });
  in_parallel(sources.size(), bytes, [&](size_t i) {
    const RecordSource& source = sources[i];
    char* header = sink.headers + i * kHeaderBytes;
    char* row = sink.rows + i * sink.row_bytes;
    sink.sizes[i] = source.data == nullptr ? -1 : static_cast<int64_t>(source.size);
    if (source.data == nullptr || source.size != kHeaderBytes + sink.row_bytes) {
      std::memset(header, 0, kHeaderBytes);
      std::memset(row, 0, sink.row_bytes);
      sink.checksums[i] = 0;
      return;
    }
    std::memcpy(header, source.data, kHeaderBytes);
    std::memcpy(row, source.data + kHeaderBytes, sink.row_bytes);
    sink.checksums[i] = checksum(header, row, sink.row_bytes);  // of the copy: it is what the caller gets
  });
}

void bind_records(py::module_& module) {
  module.def(
      "unpack_records",
      [](const std::vector<std::optional<py::buffer>>& values, Bytes headers, Bytes rows, Sizes sizes,
         Checksums checksums) {
        const RecordSink sink(headers, rows, sizes, checksums);
        if (values.size() != sink.count)
          throw std::invalid_argument("values must be as many as the rows, " + std::to_string(sink.count) + ", found " +
                                      std::to_string(values.size()));
        std::vector<py::buffer_info> held;  // keeps the bytes in place without the GIL
        std::vector<RecordSource> sources(values.size());
        held.reserve(values.size());
        for (size_t i = 0; i < values.size(); ++i) {
          if (!values[i]) continue;
          held.push_back(values[i]->request());
          sources[i] = bytes_of(held.back());
        }
        const py::gil_scoped_release unlocked;
        unpack_records(sources, sink, false);
      },
      py::arg("values"), py::arg("headers").noconvert(), py::arg("rows").noconvert(), py::arg("sizes").noconvert(),
      py::arg("checksums").noconvert(),
      "Take stored records (bytes-like, or None) apart into headers and rows, with their sizes (-1 for None) and "
      "checksums. A record of another size than 64 + row_bytes leaves zeros.");
  module.def(
      "record_checksums",
      [](const Bytes& records) {
        if (records.ndim() != 2 || records.shape(1) < static_cast<py::ssize_t>(kHeaderBytes))
          throw std::invalid_argument("records must be [n, at least 64]");
        const size_t n = records.shape(0), size = records.shape(1);
        Checksums result(static_cast<py::ssize_t>(n));
        const char* data = reinterpret_cast<const char*>(records.data());
        uint32_t* out = result.mutable_data();
        {
          const py::gil_scoped_release unlocked;
          in_parallel(n, n * size, [&](size_t i) {
            const char* record = data + i * size;
            out[i] = checksum(record, record + kHeaderBytes, size - kHeaderBytes);
          });
        }
        return result;
      },
      py::arg("records"), "What the checksum field of each record `[n, 64 + row_bytes]` must be.");
  module.def(
      "crc32",
      [](const py::buffer& data, uint32_t crc, bool base) {
        const py::buffer_info info = data.request();
        const RecordSource bytes = bytes_of(info);
        return (base ? cpu::crc32_base : cpu::crc32)(crc, bytes.data, bytes.size);
      },
      py::arg("data"), py::arg("crc") = 0, py::arg("base") = false,
      "zlib's CRC-32; `base` computes it without special instructions.");
}

}  // namespace vista::host
