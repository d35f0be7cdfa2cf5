// bn_act backward over [rows, channels]. g = dy where the ReLU let through, else 0.
//   reduce: dbeta = sum g, dgamma = sum g (x - mean) * rstd
//   apply:  dx = scale * (g - dbeta / rows - (x - mean) * rstd * dgamma / rows), dresidual = g
// Bytes: reduce reads dy and x (and y) once; apply reads them once more and writes dx and dresidual. The mask comes
// from y where a residual was added; without one it is recomputed from x by the forward's own expression and y is not
// read: five tensor passes instead of seven. With running statistics dx needs no sums, and x is read only for the mask.
// Flops: about 6 an element and pass. The apply walks each chunk from its end, where L2 still holds what reduce read
// last.
#include "bn_act.cuh"
#include "launch.cuh"

namespace rf::cuda {

enum class Mask { none, output, recompute };

struct ReduceArgs {
  BnActBackwardArgs bn;
  Tiles tiles;
};

// g for U rows, in place of dy. `d` is x - mean where x was read.
template <class T, int V, Mask kMask, int U>
__device__ __forceinline__ void masked(float (&g)[U][V], const Raw<T, V> (&y)[U], const float (&d)[U][V],
                                       const AffinePack<V>& f) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if constexpr (kMask == Mask::output) {
      float out[V];
      widen<T, V>(out, y[u]);
#pragma unroll
      for (int v = 0; v < V; ++v) g[u][v] = out[v] <= 0.f ? 0.f : g[u][v];  // a NaN passes, as in torch
    } else if constexpr (kMask == Mask::recompute) {
      // Compared with what rounds to zero in T: the mask is that of the y the forward stored.
#pragma unroll
      for (int v = 0; v < V; ++v) {
        g[u][v] = fmaf(d[u][v], f.scale[v], f.beta[v]) <= ZeroBelow<T>::value ? 0.f : g[u][v];
      }
    }
  }
}

// Loads U rows of dy and, as far as wanted, y and x; all loads are issued before the first value is used.
template <class T, int V, Mask kMask, int U>
__device__ __forceinline__ void load_rows(float (&g)[U][V], float (&d)[U][V], const T* dy, const T* x, const T* y,
                                          int64_t offset, int64_t step, bool want_x, bool last,
                                          const AffinePack<V>& f) {
  Raw<T, V> rdy[U], rx[U], ry[U] = {};
  const auto load = [&](const T* p) { return last ? load_last<T, V>(p) : load_keep<T, V>(p); };
#pragma unroll
  for (int u = 0; u < U; ++u) rdy[u] = load(dy + offset + u * step);
#pragma unroll
  for (int u = 0; u < U; ++u) rx[u] = want_x ? load(x + offset + u * step) : Raw<T, V>{};
  if constexpr (kMask == Mask::output) {
#pragma unroll
    for (int u = 0; u < U; ++u) ry[u] = load(y + offset + u * step);
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    widen<T, V>(g[u], rdy[u]);
    widen<T, V>(d[u], rx[u]);
#pragma unroll
    for (int v = 0; v < V; ++v) d[u][v] -= f.mean[v];
  }
  masked<T, V, kMask, U>(g, ry, d, f);
}

template <class T, int V, Mask kMask>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) bn_backward_reduce(ReduceArgs a) {
  __shared__ MergeStore store;
  __shared__ AffineStore coefficients;
  const BnActBackwardArgs& bn = a.bn;
  const Place<V> at(a.tiles);
  fill_affine(coefficients, at, bn.channels, bn.gamma, bn.beta, bn.mean, bn.var, bn.eps);
  Partial<V> p;
  if (at.active) {
    const AffinePack<V> f(coefficients, at.tx);
    const T *dy = static_cast<const T*>(bn.dy) + at.channel, *x = static_cast<const T*>(bn.x) + at.channel;
    const T* y = static_cast<const T*>(bn.y) + at.channel;
    const int64_t first = (at.begin + at.ty) * bn.channels, step = int64_t(at.height) * bn.channels;
    for_rows<kBackwardRows<V>>(0, at.mine, [&](int i, auto count) {
      constexpr int U = decltype(count)::value;
      float g[U][V], d[U][V];
      load_rows<T, V, kMask, U>(g, d, dy, x, y, first + i * step, step, true, false, f);
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          p.a[v] += g[u][v];
          p.b[v] = fmaf(g[u][v], d[u][v], p.b[v]);
        }
      }
    });
  }
  float n, sum, product;
  if (block_merge<AddSums>(p, at, store, n, sum, product)) {
    const int c = at.first_channel + int(threadIdx.x);
    if (c < bn.channels) {
      bn.workspace[partial_at(a.tiles, at.chunk, 0, c)] = sum;
      bn.workspace[partial_at(a.tiles, at.chunk, 1, c)] = product;
    }
  }
}

__global__ void __launch_bounds__(kThreads) bn_backward_finish(ReduceArgs a) {
  int c;
  float sum, product;
  if (merge_chunks<AddSums>(a.tiles, a.bn.workspace, c, sum, product)) {
    a.bn.dbeta[c] = sum;
    a.bn.dgamma[c] = product * (1.f / sqrtf(a.bn.var[c] + a.bn.eps));
  }
}

