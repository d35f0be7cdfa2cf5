// The doors of the residual block: lists of links, as Python keeps them, to structs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "check.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace rf {

namespace {

template <class T = void>
T* ptr(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// How a link is: the 16 sizes of its convolution, the strides of its filters, the norm's eps.
using Settings = std::tuple<std::array<int64_t, 16>, std::array<int64_t, 4>, double>;
// Where a link's tensors are: filters, gamma, beta, z, mean, var; in backward also dw, dgamma, dbeta, 0 where not
// wanted. dw has the filters' strides.
using Addresses = std::vector<uintptr_t>;

BlockLink link(const Settings& settings, const Addresses& at) {
  RF_CHECK(at.size() == 6 || at.size() == 9, "expected the 6 or 9 addresses of a link, got ", at.size());
  const auto& [v, strides, eps] = settings;
  BlockLink l = {};
  l.shape = {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15]};
  l.filters = {
      ptr<const float>(at[0]), l.shape.K / l.shape.groups * strides[0], strides[0], strides[1], strides[2], strides[3]};
  l.gamma = ptr<const float>(at[1]), l.beta = ptr<const float>(at[2]), l.eps = eps;
  l.z = ptr(at[3]), l.mean = ptr<float>(at[4]), l.var = ptr<float>(at[5]);
  if (at.size() == 9) {
    l.dw = ptr<float>(at[6]), l.dgamma = ptr<float>(at[7]), l.dbeta = ptr<float>(at[8]);
    l.dw_strides = strides;
  }
  return l;
}

// The last link is the projection where there is one.
ResidualBlock block(int dtype, uintptr_t x, uintptr_t y, const std::vector<Settings>& settings,
                    const std::vector<Addresses>& places, bool projects, bool exact, int threads) {
  const size_t links = settings.size() - (projects ? 1 : 0);
  RF_CHECK(places.size() == settings.size() && links >= 1, "expected a block's links and their places, got ",
           settings.size(), " and ", places.size());
  ResidualBlock b{DType(dtype), ptr(x), ptr(y), {}, {}, exact, threads};
  for (size_t i = 0; i < settings.size(); ++i)
    (i < links ? b.links : b.projection).push_back(link(settings[i], places[i]));
  return b;
}

}  // namespace

void bind_block(py::module_& m) {
  m.def(
      "residual_block_why_not",
      [](int dtype, const std::vector<Settings>& settings, bool projects) {
        const std::vector<Addresses> nowhere(settings.size(), Addresses(6));
        const char* why = residual_block_why_not(block(dtype, 0, 0, settings, nowhere, projects, false, 1));
        return why ? py::object(py::str(why)) : py::object(py::none());
      },
      "None where the block's gradients can be computed");
  m.def(
      "residual_block_forward",
      [](int dtype, uintptr_t x, uintptr_t y, const std::vector<Settings>& settings,
         const std::vector<Addresses>& places, bool projects, bool exact, int threads) {
        const ResidualBlock b = block(dtype, x, y, settings, places, projects, exact, threads);
        const py::gil_scoped_release free;
        residual_block_forward(b);
      },
      "y, and every link's z, mean and var");
  m.def(
      "residual_block_backward",
      [](int dtype, uintptr_t x, uintptr_t y, const std::vector<Settings>& settings,
         const std::vector<Addresses>& places, bool projects, bool exact, int threads, uintptr_t dy, uintptr_t dx) {
        const ResidualBlock b = block(dtype, x, y, settings, places, projects, exact, threads);
        const py::gil_scoped_release free;
        return residual_block_backward(b, ptr(dy), ptr(dx));
      },
      "the gradients wanted; False where they are to be computed otherwise (conv_weight_gradient)");
  m.def(
      "bn_update_running_each",
      [](const std::vector<std::array<uintptr_t, 4>>& places, const std::vector<int64_t>& counts,
         const std::vector<int64_t>& channels, const std::vector<double>& momenta) {
        RF_CHECK(places.size() == counts.size() && places.size() == channels.size() && places.size() == momenta.size(),
                 "expected as many counts, channels and momenta as norms, got ", places.size(), " norms");
        for (size_t i = 0; i < places.size(); ++i)
          kernels().bn_update_running({ptr<float>(places[i][0]), ptr<float>(places[i][1]), ptr<float>(places[i][2]),
                                       ptr<float>(places[i][3]), counts[i], channels[i], momenta[i]});
      },
      "bn_update_running of several norms: running_mean, running_var, mean, var each");
}

}  // namespace rf
