// Buffers as tensors: a DLPack capsule, the array exchange protocol torch.utils.dlpack reads without linking against
// it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "buffers.h"
#include "check.h"
#include "types.h"

namespace py = pybind11;

namespace rf {

namespace {

// The structs of DLPack's stable ABI (dmlc/dlpack, version 0), as far as they are needed.
struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

struct Owner {
  DLManagedTensor managed;
  int64_t shape[4], strides[4];
};

void destroy(DLManagedTensor* managed) {
  give_buffer(managed->tensor.data);
  delete static_cast<Owner*>(managed->context);
}

// A dense (N, C, H, W) tensor in channels_last.
py::capsule buffer(int64_t n, int64_t c, int64_t h, int64_t w, int dtype) {
  RF_CHECK(n >= 0 && c >= 0 && h >= 0 && w >= 0, "wanted sizes of at least 0, got ", n, ", ", c, ", ", h, ", ", w);
  const bool f32 = DType(dtype) == DType::f32;
  auto* owner = new Owner{{}, {n, c, h, w}, {h * w * c, 1, w * c, c}};
  try {
    void* data = take_buffer(size_t(n * c * h * w) * dtype_size(DType(dtype)));
    owner->managed = {
        {data, {kCpu, 0}, 4, {f32 ? kFloat : kBfloat, uint8_t(f32 ? 32 : 16), 1}, owner->shape, owner->strides, 0},
        owner,
        destroy};
  } catch (...) {
    delete owner;
    throw;
  }
  // Whoever takes the tensor out of the capsule renames it; one that nobody took still owns its buffer.
  return py::capsule(&owner->managed, "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  });
}

}  // namespace

void bind_buffers(py::module_& m) {
  m.def("buffer", &buffer, py::arg("n"), py::arg("c"), py::arg("h"), py::arg("w"), py::arg("dtype"),
        "a DLPack capsule of an uninitialised channels_last tensor in memory that is kept for reuse");
  m.def("release_buffers", &release_buffers, "gives memory kept for reuse back; returns its bytes");
  m.def("buffers_in_use", &buffers_in_use);
  m.def("keep_spare", &keep_spare, py::arg("spare"), "whether a little more may be kept than was in use at once");
}

}  // namespace rf
