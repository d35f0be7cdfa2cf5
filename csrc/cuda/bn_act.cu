// bn_act forward: y = act((x - mean) / sqrt(var + eps) * gamma + beta + residual) over [rows, channels].
// Bytes: statistics read x once (and write two floats a chunk and channel); apply reads x and the residual once and
// writes y once. Training therefore reads x twice; bn_act_single.cu reads it once where the tensor fits on the card.
// Flops: about 5 an element for the statistics, 3 for the apply: memory decides.
// The idea: every thread owns a pack of channels and walks rows, so sums need no shuffle until the end; moments of four
// rows are taken around their own mean and merged by Chan's rule, which is exact at any mean/std. The apply walks rows
// in the reverse order, so that what the statistics read last is still in L2.
#include "bn_act.cuh"
#include "launch.cuh"

namespace rf::cuda {

struct StatisticsArgs {
  const void* x;
  float* partial;
  Tiles tiles;
};
struct FinishArgs {
  const float* partial;
  float* mean;
  float* var;
  Tiles tiles;
};
struct ApplyArgs {
  BnActArgs bn;
  Tiles tiles;
};

// The first row of the tensor is every block's shift: the moments then are of the size of the deviations, and a common
// shift keeps the chunks' means comparable without rounding them to the size of the mean.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) bn_statistics(StatisticsArgs a) {
  __shared__ MergeStore store;
  const Place<V> at(a.tiles);
  const T* x = static_cast<const T*>(a.x) + at.channel;
  const int64_t step = int64_t(at.height) * a.tiles.channels;
  Partial<V> p;
  if (at.active) {
    float shift[V];
    widen<T, V>(shift, load_keep<T, V>(x));
    const T* first = x + (at.begin + at.ty) * a.tiles.channels;
    for_rows<kStatisticsRows<V>>(0, at.mine, [&](int i, auto count) {
      constexpr int U = decltype(count)::value;
      Raw<T, V> raw[U];
      float d[U][V];
#pragma unroll
      for (int u = 0; u < U; ++u) raw[u] = load_keep<T, V>(first + (i + u) * step);
#pragma unroll
      for (int u = 0; u < U; ++u) {
        widen<T, V>(d[u], raw[u]);
#pragma unroll
        for (int v = 0; v < V; ++v) d[u][v] -= shift[v];
      }
      add_rows(p, d);
    });
    if (at.chunk == 0 && at.ty == 0) {
#pragma unroll
      for (int v = 0; v < V; ++v) a.partial[partial_at(a.tiles, a.tiles.chunks, 0, at.channel + v)] = shift[v];
    }
  }
  float n, mean, m2;
  if (block_merge<ChanMoments>(p, at, store, n, mean, m2)) {
    const int c = at.first_channel + int(threadIdx.x);
    if (c < a.tiles.channels) {
      a.partial[partial_at(a.tiles, at.chunk, 0, c)] = mean;
      a.partial[partial_at(a.tiles, at.chunk, 1, c)] = m2;
    }
  }
}

