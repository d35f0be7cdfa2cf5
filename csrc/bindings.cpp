// The module's only door: one m.def per line, pointers as integers, no logic.
#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

namespace py = pybind11;
using namespace rf;

template <class T = void>
static T* ptr(uintptr_t address) { return reinterpret_cast<T*>(address); }

PYBIND11_MODULE(_C, m) {
  m.doc() = "resnet_fast's compiled kernels";
  m.def("isa", &isa_name);
  m.def("add_relu", [](int dtype, uintptr_t y, uintptr_t x, uintptr_t residual, int64_t size, int threads) { kernels().add_relu({DType(dtype), ptr(y), ptr(x), ptr(residual), size, threads}); }, py::call_guard<py::gil_scoped_release>());
  m.def("add_relu_backward", [](int dtype, uintptr_t dx, uintptr_t dy, uintptr_t y, int64_t size, int threads) { kernels().add_relu_backward({DType(dtype), ptr(dx), ptr(dy), ptr(y), size, threads}); }, py::call_guard<py::gil_scoped_release>());
}
