// add_relu forward and backward on the CPU.
// Bytes: 2 reads and 1 write of the tensor forward, the same backward; 2 flops an element, so memory decides.
#include "../add_relu.h"

#include "parallel.h"
#include "simd.h"

namespace rf {
namespace RF_ISA {

constexpr int64_t kGrain = 4096;  // elements; a share below it is not worth a thread

template <class T>
static void forward(const AddReluArgs& a, Range r) {
  T* y = static_cast<T*>(a.y);
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  int64_t i = r.begin;
  for (; i + kLanes <= r.end; i += kLanes) store(y + i, relu(load(x + i) + load(residual + i)));
  if (i < r.end) {
    const int n = int(r.end - i);
    store_n(y + i, relu(load_n(x + i, n) + load_n(residual + i, n)), n);
  }
}

template <class T>
static void backward(const AddReluBackwardArgs& a, Range r) {
  T* dx = static_cast<T*>(a.dx);
  const T* dy = static_cast<const T*>(a.dy);
  const T* y = static_cast<const T*>(a.y);
  int64_t i = r.begin;
  for (; i + kLanes <= r.end; i += kLanes) store(dx + i, relu_mask(load(y + i), load(dy + i)));
  if (i < r.end) {
    const int n = int(r.end - i);
    store_n(dx + i, relu_mask(load_n(y + i, n), load_n(dy + i, n)), n);
  }
}

static int useful_threads(int threads, int64_t size) {
  const int64_t most = (size + kGrain - 1) / kGrain;
  return most < threads ? int(most) : threads;
}

void add_relu(const AddReluArgs& a) {
  parallel(useful_threads(a.threads, a.size), [&](const Team& team) {
    const Range r = team.share(a.size, kGrain);
    a.dtype == DType::f32 ? forward<float>(a, r) : forward<bf16>(a, r);
  });
}

void add_relu_backward(const AddReluBackwardArgs& a) {
  parallel(useful_threads(a.threads, a.size), [&](const Team& team) {
    const Range r = team.share(a.size, kGrain);
    a.dtype == DType::f32 ? backward<float>(a, r) : backward<bf16>(a, r);
  });
}

}  // namespace RF_ISA
}  // namespace rf
