// max_pool2d over NHWC, forward and backward, and the end of a ResNet stem: pool(relu(bn(x))) in one pass.
// Bytes: x read once from memory (neighbouring windows meet in L1 and L2), y and one byte a place written; backward dy
// and the places read once, dx written once. The fused stem neither writes nor reads the normalised activation, four
// times the size of what it pools; a window that is zero after the ReLU has the place 255, no tap's, and so gets no
// gradient. Flops: R * S compares an output, with the norm about 6 more a tap. A thread owns a pack of channels of one
// output pixel; for the 3 x 3 window all nine loads are in flight at once. Backward gathers (each input pixel asks the
// windows that cover it), so that no atomics are needed and sums repeat bit for bit. Scatter by float atomics was not
// tried: it cannot repeat.
#include "bn_act.cuh"
#include "launch.cuh"

namespace rf::cuda {

struct PoolArgs {
  MaxPoolArgs pool;
  int packs, row_blocks;  // packs of a pixel; blocks of an output row
};
struct PoolBackwardArgs {
  MaxPoolBackwardArgs pool;
  int packs, row_blocks;  // blocks of an input row
};

constexpr int kNoPlace = 255;  // of a window whose maximum is not above 0: no tap's number

// Which row of all images, which pixel of it and which pack: a block never spans two rows.
struct PixelPlace {
  int64_t row;
  int column, pack;
  __device__ PixelPlace(int packs, int row_blocks) {
    row = blockIdx.x / unsigned(row_blocks);
    const int i = int(blockIdx.x % unsigned(row_blocks)) * kThreads + int(threadIdx.x);
    column = i / packs;
    pack = i % packs;
  }
};

template <int V>
__device__ __forceinline__ void store_places(uint8_t* p, const int (&place)[V]) {
  if constexpr (V == 1) {
    *p = uint8_t(place[0]);
  } else {
    uint32_t w[V / 4];
#pragma unroll
    for (int i = 0; i < V / 4; ++i) {
      w[i] = place[4 * i] | place[4 * i + 1] << 8 | place[4 * i + 2] << 16 | place[4 * i + 3] << 24;
    }
    if constexpr (V == 8) {
      store<uint8_t, 8>(p, {w[0], w[1]});
    } else {
      store<uint8_t, 4>(p, w[0]);
    }
  }
}

template <int V>
__device__ __forceinline__ void load_places(int (&place)[V], const uint8_t* p) {
  const Raw<uint8_t, V> raw = load_last<uint8_t, V>(p);
  if constexpr (V == 1) {
    place[0] = raw;
  } else if constexpr (V == 4) {
#pragma unroll
    for (int v = 0; v < 4; ++v) place[v] = raw >> (8 * v) & 255;
  } else {
#pragma unroll
    for (int v = 0; v < 8; ++v) place[v] = (v < 4 ? raw.x : raw.y) >> (8 * (v & 3)) & 255;
  }
}

// kSide: side of the window where it is square and known, else 0. kNorm: pool relu(bn(x)).
template <class T, int V, int kSide, bool kNorm>
__global__ void __launch_bounds__(kThreads, 3) max_pool_forward(PoolArgs a) {
  extern __shared__ float coefficients[];  // mean, scale, beta of every channel
  const MaxPoolArgs& pool = a.pool;
  const Window& win = pool.window;
  const int channels = pool.channels;
  if constexpr (kNorm) {
    for (int c = threadIdx.x; c < channels; c += kThreads) {
      const Affine f = affine_of(c, pool.gamma, pool.beta, pool.mean[c], pool.var[c], pool.eps);
      coefficients[c] = f.mean, coefficients[channels + c] = f.scale, coefficients[2 * channels + c] = f.beta;
    }
    __syncthreads();
  }
  const PixelPlace at(a.packs, a.row_blocks);
  if (at.column >= pool.out_width) return;
  const int64_t image = at.row / pool.out_height;
  const int top = int(at.row % pool.out_height) * win.stride_h - win.pad_h, left = at.column * win.stride_w - win.pad_w;
  const int c = at.pack * V;
  const T* x = static_cast<const T*>(pool.x) + image * pool.height * pool.width * channels + c;
  const int kernel_h = kSide ? kSide : win.kernel_h, kernel_w = kSide ? kSide : win.kernel_w;

  float best[V];
  int place[V];
  bool first = !kNorm;
#pragma unroll
  for (int v = 0; v < V; ++v) {  // after a ReLU only what is above 0 has a gradient, hence a place
    best[v] = kNorm ? 0.f : kNoFloor, place[v] = kNorm ? kNoPlace : 0;
  }
  const auto inside = [&](int r, int s) {
    const int h = top + r * win.dilation_h, w = left + s * win.dilation_w;
    return unsigned(h) < unsigned(pool.height) && unsigned(w) < unsigned(pool.width);
  };
  const auto load = [&](int r, int s) {
    const int64_t pixel = int64_t(top + r * win.dilation_h) * pool.width + (left + s * win.dilation_w);
    return load_keep<T, V>(x + pixel * channels);
  };
  const auto take = [&](Raw<T, V> raw, int tap) {
    float value[V];
    widen<T, V>(value, raw);
    if constexpr (kNorm) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int k = c + v;
        value[v] =
            max_nan(affine(value[v], coefficients[k], coefficients[channels + k], coefficients[2 * channels + k]), 0.f);
      }
      widen<T, V>(value, narrow<T, V>(value));  // ties are those of the activation torch would have stored
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      // The first largest; of NaNs the last, as in torch. A window of -inf alone keeps its first place.
      const bool better = value[v] > best[v] || value[v] != value[v] || first;
      best[v] = better ? value[v] : best[v];
      place[v] = better ? tap : place[v];
    }
    first = false;
  };
  if constexpr (kSide != 0) {
    Raw<T, V> raw[kSide * kSide];
#pragma unroll
    for (int t = 0; t < kSide * kSide; ++t) {
      if (inside(t / kSide, t % kSide)) raw[t] = load(t / kSide, t % kSide);
    }
#pragma unroll
    for (int t = 0; t < kSide * kSide; ++t) {
      if (inside(t / kSide, t % kSide)) take(raw[t], t);
    }
  } else {
    for (int r = 0; r < kernel_h; ++r) {
      for (int s = 0; s < kernel_w; ++s) {
        if (inside(r, s)) take(load(r, s), r * kernel_w + s);
      }
    }
  }
  const int64_t out = (at.row * pool.out_width + at.column) * channels + c;
  store<T, V>(static_cast<T*>(pool.y) + out, narrow<T, V>(best));
  if (pool.argmax) store_places<V>(pool.argmax + out, place);
}

