// resnet_fast._cuda: one m.def per line, pointers as integers, no logic. No CUDA header and no torch are needed here.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "kernels.h"

namespace py = pybind11;
using namespace rf::cuda;

template <class T = void>
static T* ptr(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
static Target target(int device, uintptr_t stream, int dtype) { return {device, stream, DType(dtype)}; }

static Window window(const std::array<int, 8>& w) { return {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]}; }

// hook(kernel, grid, block, shared, cooperative, arguments) instead of every launch, for the card described; None:
// launch.
static void hook_launches(const py::object& hook, int sms, int shared_per_block, int shared_per_sm) {
  if (hook.is_none()) return set_hook({}, {});
  const auto call = [hook](const Launch& l) {
    hook(l.kernel, l.grid, l.block, l.shared, l.cooperative, py::bytes(static_cast<const char*>(l.args), l.args_bytes));
  };
  set_hook(call, {sms, shared_per_block, shared_per_sm});
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "resnet_fast's CUDA kernels";
  m.def("device_count", &device_count);
  m.def("why_no_device", &why_no_device);
  m.def("hook_launches", &hook_launches, py::arg("hook"), py::arg("sms") = 108,
        py::arg("shared_per_block") = 163 * 1024, py::arg("shared_per_sm") = 164 * 1024);
  m.def("add_relu",
        [](int device, uintptr_t stream, int dtype, uintptr_t y, uintptr_t x, uintptr_t residual, int64_t size) {
          add_relu(target(device, stream, dtype), {ptr(y), ptr(x), ptr(residual), size});
        });
  m.def("add_relu_backward",
        [](int device, uintptr_t stream, int dtype, uintptr_t dx, uintptr_t dy, uintptr_t y, int64_t size) {
          add_relu_backward(target(device, stream, dtype), {ptr(dx), ptr(dy), ptr(y), size});
        });
  m.def("bn_act_workspace", [](int device, uintptr_t stream, int dtype, int64_t rows, int channels) {
    return bn_act_workspace(target(device, stream, dtype), rows, channels);
  });
  m.def("bn_act_fits_single", [](int device, uintptr_t stream, int dtype, int64_t rows, int channels) {
    return bn_act_fits_single(target(device, stream, dtype), rows, channels);
  });
  m.def("bn_act_inference",
        [](int device, uintptr_t stream, int dtype, uintptr_t y, uintptr_t x, uintptr_t residual, uintptr_t gamma,
           uintptr_t beta, uintptr_t mean, uintptr_t var, int64_t rows, int channels, float eps, bool relu) {
          bn_act_inference(target(device, stream, dtype),
                           {ptr(y), ptr(x), ptr(residual), ptr<float>(gamma), ptr<float>(beta), ptr<float>(mean),
                            ptr<float>(var), nullptr, rows, channels, eps, relu});
        });
  m.def("bn_act_statistics", [](int device, uintptr_t stream, int dtype, uintptr_t x, uintptr_t mean, uintptr_t var,
                                uintptr_t workspace, int64_t rows, int channels) {
    bn_act_statistics(target(device, stream, dtype),
                      {nullptr, ptr(x), nullptr, nullptr, nullptr, ptr<float>(mean), ptr<float>(var),
                       ptr<float>(workspace), rows, channels, 0.f, false});
  });
  m.def("bn_act_training", [](int device, uintptr_t stream, int dtype, uintptr_t y, uintptr_t x, uintptr_t residual,
                              uintptr_t gamma, uintptr_t beta, uintptr_t mean, uintptr_t var, uintptr_t workspace,
                              int64_t rows, int channels, float eps, bool relu, int passes) {
    bn_act_training(target(device, stream, dtype),
                    {ptr(y), ptr(x), ptr(residual), ptr<float>(gamma), ptr<float>(beta), ptr<float>(mean),
                     ptr<float>(var), ptr<float>(workspace), rows, channels, eps, relu},
                    Passes(passes));
  });
  m.def("bn_act_backward", [](int device, uintptr_t stream, int dtype, uintptr_t dx, uintptr_t dresidual,
                              uintptr_t dgamma, uintptr_t dbeta, uintptr_t dy, uintptr_t x, uintptr_t y,
                              uintptr_t gamma, uintptr_t beta, uintptr_t mean, uintptr_t var, uintptr_t workspace,
                              int64_t rows, int channels, float eps, bool training, bool relu, bool sums_given) {
    bn_act_backward(target(device, stream, dtype),
                    {ptr(dx), ptr(dresidual), ptr<float>(dgamma), ptr<float>(dbeta), ptr(dy), ptr(x), ptr(y),
                     ptr<float>(gamma), ptr<float>(beta), ptr<float>(mean), ptr<float>(var), ptr<float>(workspace),
                     rows, channels, eps, training, relu, sums_given});
  });
  m.def("max_pool2d",
        [](int device, uintptr_t stream, int dtype, uintptr_t y, uintptr_t argmax, uintptr_t x, uintptr_t gamma,
           uintptr_t beta, uintptr_t mean, uintptr_t var, int64_t images, int height, int width, int channels,
           int out_height, int out_width, float eps, const std::array<int, 8>& w) {
          max_pool2d(target(device, stream, dtype),
                     {ptr(y), ptr<uint8_t>(argmax), ptr(x), ptr<float>(gamma), ptr<float>(beta), ptr<float>(mean),
                      ptr<float>(var), images, height, width, channels, out_height, out_width, eps, window(w)});
        });
  m.def("max_pool2d_backward",
        [](int device, uintptr_t stream, int dtype, uintptr_t dx, uintptr_t dy, uintptr_t argmax, int64_t images,
           int height, int width, int channels, int out_height, int out_width, const std::array<int, 8>& w) {
          max_pool2d_backward(target(device, stream, dtype), {ptr(dx), ptr(dy), ptr<uint8_t>(argmax), images, height,
                                                              width, channels, out_height, out_width, window(w)});
        });
}