__global__ void __launch_bounds__(kThreads) bn_finish(FinishArgs a) {
  int c;
  float mean, m2;
  if (merge_chunks<ChanMoments>(a.tiles, a.partial, c, mean, m2)) {
    a.mean[c] = a.partial[partial_at(a.tiles, a.tiles.chunks, 0, c)] + mean;
    a.var[c] = m2 / float(a.tiles.rows);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) bn_apply(ApplyArgs a) {
  __shared__ AffineStore store;
  const BnActArgs& bn = a.bn;
  const Place<V> at(a.tiles);
  fill_affine(store, at, bn.channels, bn.gamma, bn.beta, bn.mean, bn.var, bn.eps);
  if (!at.active) return;
  const AffinePack<V> f(store, at.tx);
  const T* x = static_cast<const T*>(bn.x) + at.channel;
  const T* residual = static_cast<const T*>(bn.residual) + at.channel;
  T* y = static_cast<T*>(bn.y) + at.channel;
  const bool has_residual = bn.residual != nullptr;
  const float floor = bn.relu ? 0.f : kNoFloor;
  const int64_t last = (at.end - 1 - at.ty) * bn.channels, step = -int64_t(at.height) * bn.channels;  // from its end
  for_rows<kForwardRows<V>>(0, at.mine, [&](int i, auto count) {
    constexpr int U = decltype(count)::value;
    const int64_t offset = last + i * step;
    Raw<T, V> rx[U], rr[U];
#pragma unroll
    for (int u = 0; u < U; ++u) rx[u] = load_last<T, V>(x + offset + u * step);
#pragma unroll
    for (int u = 0; u < U; ++u) rr[u] = has_residual ? load_last<T, V>(residual + offset + u * step) : Raw<T, V>{};
    finish_rows<T, V, U>(y + offset, rx, rr, has_residual, f, floor, step);
  });
}

static Tiles cut(const Target& target, int64_t rows, int channels) {
  Tiles tiles{};
  dispatch(target.dtype, [&](auto t) {
    using T = decltype(t);
    const int vec = vectorizes<T>(channels) ? kVec<T> : 1;
    tiles = make_tiles(rows, channels, vec, current_device().sms * kBlocksPerSm);
  });
  return tiles;
}

int64_t bn_act_workspace(const Target& target, int64_t rows, int channels) {
  const DeviceGuard guard(target);
  return workspace_floats(cut(target, rows, channels));
}

static void check_bn(const BnActArgs& a) {
  RF_CHECK(a.rows >= 1 && a.channels >= 1, "bn_act: wanted at least one row and channel, got ", a.rows, " and ",
           a.channels);
  check_aligned("bn_act", static_cast<char*>(a.y), static_cast<const char*>(a.x), static_cast<const char*>(a.residual));
}

void bn_act_inference(const Target& target, const BnActArgs& a) {
  check_bn(a);
  const DeviceGuard guard(target);
  const Tiles tiles = cut(target, a.rows, a.channels);
  dispatch(target.dtype, [&](auto t) {
    using T = decltype(t);
    const ApplyArgs args{a, tiles};
    if (vectorizes<T>(a.channels)) {
      launch<bn_apply<T, kVec<T>>>(target, {tiles.blocks()}, args);
    } else {
      launch<bn_apply<T, 1>>(target, {tiles.blocks()}, args);
    }
  });
}

static void launch_statistics(const Target& target, const BnActArgs& a, const Tiles& tiles) {
  dispatch(target.dtype, [&](auto t) {
    using T = decltype(t);
    const StatisticsArgs args{a.x, a.workspace, tiles};
    if (vectorizes<T>(a.channels)) {
      launch<bn_statistics<T, kVec<T>>>(target, {tiles.blocks()}, args);
    } else {
      launch<bn_statistics<T, 1>>(target, {tiles.blocks()}, args);
    }
  });
  launch<bn_finish>(target, {(a.channels + kFinishColumns - 1) / kFinishColumns},
                    FinishArgs{a.workspace, a.mean, a.var, tiles});
}

void bn_act_statistics(const Target& target, const BnActArgs& a) {
  check_bn(a);
  const DeviceGuard guard(target);
  launch_statistics(target, a, cut(target, a.rows, a.channels));
}

void bn_act_training(const Target& target, const BnActArgs& a, Passes passes) {
  check_bn(a);
  const DeviceGuard guard(target);
  if (passes != Passes::several && bn_act_single_pass(target, a)) return;
  RF_CHECK(passes != Passes::single, "bn_act: a tensor of ", a.rows, " rows and ", a.channels,
           " channels does not fit this card's shared memory in one pass");
  launch_statistics(target, a, cut(target, a.rows, a.channels));
  bn_act_inference(target, a);
}

}  // namespace rf::cuda