// Output positions p whose window covers input position i: i = p * stride - pad + tap * dilation.
struct Cover {
  int first, last;
  __device__ Cover(int i, int kernel, int stride, int pad, int dilation, int size) {
    const int reach = i + pad - (kernel - 1) * dilation;
    first = reach <= 0 ? 0 : (reach + stride - 1) / stride;
    last = (i + pad) / stride < size - 1 ? (i + pad) / stride : size - 1;
  }
};

// kCover: at most so many windows cover a pixel along each side (2 for 3 x 3 with stride 2), else 0.
template <class T, int V, int kCover>
__global__ void __launch_bounds__(kThreads, 3) max_pool_gradient(PoolBackwardArgs a) {
  const MaxPoolBackwardArgs& pool = a.pool;
  const Window& win = pool.window;
  const PixelPlace at(a.packs, a.row_blocks);
  if (at.column >= pool.width) return;
  const int64_t image = at.row / pool.height;
  const int h = int(at.row % pool.height), w = at.column, c = at.pack * V;
  const int64_t channels = pool.channels;
  const Cover rows(h, win.kernel_h, win.stride_h, win.pad_h, win.dilation_h, pool.out_height);
  const Cover columns(w, win.kernel_w, win.stride_w, win.pad_w, win.dilation_w, pool.out_width);
  const int64_t base = image * pool.out_height * pool.out_width * channels + c;
  float sum[V] = {};
  const auto gather = [&](int p, int q) {
    const int r = h + win.pad_h - p * win.stride_h, s = w + win.pad_w - q * win.stride_w;
    if (r % win.dilation_h || s % win.dilation_w) return;  // between the taps
    const int tap = r / win.dilation_h * win.kernel_w + s / win.dilation_w;
    const int64_t from = base + (int64_t(p) * pool.out_width + q) * channels;
    float dy[V];
    int place[V];
    widen<T, V>(dy, load_keep<T, V>(static_cast<const T*>(pool.dy) + from));
    load_places<V>(place, pool.argmax + from);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += place[v] == tap ? dy[v] : 0.f;
  };
  if constexpr (kCover != 0) {
#pragma unroll
    for (int i = 0; i < kCover; ++i) {
#pragma unroll
      for (int j = 0; j < kCover; ++j) {
        if (rows.first + i <= rows.last && columns.first + j <= columns.last) gather(rows.first + i, columns.first + j);
      }
    }
  } else {
    for (int p = rows.first; p <= rows.last; ++p) {
      for (int q = columns.first; q <= columns.last; ++q) gather(p, q);
    }
  }
  store<T, V>(static_cast<T*>(pool.dx) + (at.row * pool.width + w) * channels + c, narrow<T, V>(sum));
}

