// Network and Plan as Python classes. Pointers come as integers, pairs as tuples, choices as plain dicts that
// survive JSON (whose keys are strings).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "check.h"
#include "cpu/kernels.h"
#include "network.h"

namespace py = pybind11;

namespace rf {

using PyPair = std::pair<int64_t, int64_t>;
static Pair pair(PyPair p) { return {p.first, p.second}; }
static const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

static DType dtype_of(int code, DType fallback) {
  RF_CHECK(code >= -1 && code <= 1, "dtype: wanted 0 (float32), 1 (bfloat16) or -1 (the network's), got ", code);
  return code < 0 ? fallback : DType(code);
}

static bool is_nchw(int layout) {
  RF_CHECK(layout == 0 || layout == 1, "x_layout: wanted 0 (NCHW) or 1 (NHWC), got ", layout);
  return layout == 0;
}

static py::dict config_dict(const std::string& algorithm, int block_rows, int block_cols, int split_cols) {
  py::dict d;
  if (!algorithm.empty()) {
    d["algorithm"] = algorithm;
    d["block_rows"] = block_rows;
    d["block_cols"] = block_cols;
    d["split_cols"] = split_cols;
  }
  return d;
}

static Choices choices_from(const py::dict& given) {
  Choices all;
  for (const auto& entry : given) {
    Choice c;
    for (const auto& field : py::cast<py::dict>(entry.second)) {
      const std::string name = py::cast<std::string>(field.first);
      if (name == "algorithm")
        c.algorithm = py::cast<std::string>(field.second);
      else if (name == "block_rows")
        c.block_rows = py::cast<int>(field.second);
      else if (name == "block_cols")
        c.block_cols = py::cast<int>(field.second);
      else if (name == "split_cols")
        c.split_cols = py::cast<int>(field.second);
      else if (name == "images")
        c.images = py::cast<int64_t>(field.second);
      else
        fail("choices: no field is called '", name, "'; wanted algorithm, block_rows, block_cols, split_cols, images");
    }
    all[py::cast<int>(py::int_(py::reinterpret_borrow<py::object>(entry.first)))] = c;  // int("3") for JSON's keys
  }
  return all;
}

static py::dict choices_to(const Choices& choices) {
  py::dict all;
  for (const auto& entry : choices) {
    const Choice& c = entry.second;
    py::dict d = config_dict(c.algorithm, c.block_rows, c.block_cols, c.split_cols);
    d["images"] = c.images;
    all[py::int_(entry.first)] = d;
  }
  return all;
}

static py::list describe(const Plan& plan) {
  py::list rows;
  for (const Plan::Row& r : plan.describe()) {
    py::dict d = config_dict(r.algorithm, r.config.block_rows, r.config.block_cols, r.config.split_cols);
    d["value"] = r.node;
    d["op"] = r.op;
    d["x_shape"] = py::make_tuple(plan.N(), r.in.C, r.in.H, r.in.W);
    d["shape"] = py::make_tuple(plan.N(), r.out.C, r.out.H, r.out.W);
    d["kernel"] = py::make_tuple(r.kernel.h, r.kernel.w);
    d["stride"] = py::make_tuple(r.stride.h, r.stride.w);
    d["groups"] = r.groups;
    d["images"] = r.images;
    d["flops"] = r.flops;
    d["fused"] = r.fused;
    d["ms"] = r.ms < 0 ? py::object(py::none()) : py::object(py::float_(r.ms));
    d["ms_least"] = r.least_ms < 0 ? py::object(py::none()) : py::object(py::float_(r.least_ms));
    rows.append(d);
  }
  return rows;
}

void bind_network(py::module_& m) {
  using namespace py::literals;
  const PyPair kOne{1, 1}, kNone{0, 0};
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan", "A Network for one batch, image size and thread count.")
      .def(
          "run",
          [](Plan& p, uintptr_t x, int layout, uintptr_t out, int x_dtype) {
            p.run(floats(x), is_nchw(layout), dtype_of(x_dtype, p.dtype()), reinterpret_cast<void*>(out));
          },
          "x_ptr"_a, "x_layout"_a, "out_ptr"_a, "x_dtype"_a = -1, py::call_guard<py::gil_scoped_release>(),
          "Computes the output. x_layout: 0 NCHW, 1 NHWC. out: NHWC in the network's dtype. Several threads may call "
          "at once.")
      .def(
          "profile",
          [](Plan& p, uintptr_t x, int layout, uintptr_t out, int x_dtype, int repeats) {
            p.profile(floats(x), is_nchw(layout), dtype_of(x_dtype, p.dtype()), reinterpret_cast<void*>(out), repeats);
          },
          "x_ptr"_a, "x_layout"_a, "out_ptr"_a, "x_dtype"_a = -1, "repeats"_a = 5,
          py::call_guard<py::gil_scoped_release>(),
          "run() `repeats` times with a clock around every step; describe() then has the medians and the least.")
      .def("describe", &describe,
           "One dict per value: op, shape, algorithm and its blocks, images per pass, flops, ms (median) and ms_least "
           "of profile().")
      .def(
          "choices", [](const Plan& p) { return choices_to(p.choices()); },
          "What Network.plan(choices=) takes to make this plan again; plain data.")
      .def("poison", &Plan::poison, "Fills the arenas with NaN (for tests).")
      .def_property_readonly("arena_bytes", &Plan::arena_bytes, "Working memory of one call.")
      .def_property_readonly("threads", &Plan::threads)
      .def_property_readonly("out_shape", [](const Plan& p) {
        const Extent e = p.output_extent();
        return py::make_tuple(p.N(), e.C, e.H, e.W);
      });

  py::class_<Network, std::shared_ptr<Network>>(m, "Network", "A frozen network: see csrc/network.h.")
      .def(py::init([](int dtype) { return std::make_shared<Network>(DType(dtype)); }), "dtype"_a)
      .def("input", &Network::input, "channels"_a)
      .def(
          "conv",
          [](Network& n, int x, int64_t K, int64_t R, int64_t S, PyPair stride, PyPair padding, PyPair dilation,
             int64_t groups, uintptr_t weight, uintptr_t fold, uintptr_t shift, int residual, bool relu) {
            return n.conv(x, K, {R, S}, pair(stride), pair(padding), pair(dilation), groups, floats(weight),
                          floats(fold), floats(shift), residual, relu);
          },
          "x"_a, py::kw_only(), "K"_a, "R"_a, "S"_a, "stride"_a = kOne, "padding"_a = kNone, "dilation"_a = kOne,
          "groups"_a = 1, "weight_ptr"_a, "fold_ptr"_a = 0, "shift_ptr"_a = 0, "residual"_a = -1, "relu"_a = false,
          "relu(conv(x, weight * fold) + shift + residual); weight [K, C/groups, R, S], fold and shift [K], dense "
          "float32, copied.")
      .def(
          "linear",
          [](Network& n, int x, int64_t features, uintptr_t weight, uintptr_t bias, bool relu) {
            return n.linear(x, features, floats(weight), floats(bias), relu);
          },
          "x"_a, "out_features"_a, "weight_ptr"_a, "bias_ptr"_a = 0, "relu"_a = false)
      .def(
          "max_pool",
          [](Network& n, int x, PyPair kernel, PyPair stride, PyPair padding, bool ceil_mode) {
            return n.max_pool(x, pair(kernel), pair(stride), pair(padding), ceil_mode);
          },
          "x"_a, "kernel"_a, "stride"_a, "padding"_a = kNone, "ceil_mode"_a = false)
      .def(
          "avg_pool",
          [](Network& n, int x, PyPair kernel, PyPair stride, PyPair padding, bool ceil_mode, bool count) {
            return n.avg_pool(x, pair(kernel), pair(stride), pair(padding), ceil_mode, count);
          },
          "x"_a, "kernel"_a, "stride"_a, "padding"_a = kNone, "ceil_mode"_a = false, "count_include_pad"_a = true)
      .def("global_avg_pool", &Network::global_avg_pool, "x"_a)
      .def("scale", &Network::scale, "x"_a, "gate"_a, "residual"_a = -1, "relu"_a = false,
           "relu(x * gate + residual); gate has one value per image and channel.")
      .def("add", &Network::add, "x"_a, "residual"_a, "relu"_a = false)
      .def("relu", &Network::relu, "x"_a)
      .def("sigmoid", &Network::sigmoid, "x"_a)
      .def("output", py::overload_cast<int>(&Network::output), "x"_a)
      .def(
          "plan",
          [](Network& n, int64_t N, int64_t H, int64_t W, int threads, bool exact, int tune, const py::dict& choices) {
            const Choices given = choices_from(choices);
            py::gil_scoped_release release;
            return n.plan(N, H, W, threads, exact, tune, given);
          },
          "N"_a, "H"_a, "W"_a, "threads"_a, "exact"_a = false, "tune"_a = 0, "choices"_a = py::dict(),
          "exact: no Winograd, no Strassen. tune: 0 heuristics, 1 seconds of measuring, 2 longer. choices: {value: "
          "{algorithm, "
          "block_rows, block_cols, split_cols, images}}, any part of Plan.choices(); what is given is not tuned.")
      .def_property_readonly("packed_bytes", &Network::packed_bytes,
                             "Packed weights held by plans, shared between them.")
      .def_property_readonly("weight_bytes", &Network::weight_bytes, "The copied original weights.");
}

}  // namespace rf
