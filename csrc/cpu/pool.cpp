// Max, average and global average pooling on the CPU, NHWC; SPMD: a team's threads call with the same arguments.
// Bytes: x once, y once. Flops: R*S a y element, so caches decide: 3x3 stride 2 reads every x row 1.5 times, from L2.
// The idea: channels are the vector, an output row is the unit of work, windows are clipped instead of padded.
// Lost: a separate vertical then horizontal maximum (needs a row buffer; the loads it saves were L1 hits).
#include "../pool.h"

#include "simd.h"

namespace rf {
namespace RF_ISA {

namespace {

RF_INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
RF_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

RF_INLINE Range share(int64_t n, int rank, int size) { return {n * rank / size, n * (rank + 1) / size}; }

// A window's rows (or columns) that lie inside the input, and its length before clipping to it but with the padding.
struct Window {
  int64_t begin, end, padded;
};
RF_INLINE Window window(int64_t out, int64_t stride, int64_t pad, int64_t kernel, int64_t in) {
  const int64_t begin = out * stride - pad;
  const int64_t end = at_most(begin + kernel, in + pad);
  return {at_least(begin, 0), at_most(end, in), end - begin};
}

struct Max {
  static constexpr bool kAverage = false;
  static RF_INLINE Vec first() { return broadcast(-__builtin_inff()); }
  static RF_INLINE Vec step(Vec m, Vec v) { return max_nan(m, v); }
};
struct Sum {
  static constexpr bool kAverage = true;
  static RF_INLINE Vec first() { return zero(); }
  static RF_INLINE Vec step(Vec m, Vec v) { return m + v; }
};

// One output pixel; kVecs vectors of channels at a time keep as many independent chains in flight.
template <class Fold, int kVecs, class T>
RF_INLINE void pool_block(T* y, const T* x, int64_t row_stride, int64_t C, const Window& h, const Window& w,
                          Vec factor) {
  Vec m[kVecs];
  RF_UNROLL for (int v = 0; v < kVecs; ++v) m[v] = Fold::first();
  for (int64_t r = h.begin; r < h.end; ++r) {
    const T* p = x + r * row_stride + w.begin * C;
    for (int64_t s = w.begin; s < w.end; ++s, p += C) {
      RF_UNROLL for (int v = 0; v < kVecs; ++v) m[v] = Fold::step(m[v], load(p + v * kLanes));
    }
  }
  RF_UNROLL for (int v = 0; v < kVecs; ++v) store(y + v * kLanes, Fold::kAverage ? m[v] * factor : m[v]);
}

template <class Fold, class T>
RF_INLINE void pool_tail(T* y, const T* x, int64_t row_stride, int64_t C, const Window& h, const Window& w, Vec factor,
                         int n) {
  Vec m = Fold::first();
  for (int64_t r = h.begin; r < h.end; ++r) {
    for (int64_t s = w.begin; s < w.end; ++s) m = Fold::step(m, load_n(x + r * row_stride + s * C, n));
  }
  store_n(y, Fold::kAverage ? m * factor : m, n);
}

template <class Fold, class T>
void pool(const PoolArgs& a, int rank, int size) {
  const Range rows = share(a.N * a.P, rank, size);
  const int64_t row_stride = a.W * a.C;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row / a.P * a.H * row_stride;
    T* y = static_cast<T*>(a.y) + row * a.Q * a.C;
    const Window h = window(row % a.P, a.stride_h, a.pad_h, a.kernel_h, a.H);
    for (int64_t q = 0; q < a.Q; ++q, y += a.C) {
      const Window w = window(q, a.stride_w, a.pad_w, a.kernel_w, a.W);
      float factor = 1.f;
      if (Fold::kAverage) {
        factor = 1.f / float(a.count_include_pad ? h.padded * w.padded : (h.end - h.begin) * (w.end - w.begin));
      }
      const Vec f = broadcast(factor);
      int64_t c = 0;
      for (; c + 4 * kLanes <= a.C; c += 4 * kLanes) pool_block<Fold, 4>(y + c, x + c, row_stride, a.C, h, w, f);
      for (; c + kLanes <= a.C; c += kLanes) pool_block<Fold, 1>(y + c, x + c, row_stride, a.C, h, w, f);
      if (c < a.C) pool_tail<Fold>(y + c, x + c, row_stride, a.C, h, w, f, int(a.C - c));
    }
  }
}

// kVecs vectors of channels of one image. Rows are summed apart and then added: the rounding error grows with
// H + W, not with H * W.
template <int kVecs, class T>
RF_INLINE void mean_block(T* y, const T* x, const PoolArgs& a, Vec factor, int n) {
  Vec total[kVecs];
  RF_UNROLL for (int v = 0; v < kVecs; ++v) total[v] = zero();
  for (int64_t r = 0; r < a.H; ++r) {
    Vec sum[kVecs];
    RF_UNROLL for (int v = 0; v < kVecs; ++v) sum[v] = zero();
    for (int64_t s = 0; s < a.W; ++s, x += a.C) {
      RF_UNROLL for (int v = 0; v < kVecs; ++v) sum[v] = sum[v] + (n == kLanes ? load(x + v * kLanes) : load_n(x, n));
    }
    RF_UNROLL for (int v = 0; v < kVecs; ++v) total[v] = total[v] + sum[v];
  }
  RF_UNROLL for (int v = 0; v < kVecs; ++v) store_n(y + v * kLanes, total[v] * factor, n);
}

// The unit of work is a line or four of channels of one image: the whole plane of it is one thread's.
template <class T>
void global_average(const PoolArgs& a, int rank, int size) {
  constexpr int kBlock = 4 * kLanes;
  const int64_t blocks = (a.C + kBlock - 1) / kBlock;
  const Range units = share(a.N * blocks, rank, size);
  const Vec f = broadcast(1.f / float(a.H * a.W));
  for (int64_t u = units.begin; u < units.end; ++u) {
    const int64_t image = u / blocks;
    int64_t c = u % blocks * kBlock;
    const int64_t end = at_most(c + kBlock, a.C);
    const T* x = static_cast<const T*>(a.x) + image * a.H * a.W * a.C;
    T* y = static_cast<T*>(a.y) + image * a.C;
    if (c + kBlock <= end) {
      mean_block<4>(y + c, x + c, a, f, kLanes);
      continue;
    }
    for (; c + kLanes <= end; c += kLanes) mean_block<1>(y + c, x + c, a, f, kLanes);
    if (c < end) mean_block<1>(y + c, x + c, a, f, int(end - c));
  }
}

}  // namespace

void pool_max(const PoolArgs& a, int rank, int size) {
  a.dtype == DType::f32 ? pool<Max, float>(a, rank, size) : pool<Max, bf16>(a, rank, size);
}

void pool_average(const PoolArgs& a, int rank, int size) {
  a.dtype == DType::f32 ? pool<Sum, float>(a, rank, size) : pool<Sum, bf16>(a, rank, size);
}

void pool_global_average(const PoolArgs& a, int rank, int size) {
  a.dtype == DType::f32 ? global_average<float>(a, rank, size) : global_average<bf16>(a, rank, size);
}

}  // namespace RF_ISA
}  // namespace rf
