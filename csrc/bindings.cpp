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
  m.def("bn_act_forward", [](int dtype, uintptr_t y, uintptr_t mean, uintptr_t var, uintptr_t rstd, uintptr_t x, uintptr_t residual, uintptr_t gamma, uintptr_t beta, int64_t rows, int64_t channels, double eps, bool training, bool relu, int threads) { kernels().bn_act_forward({DType(dtype), ptr(y), ptr<float>(mean), ptr<float>(var), ptr<float>(rstd), ptr(x), ptr(residual), ptr<float>(gamma), ptr<float>(beta), rows, channels, eps, training, relu, threads}); }, py::arg("dtype"), py::arg("y"), py::arg("mean"), py::arg("var"), py::arg("rstd"), py::arg("x"), py::arg("residual"), py::arg("gamma"), py::arg("beta"), py::arg("rows"), py::arg("channels"), py::arg("eps"), py::arg("training"), py::arg("relu"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(), "y = relu((x - mean) * gamma * rstd + beta + residual); training: mean, var, rstd are outputs; y = 0: statistics only");
  m.def("bn_act_backward", [](int dtype, uintptr_t dx, uintptr_t dgamma, uintptr_t dbeta, uintptr_t dresidual, uintptr_t dy, uintptr_t x, uintptr_t y, uintptr_t gamma, uintptr_t beta, uintptr_t mean, uintptr_t var, double eps, int64_t rows, int64_t channels, int64_t count, bool training, bool relu, bool sums_given, int threads) { kernels().bn_act_backward({DType(dtype), ptr(dx), ptr<float>(dgamma), ptr<float>(dbeta), ptr(dresidual), ptr(dy), ptr(x), ptr(y), ptr<float>(gamma), ptr<float>(beta), ptr<float>(mean), ptr<float>(var), eps, rows, channels, count, training, relu, sums_given, threads}); }, py::arg("dtype"), py::arg("dx"), py::arg("dgamma"), py::arg("dbeta"), py::arg("dresidual"), py::arg("dy"), py::arg("x"), py::arg("y"), py::arg("gamma"), py::arg("beta"), py::arg("mean"), py::arg("var"), py::arg("eps"), py::arg("rows"), py::arg("channels"), py::arg("count"), py::arg("training"), py::arg("relu"), py::arg("sums_given"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(), "dx, dgamma, dbeta, dresidual, each 0 where not wanted; y = 0: no residual was added, the mask is recomputed from x");
  m.def("bn_update_running", [](uintptr_t running_mean, uintptr_t running_var, uintptr_t mean, uintptr_t var, int64_t count, int64_t channels, double momentum) { kernels().bn_update_running({ptr<float>(running_mean), ptr<float>(running_var), ptr<float>(mean), ptr<float>(var), count, channels, momentum}); }, py::arg("running_mean"), py::arg("running_var"), py::arg("mean"), py::arg("var"), py::arg("count"), py::arg("channels"), py::arg("momentum"), py::call_guard<py::gil_scoped_release>(), "running = (1 - momentum) * running + momentum * value, the variance unbiased; 0 where not tracked");
  m.def("max_pool_forward", [](int dtype, uintptr_t y, uintptr_t argmax, uintptr_t x, int64_t N, int64_t H, int64_t W, int64_t C, int64_t P, int64_t Q, int64_t R, int64_t S, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w, int threads) { kernels().max_pool_forward({{N, H, W, C, P, Q, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w}, DType(dtype), ptr(y), ptr<uint8_t>(argmax), ptr(x), threads}); }, py::arg("dtype"), py::arg("y"), py::arg("argmax"), py::arg("x"), py::arg("N"), py::arg("H"), py::arg("W"), py::arg("C"), py::arg("P"), py::arg("Q"), py::arg("R"), py::arg("S"), py::arg("stride_h"), py::arg("stride_w"), py::arg("pad_h"), py::arg("pad_w"), py::arg("dilation_h"), py::arg("dilation_w"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(), "y and, where argmax is not 0, the winner as r * S + s in one byte");
  m.def("max_pool_backward", [](int dtype, uintptr_t dx, uintptr_t dy, uintptr_t argmax, int64_t N, int64_t H, int64_t W, int64_t C, int64_t P, int64_t Q, int64_t R, int64_t S, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w, int threads) { kernels().max_pool_backward({{N, H, W, C, P, Q, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w}, DType(dtype), ptr(dx), ptr(dy), ptr<uint8_t>(argmax), threads}); }, py::arg("dtype"), py::arg("dx"), py::arg("dy"), py::arg("argmax"), py::arg("N"), py::arg("H"), py::arg("W"), py::arg("C"), py::arg("P"), py::arg("Q"), py::arg("R"), py::arg("S"), py::arg("stride_h"), py::arg("stride_w"), py::arg("pad_h"), py::arg("pad_w"), py::arg("dilation_h"), py::arg("dilation_w"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(), "dx from dy and the forward's argmax");
}
