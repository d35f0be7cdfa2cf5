// add_relu: y = relu(x + residual), and its gradient, over flat memory: the layout does not matter, only that it is
// one. Bytes: two reads and one write of the tensor each way, nothing else; 2 flops an element. A thread moves four
// packs of 16 bytes, all loads issued before the first is used. One pack a thread leaves a third of the bytes in
// flight; a grid that strides over the tensor only adds a loop.
#include "launch.cuh"

namespace rf::cuda {

constexpr int kPacks = 4;

// out = f(a, b) on `size` elements; kPacks packs a thread, a block's packs side by side. The last thread takes the
// tail.
template <class T, class F>
__device__ __forceinline__ void flat(T* out, const T* a, const T* b, int64_t size, const F& f) {
  constexpr int V = kVec<T>;
  const int64_t packs = size / V;
  const int64_t first = int64_t(blockIdx.x) * (kThreads * kPacks) + threadIdx.x;
  Raw<T, V> ra[kPacks], rb[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t pack = first + i * kThreads;
    if (pack < packs) ra[i] = load_last<T, V>(a + pack * V), rb[i] = load_last<T, V>(b + pack * V);
  }
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t pack = first + i * kThreads;
    if (pack < packs) {
      float fa[V], fb[V];
      widen<T, V>(fa, ra[i]), widen<T, V>(fb, rb[i]);
#pragma unroll
      for (int v = 0; v < V; ++v) fa[v] = f(fa[v], fb[v]);
      store<T, V>(out + pack * V, narrow<T, V>(fa));
    }
  }
#ifdef RF_PLANT_OFF_BY_ONE  // defined by the test that shows a forgotten element is noticed
  const int64_t tail = packs * V + threadIdx.x + 1;
#else
  const int64_t tail = packs * V + threadIdx.x;
#endif
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x < V && tail < size) {
    float fa[1], fb[1];
    widen<T, 1>(fa, load_last<T, 1>(a + tail)), widen<T, 1>(fb, load_last<T, 1>(b + tail));
    fa[0] = f(fa[0], fb[0]);
    store<T, 1>(out + tail, narrow<T, 1>(fa));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_relu_forward(AddReluArgs a) {
  flat(static_cast<T*>(a.y), static_cast<const T*>(a.x), static_cast<const T*>(a.residual), a.size,
       [](float x, float residual) { return max_nan(x + residual, 0.f); });
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_relu_gradient(AddReluBackwardArgs a) {
  flat(static_cast<T*>(a.dx), static_cast<const T*>(a.dy), static_cast<const T*>(a.y), a.size,
       [](float dy, float y) { return y <= 0.f ? 0.f : dy; });  // a NaN in y passes dy, as in torch
}

static int64_t flat_blocks(int64_t size, int vec) {
  const int64_t packs = size / vec, per_block = int64_t(kThreads) * kPacks;
  return packs ? (packs + per_block - 1) / per_block : 1;
}

void add_relu(const Target& target, const AddReluArgs& a) {
  check_aligned("add_relu", static_cast<char*>(a.y), static_cast<const char*>(a.x),
                static_cast<const char*>(a.residual));
  const DeviceGuard guard(target);
  dispatch(target.dtype, [&](auto t) {
    using T = decltype(t);
    launch<add_relu_forward<T>>(target, {flat_blocks(a.size, kVec<T>)}, a);
  });
}

void add_relu_backward(const Target& target, const AddReluBackwardArgs& a) {
  check_aligned("add_relu", static_cast<char*>(a.dx), static_cast<const char*>(a.dy), static_cast<const char*>(a.y));
  const DeviceGuard guard(target);
  dispatch(target.dtype, [&](auto t) {
    using T = decltype(t);
    launch<add_relu_gradient<T>>(target, {flat_blocks(a.size, kVec<T>)}, a);
  });
}

}  // namespace rf::cuda
