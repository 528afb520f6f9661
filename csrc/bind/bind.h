// The parts of the module that have a file of their own.
#pragma once
#include <pybind11/pybind11.h>

namespace attnkit::cpu {

void bind_backward(pybind11::module_& m);
void bind_recur(pybind11::module_& m);
void bind_cache(pybind11::module_& m);
void bind_carry(pybind11::module_& m);
void bind_groups(pybind11::module_& m);
void bind_readout(pybind11::module_& m);
void bind_select(pybind11::module_& m);
void bind_warm(pybind11::module_& m);

}  // namespace attnkit::cpu
