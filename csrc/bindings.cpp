// The module's only door: one m.def per line, pointers as integers, no logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "check.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace rf;

template <class T = void>
static T* ptr(uintptr_t address) { return reinterpret_cast<T*>(address); }

// The sizes of ConvShape and ConvConfig, in the order they are declared; `planar` may be left out.
using ConvSizes = std::vector<int64_t>;
using ConvTuning = std::array<int, 4>;

static ConvShape conv_shape(const ConvSizes& v) { RF_CHECK(v.size() == 16 || v.size() == 17, "expected the 16 or 17 sizes of a convolution, got ", v.size()); return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15], v.size() > 16 && v[16] != 0}; }
static ConvConfig conv_config(const ConvTuning& v) { return {v[0], v[1], v[2], v[3]}; }
static ConvTuning conv_tuning(const ConvConfig& c) { return {c.algorithm, c.block_rows, c.block_cols, c.split_cols}; }

namespace rf { void bind_network(py::module_&); }

PYBIND11_MODULE(_C, m) {
  m.doc() = "resnet_fast's compiled kernels";
  m.def("isa", &isa_name);
  m.def("add_relu", [](int dtype, uintptr_t y, uintptr_t x, uintptr_t residual, int64_t size, int threads) { kernels().add_relu({DType(dtype), ptr(y), ptr(x), ptr(residual), size, threads}); }, py::call_guard<py::gil_scoped_release>());
  m.def("add_relu_backward", [](int dtype, uintptr_t dx, uintptr_t dy, uintptr_t y, int64_t size, int threads) { kernels().add_relu_backward({DType(dtype), ptr(dx), ptr(dy), ptr(y), size, threads}); }, py::call_guard<py::gil_scoped_release>());
  m.def("conv_algorithms", [] { std::vector<std::string> names; for (int i = 0; i < kernels().conv->algorithms(); ++i) names.push_back(kernels().conv->name(i)); return names; });
  m.def("conv_why_not", [](const ConvSizes& shape, int dtype, int algorithm) { const char* why = kernels().conv->why_not(conv_shape(shape), DType(dtype), algorithm); return why ? py::object(py::str(why)) : py::object(py::none()); });
  m.def("conv_heuristic", [](const ConvSizes& shape, int dtype, int threads, bool exact) { return conv_tuning(kernels().conv->heuristic(conv_shape(shape), DType(dtype), threads, exact)); });
  m.def("conv_candidates", [](const ConvSizes& shape, int dtype, int threads) { ConvConfig out[64]; const int n = kernels().conv->candidates(conv_shape(shape), DType(dtype), threads, out, 64); std::vector<ConvTuning> all; for (int i = 0; i < n; ++i) all.push_back(conv_tuning(out[i])); return all; });
  m.def("conv_packed_bytes", [](const ConvSizes& shape, int dtype, int algorithm) { return kernels().conv->packed_bytes(conv_shape(shape), DType(dtype), algorithm); });
  m.def("conv_scratch_bytes", [](const ConvSizes& shape, int dtype, const ConvTuning& config, int threads) { return kernels().conv->scratch_bytes(conv_shape(shape), DType(dtype), conv_config(config), threads); });
  m.def("conv_pack", [](const ConvSizes& shape, int dtype, int algorithm, uintptr_t packed, uintptr_t w, uintptr_t fold, int threads) { kernels().conv->pack(conv_shape(shape), DType(dtype), algorithm, ptr(packed), ptr<const float>(w), ptr<const float>(fold), threads); }, py::call_guard<py::gil_scoped_release>());
  m.def("conv_run", [](const ConvSizes& shape, int dtype, const ConvTuning& config, uintptr_t y, uintptr_t x, uintptr_t packed, uintptr_t scale, uintptr_t shift, uintptr_t residual, bool relu, uintptr_t scratch, int threads) { kernels().conv->run_alone({conv_shape(shape), conv_config(config), DType(dtype), ptr(y), ptr(x), ptr(packed), ptr<const float>(scale), ptr<const float>(shift), ptr(residual), relu, ptr(scratch)}, threads); }, py::call_guard<py::gil_scoped_release>());
  bind_network(m);
}
