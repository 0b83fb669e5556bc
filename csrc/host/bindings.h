// The parts of the Python module that have files of their own.
#pragma once

#include <pybind11/pybind11.h>

namespace vista::host {

void bind_records(pybind11::module_& module);

// The submodule `lmdb`: as much of py-lmdb's interface as vista_ext.store needs, and reads of many records at once.
void bind_lmdb(pybind11::module_& module);

}  // namespace vista::host
