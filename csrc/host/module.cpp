// The door for Python: importing this module loads and registers the op library that lies beside it, and it carries
// what needs no tensor. torch must be imported first (vista_ext/__init__.py does).
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <string>
#include <vector>

#include "bindings.h"
#include "vista/cpu_isa.h"
#include "vista/record.h"
#include "vista/row_layout.h"

namespace py = pybind11;

namespace {

std::string own_folder() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&own_folder), &info) == 0 || info.dli_fname == nullptr)
    throw py::import_error("vista: cannot find the folder of vista_ext._C");
  const std::string path = info.dli_fname;
  return path.substr(0, path.find_last_of('/'));
}

void load_ops() {
  const std::string path = own_folder() + "/_ops.so";
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr)
    throw py::import_error(std::string("vista: cannot load the op library: ") + dlerror() +
                           " (it was built against torch " VISTA_TORCH_VERSION "; torch >= 2.10 is needed)");
}

py::dict build_info() {
  py::dict info;
  info["version"] = VISTA_VERSION;
  info["torch"] = VISTA_TORCH_VERSION;
  info["compiler"] = __VERSION__;
  using vista::cpu::kIsaNames;
  info["cpu_isas"] = std::vector<std::string>(kIsaNames, VISTA_X86_ISAS ? std::end(kIsaNames) : kIsaNames + 1);
  info["cpu_isa"] = kIsaNames[static_cast<int>(vista::cpu::best_isa())];
  info["cuda_archs"] = std::string(VISTA_BUILT_ARCHS);
  info["cuda_compiler"] = std::string(VISTA_CUDA_COMPILER);
  return info;
}

py::dict row_layout(const std::string& scheme, int64_t tokens, int64_t dim, int64_t group) {
  const vista::RowLayout layout = vista::make_row_layout(vista::parse_row_scheme(scheme), tokens, dim, group);
  py::dict view;
  view["scheme"] = vista::row_scheme_name(layout.scheme);
  view["scheme_id"] = static_cast<int>(layout.scheme);
  view["tokens"] = layout.tokens;
  view["dim"] = layout.dim;
  view["group"] = layout.group;
  view["scales_offset"] = layout.scales_offset;
  view["biases_offset"] = layout.biases_offset;
  view["row_bytes"] = layout.row_bytes;
  return view;
}

py::dict record_header_layout() {
  py::list fields;
  for (const vista::RecordField& field : vista::kRecordFields)
    fields.append(py::make_tuple(field.name, field.type, field.offset));
  py::dict view;
  view["magic"] = vista::kRecordMagic;
  view["format"] = vista::kRecordFormat;
  view["bytes"] = sizeof(vista::RecordHeader);
  view["fields"] = fields;
  return view;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  load_ops();
  m.doc() = "Compiled side of vista_ext: importing it registers torch.ops.vista.";
  m.def("build_info", &build_info, "What was built, for which architectures, against which torch.");
  m.def("row_layout", &row_layout, py::arg("scheme"), py::arg("tokens"), py::arg("dim"), py::arg("group") = 0,
        "Byte layout of a quantized row (csrc/include/vista/row_layout.h); ValueError names a bad argument.");
  m.def("record_header_layout", &record_header_layout,
        "Byte layout of a stored record's header (csrc/include/vista/record.h): (name, numpy type, offset) per field.");
  vista::host::bind_records(m);
  vista::host::bind_lmdb(m);
}