static int blocks_of_row(int columns, int packs) { return (columns * packs + kThreads - 1) / kThreads; }

static void check_window(const Window& w, int height, int width, int channels) {
  RF_CHECK(w.kernel_h >= 1 && w.kernel_w >= 1 && w.kernel_h * w.kernel_w <= 255,
           "max_pool2d: wanted a window of 1 to 255 places, got ", w.kernel_h, " x ", w.kernel_w);
  RF_CHECK(int64_t(width) * channels <= 0x7fffffff && height >= 1, "max_pool2d: a row of ", width, " x ", channels,
           " values, wanted fewer than 2^31");
}

template <class T, int V, int kSide>
static void pool_forward(const Target& target, const PoolArgs& args, int64_t grid) {
  if (args.pool.mean) {
    const unsigned shared = 3 * sizeof(float) * unsigned(args.pool.channels);
    RF_CHECK(shared <= 48 * 1024, "max_pool2d: the norm before the pool takes up to 4096 channels, got ",
             args.pool.channels);
    launch<max_pool_forward<T, V, kSide, true>>(target, {grid, shared}, args);
  } else {
    launch<max_pool_forward<T, V, kSide, false>>(target, {grid}, args);
  }
}

void max_pool2d(const Target& target, const MaxPoolArgs& a) {
  check_window(a.window, a.height, a.width, a.channels);
  check_aligned("max_pool2d", static_cast<char*>(a.y), a.argmax, static_cast<const char*>(a.x));
  const DeviceGuard guard(target);
  const bool three = a.window.kernel_h == 3 && a.window.kernel_w == 3;
  dispatch(target.dtype, [&](auto t) {
    using T = decltype(t);
    const int vec = vectorizes<T>(a.channels) ? kVec<T> : 1, packs = a.channels / vec;
    const PoolArgs args{a, packs, blocks_of_row(a.out_width, packs)};
    const int64_t grid = a.images * a.out_height * args.row_blocks;
    if (vec == 1) return pool_forward<T, 1, 0>(target, args, grid);
    three ? pool_forward<T, kVec<T>, 3>(target, args, grid) : pool_forward<T, kVec<T>, 0>(target, args, grid);
  });
}

void max_pool2d_backward(const Target& target, const MaxPoolBackwardArgs& a) {
  const Window& w = a.window;
  check_window(w, a.height, a.width, a.channels);
  check_aligned("max_pool2d", static_cast<char*>(a.dx), static_cast<const char*>(a.dy), a.argmax);
  const DeviceGuard guard(target);
  const auto covered = [](int kernel, int stride, int dilation) { return ((kernel - 1) * dilation) / stride + 1; };
  const bool two =
      covered(w.kernel_h, w.stride_h, w.dilation_h) <= 2 && covered(w.kernel_w, w.stride_w, w.dilation_w) <= 2;
  dispatch(target.dtype, [&](auto t) {
    using T = decltype(t);
    const int vec = vectorizes<T>(a.channels) ? kVec<T> : 1, packs = a.channels / vec;
    const PoolBackwardArgs args{a, packs, blocks_of_row(a.width, packs)};
    const int64_t grid = a.images * a.height * args.row_blocks;
    if (vec == 1) return launch<max_pool_gradient<T, 1, 0>>(target, {grid}, args);
    two ? launch<max_pool_gradient<T, kVec<T>, 2>>(target, {grid}, args)
        : launch<max_pool_gradient<T, kVec<T>, 0>>(target, {grid}, args);
  });
}

}  // namespace rf::cuda