template <class T, int V, Mask kMask>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) bn_backward_apply(ReduceArgs a) {
  __shared__ AffineStore coefficients;
  __shared__ float store_slope[kMaxColumns], store_offset[kMaxColumns];
  const BnActBackwardArgs& bn = a.bn;
  const Place<V> at(a.tiles);
  const bool through_statistics = bn.training && bn.dx;
  const int own = at.first_channel + int(threadIdx.x);
  if (through_statistics && int(threadIdx.x) < at.width * V && own < bn.channels) {
    const float rstd = 1.f / sqrtf(bn.var[own] + bn.eps), scale = bn.gamma ? bn.gamma[own] * rstd : rstd;
    const float per_row = -scale / float(bn.rows);
    store_slope[threadIdx.x] = per_row * rstd * bn.dgamma[own];
    store_offset[threadIdx.x] = per_row * bn.dbeta[own];
  }
  fill_affine(coefficients, at, bn.channels, bn.gamma, bn.beta, bn.mean, bn.var, bn.eps);  // ends in a barrier
  if (!at.active) return;
  const AffinePack<V> f(coefficients, at.tx);
  float slope[V] = {}, shift[V] = {};
  if (through_statistics) {
#pragma unroll
    for (int v = 0; v < V; ++v) slope[v] = store_slope[at.tx * V + v], shift[v] = store_offset[at.tx * V + v];
  }
  const T *dy = static_cast<const T*>(bn.dy) + at.channel, *x = static_cast<const T*>(bn.x) + at.channel;
  const T* y = static_cast<const T*>(bn.y) + at.channel;
  T *dx = static_cast<T*>(bn.dx) + at.channel, *dresidual = static_cast<T*>(bn.dresidual) + at.channel;
  const bool want_x = through_statistics || kMask == Mask::recompute;
  const int64_t first = (at.end - 1 - at.ty) * bn.channels, step = -int64_t(at.height) * bn.channels;
  for_rows<kBackwardRows<V>>(0, at.mine, [&](int i, auto count) {
    constexpr int U = decltype(count)::value;
    float g[U][V], d[U][V];
    const int64_t offset = first + i * step;
    load_rows<T, V, kMask, U>(g, d, dy, x, y, offset, step, want_x, true, f);
    if (bn.dresidual) {
#pragma unroll
      for (int u = 0; u < U; ++u) store<T, V>(dresidual + offset + u * step, narrow<T, V>(g[u]));
    }
    if (!bn.dx) return;
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        // A branch, not a zero slope: 0 * NaN would carry a NaN of x into a gradient that does not depend on it.
        g[u][v] =
            through_statistics ? fmaf(d[u][v], slope[v], fmaf(g[u][v], f.scale[v], shift[v])) : g[u][v] * f.scale[v];
      }
      store<T, V>(dx + offset + u * step, narrow<T, V>(g[u]));
    }
  });
}

template <class T, int V, Mask kMask>
static void run(const Target& target, const ReduceArgs& args) {
  const BnActBackwardArgs& a = args.bn;
  if (a.dgamma && !a.sums_given) {
    launch<bn_backward_reduce<T, V, kMask>>(target, {args.tiles.blocks()}, args);
    launch<bn_backward_finish>(target, {(a.channels + kFinishColumns - 1) / kFinishColumns}, args);
  }
  if (a.dx || a.dresidual) launch<bn_backward_apply<T, V, kMask>>(target, {args.tiles.blocks()}, args);
}

template <class T, int V>
static void choose_mask(const Target& target, const ReduceArgs& args) {
  if (!args.bn.relu) return run<T, V, Mask::none>(target, args);
  if (args.bn.y) return run<T, V, Mask::output>(target, args);
  run<T, V, Mask::recompute>(target, args);
}

void bn_act_backward(const Target& target, const BnActBackwardArgs& a) {
  RF_CHECK(a.rows >= 1 && a.channels >= 1, "bn_act: wanted at least one row and channel, got ", a.rows, " and ",
           a.channels);
  RF_CHECK(!a.dgamma == !a.dbeta, "bn_act: wanted dgamma and dbeta both or neither");
  RF_CHECK(a.dgamma || !(a.training && a.dx), "bn_act: dx in training wants room for dgamma and dbeta");
  check_aligned("bn_act", static_cast<char*>(a.dx), static_cast<char*>(a.dresidual), static_cast<const char*>(a.dy),
                static_cast<const char*>(a.x), static_cast<const char*>(a.y));
  const DeviceGuard guard(target);
  dispatch(target.dtype, [&](auto t) {
    using T = decltype(t);
    const int vec = vectorizes<T>(a.channels) ? kVec<T> : 1;
    const ReduceArgs args{a, make_tiles(a.rows, a.channels, vec, current_device().sms * kBlocksPerSm)};
    vec == 1 ? choose_mask<T, 1>(target, args) : choose_mask<T, kVec<T>>(target, args);
  });
}

}  // namespace rf::cuda
