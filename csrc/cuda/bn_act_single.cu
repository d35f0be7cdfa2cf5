// bn_act training forward in one pass: x is read once, kept in shared memory between the statistics and the apply.
// Bytes: x and the residual read once, y written once, and two floats a block and channel, which never leave L2.
// The idea: a cooperative launch keeps two blocks on every multiprocessor; each copies its chunk of rows into shared
// memory without passing registers (cp.async, all of it in flight at once), takes the chunk's moments, meets the others
// at one grid-wide barrier, merges every chunk's moments for its own channels and applies from shared memory.
// It fits up to about 13 MB of x on an A100 and 25 MB on an H100; larger tensors take the kernels of bn_act.cu.
#include <cooperative_groups.h>

#include "bn_act.cuh"
#include "launch.cuh"

namespace rf::cuda {

struct SingleArgs {
  BnActArgs bn;
  Tiles tiles;
  int slots;  // rows of the chunk a thread keeps
};

__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The partials were written by other blocks in this kernel: loads through L2, never the read-only path.
template <int V>
__device__ __forceinline__ void load_partials(float (&out)[V], const float* p) {
  static_assert(V % 4 == 0, "whole packs of floats");
#pragma unroll
  for (int v = 0; v < V; v += 4) {
    const float4 f = __ldcg(reinterpret_cast<const float4*>(p + v));
    out[v] = f.x, out[v + 1] = f.y, out[v + 2] = f.z, out[v + 3] = f.w;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) bn_single_pass(SingleArgs a) {
  constexpr int V = kVec<T>, U = kForwardRows<V>;
  // A thread's packs lie kThreads apart and only it touches them: no bank conflicts, no barrier around them.
  extern __shared__ uint4 slices[];
  __shared__ MergeStore store;
  __shared__ AffineStore coefficients;
  const BnActArgs& bn = a.bn;
  const Place<V> at(a.tiles);
  const T* x = static_cast<const T*>(bn.x) + at.channel;
  const int64_t first = (at.begin + at.ty) * bn.channels, step = int64_t(at.height) * bn.channels;
  const int half = at.mine / 2 / U * U;
  uint4* slice = slices + threadIdx.x;

  for (int i = 0; i < half; ++i) copy_async(slice + i * kThreads, x + first + i * step);
  commit_copies();
  for (int i = half; i < at.mine; ++i) copy_async(slice + i * kThreads, x + first + i * step);
  commit_copies();

  Partial<V> p;
  float shift[V];
  widen<T, V>(shift, at.active ? load_keep<T, V>(x) : Raw<T, V>{});
  const auto add = [&](int i, auto count) {
    constexpr int N = decltype(count)::value;
    float d[N][V];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      widen<T, V>(d[u], slice[(i + u) * kThreads]);
#pragma unroll
      for (int v = 0; v < V; ++v) d[u][v] -= shift[v];
    }
    add_rows(p, d);
  };
  wait_copies<1>();
  for_rows<U>(0, half, add);
  wait_copies<0>();
  for_rows<U>(half, at.mine, add);

  float n, mean, m2;
  if (block_merge<ChanMoments>(p, at, store, n, mean, m2)) {
    const int c = at.first_channel + int(threadIdx.x);
    if (c < bn.channels) {
      bn.workspace[partial_at(a.tiles, at.chunk, 0, c)] = mean;
      bn.workspace[partial_at(a.tiles, at.chunk, 1, c)] = m2;
    }
  }
  cooperative_groups::this_grid().sync();

  // Every block merges all chunks of its channels in the same order, so all agree to the bit.
  p = Partial<V>{};
  if (at.active) {
    for (int i = at.ty; i < a.tiles.chunks; i += at.height) {
      const float count = chunk_count(a.tiles, i);
      float means[V], m2s[V];
      load_partials(means, bn.workspace + partial_at(a.tiles, i, 0, at.channel));
      load_partials(m2s, bn.workspace + partial_at(a.tiles, i, 1, at.channel));
#pragma unroll
      for (int v = 0; v < V; ++v) ChanMoments::merge(p.n, p.a[v], p.b[v], count, means[v], m2s[v]);
      p.n += count;
    }
  }
  if (block_merge<ChanMoments>(p, at, store, n, mean, m2)) {
    const int column = threadIdx.x, c = at.first_channel + column;
    if (c < bn.channels) {
      float k[1];
      widen<T, 1>(k, load_keep<T, 1>(static_cast<const T*>(bn.x) + c));
      mean += k[0];
      const float var = m2 / float(bn.rows);
      coefficients.set(column, affine_of(c, bn.gamma, bn.beta, mean, var, bn.eps));
      if (at.chunk == 0) bn.mean[c] = mean, bn.var[c] = var;
    }
  }
  __syncthreads();
  if (!at.active) return;

  const AffinePack<V> f(coefficients, at.tx);
  const T* residual = static_cast<const T*>(bn.residual) + at.channel;
  T* y = static_cast<T*>(bn.y) + at.channel;
  const bool has_residual = bn.residual != nullptr;
  const float floor = bn.relu ? 0.f : kNoFloor;
  for_rows<U>(0, at.mine, [&](int i, auto count) {
    constexpr int N = decltype(count)::value;
    const int64_t offset = first + i * step;
    Raw<T, V> rx[N], rr[N];
#pragma unroll
    for (int u = 0; u < N; ++u) rr[u] = has_residual ? load_last<T, V>(residual + offset + u * step) : Raw<T, V>{};
#pragma unroll
    for (int u = 0; u < N; ++u) rx[u] = slice[(i + u) * kThreads];
    finish_rows<T, V, N>(y + offset, rx, rr, has_residual, f, floor, step);
  });
}

// The cut, or slots == 0 where it does not fit.
template <class T>
static SingleArgs plan(const BnActArgs& a) {
  SingleArgs args{a, {}, 0};
  if (!vectorizes<T>(a.channels)) return args;
  const Device& card = current_device();
  const int blocks = card.sms * kBlocksPerSm;
  const Tiles tiles = make_tiles(a.rows, a.channels, kVec<T>, blocks);
  const int64_t height = kThreads >> tiles.log_width;
  const int64_t slots = (tiles.chunk_rows + height - 1) / height;
  constexpr int64_t kStatic = sizeof(MergeStore) + sizeof(AffineStore) + 64,
                    kReserved = 1024;  // a block's own kilobyte
  const int64_t shared = slots * kThreads * kPackBytes + kStatic;
  const bool fits = shared <= card.shared_per_block && (shared + kReserved) * kBlocksPerSm <= card.shared_per_sm;
  if (!fits || tiles.blocks() > blocks) return args;
  args.tiles = tiles;
  args.slots = int(slots);
  return args;
}

bool bn_act_fits_single(const Target& target, int64_t rows, int channels) {
  const DeviceGuard guard(target);
  BnActArgs a{};
  a.rows = rows, a.channels = channels;
  bool fits = false;
  dispatch(target.dtype, [&](auto t) { fits = plan<decltype(t)>(a).slots > 0; });
  return fits;
}

bool bn_act_single_pass(const Target& target, const BnActArgs& a) {
  bool done = false;
  dispatch(target.dtype, [&](auto t) {
    using T = decltype(t);
    const SingleArgs args = plan<T>(a);
    if (!args.slots) return;
    const unsigned shared = unsigned(args.slots) * kThreads * kPackBytes;
    // Blocks that are not all resident would wait for each other for ever; the driver's count is asked, not trusted to
    // ours.
    if (resident_blocks<bn_single_pass<T>>(shared, kBlocksPerSm) < args.tiles.blocks()) return;
    launch<bn_single_pass<T>>(target, {args.tiles.blocks(), shared, true}, args);
    done = true;
  });
  return done;
}

}  // namespace rf::cuda
