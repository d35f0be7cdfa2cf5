// bn_act_max_pool2d on the CPU: normalise, ReLU and max pool without the normalised map (112x112x64 in a ResNet).
// Bytes, in maps of x: forward reads 1 and writes 1/4 (and bytes); backward reads x twice and writes dx, the pooled dy
// and places are small. bn_act and max_pool apart: forward 1 + 1 + 1 + 1/4, backward 1 written and 5 read and written.
// The idea: a place of 255 says that the winner was not above 0, so backward needs no mask and no y; a pixel gathers
// its gradient from the windows over it, twice, instead of reading a map of it.
// Forward normalises an overlapping window's pixels again (2.25 times at 3x3/2): two instructions a load, not a pass.
#include "../bn_act_max_pool2d.h"

#include "bn_act.h"
#include "max_pool.h"

namespace rf {
namespace RF_ISA {

static void find_constants(const Affine& k, int64_t channels, const float* gamma, const float* beta, const float* mean,
                           const float* var, double eps) {
  for (int64_t c = 0; c < channels; ++c) {
    const float rstd = rstd_of(var[c], eps);
    k.mean[c] = mean[c];
    k.scale[c] = gamma ? gamma[c] * rstd : rstd;
    k.beta[c] = beta ? beta[c] : 0.f;
  }
}

static void store_places(uint8_t* p, const Index& i, Whole) { store(p, i); }
static void store_places(uint8_t* p, const Index& i, Part part) { store_n(p, i, part.n); }

template <bool keep_places, class T>
static void forward_pixel(const PoolShape& s, const Affine& k, const T* corner, Range taps_h, Range taps_w, T* y,
                          uint8_t* places) {
  const int64_t step_h = s.dilation_h * s.W * s.C, step_w = s.dilation_w * s.C;
  for_columns(0, s.C, [&](int64_t c, auto lanes) {
    // What nothing beats stays without a place: the ReLU lets no gradient through there.
    Vec best = broadcast(-__builtin_inff());
    Index at = index(kNoPlace);
    for (int64_t r = taps_h.begin; r < taps_h.end; ++r) {
      for (int64_t q = taps_w.begin; q < taps_w.end; ++q) {
        const Vec v = normalise(load(corner + r * step_h + q * step_w + c, lanes), k, c);
        if (keep_places)
          take(&best, &at, v, index(int(r * s.S + q)));
        else
          best = max_nan(best, v);
      }
    }
    store(y + c, relu(best), lanes);
    if (keep_places) store_places(places + c, where_positive(at, best), lanes);
  });
}

template <class T, bool keep_places>
static void forward(const BnActMaxPoolArgs& a) {
  const PoolShape& s = a.shape;
  const int64_t padded = round_up(s.C, kMergeBlock);
  const Workspace work(size_t(3 * padded) * 4);
  float* at = work.floats();
  const Affine k = {at, at + padded, at + 2 * padded};
  find_constants(k, s.C, a.gamma, a.beta, a.mean, a.var, a.eps);
  parallel(a.threads, [&](const Team& team) {
    team.each(s.N * s.P, [&](int64_t row) {
      const int64_t h = row % s.P * s.stride_h - s.pad_h;
      const Range taps_h = valid_taps(h, s.dilation_h, s.R, s.H);
      for (int64_t q = 0; q < s.Q; ++q) {
        const int64_t w = q * s.stride_w - s.pad_w, out = (row * s.Q + q) * s.C;
        const T* corner = static_cast<const T*>(a.x) + ((row / s.P * s.H + h) * s.W + w) * s.C;
        forward_pixel<keep_places>(s, k, corner, taps_h, valid_taps(w, s.dilation_w, s.S, s.W),
                                   static_cast<T*>(a.y) + out, keep_places ? a.places + out : nullptr);
      }
    });
  });
}

// The gradient that reaches a pixel through the pool and the ReLU.
template <class T>
RF_INLINE Vec gather(const T* dy, const uint8_t* places, const Hit* hits, int count, int64_t c, Whole) {
  Vec sum = zero();
  for (int i = 0; i < count; ++i) {
    const int64_t at = hits[i].offset + c;
    sum = add_where(sum, load(dy + at), places + at, hits[i].place);
  }
  return sum;
}
template <class T>
RF_INLINE Vec gather(const T* dy, const uint8_t* places, const Hit* hits, int count, int64_t c, Part part) {
  Vec sum = zero();
  for (int i = 0; i < count; ++i) {
    const int64_t at = hits[i].offset + c;
    sum = add_where_n(sum, load_n(dy + at, part.n), places + at, hits[i].place, part.n);
  }
  return sum;
}

// Calls body(offset of the pixel in x, dy and places of its image, windows over it, their count) over a tile's pixels.
template <class T, class Body>
RF_INLINE void for_pixels(const BnActMaxPoolBackwardArgs& a, const Tile& t, const Body& body) {
  const PoolShape& s = a.shape;
  Hit hits[kMostHits];
  int64_t line = t.row_begin / s.W, w = t.row_begin % s.W;
  for (int64_t row = t.row_begin; row < t.row_end; ++line, w = 0) {
    const int64_t h = line % s.H, image = line / s.H * s.P * s.Q * s.C;
    const Range rows = covering(h, s.pad_h, s.stride_h, s.dilation_h, s.R, s.P);
    for (; w < s.W && row < t.row_end; ++w, ++row) {
      const int count = find_hits(s, h, w, rows, hits);
      body(row * s.C, static_cast<const T*>(a.dy) + image, a.places + image, hits, count);
    }
  }
}

// Constants of dx = scale * (g - bias - (x - mean) * slope).
struct Backward {
  Affine k;
  float *bias, *slope;
};

// Sums of g and g * (x - mean) over a chunk of pixels; dx too where it needs no sums.
template <class T, bool eval_dx>
static void reduce_tile(const BnActMaxPoolBackwardArgs& a, const Backward& b, float* sums, float* dots, const Tile& t) {
  for_columns(t.col_begin, t.col_end, [&](int64_t c, auto) {
    store(sums + c, zero());
    store(dots + c, zero());
  });
  for_pixels<T>(a, t, [&](int64_t at, const T* dy, const uint8_t* places, const Hit* hits, int count) {
    for_columns(t.col_begin, t.col_end, [&](int64_t c, auto lanes) {
      const Vec g = gather(dy, places, hits, count, c, lanes);
      const Vec centred = load(static_cast<const T*>(a.x) + at + c, lanes) - load(b.k.mean + c);
      store(sums + c, load(sums + c) + g);
      store(dots + c, fma(g, centred, load(dots + c)));
      if (eval_dx) store(static_cast<T*>(a.dx) + at + c, g * load(b.k.scale + c), lanes);
    });
  });
}

template <class T, bool streamed>
static void dx_tile(const BnActMaxPoolBackwardArgs& a, const Backward& b, const Tile& t) {
  for_pixels<T>(a, t, [&](int64_t at, const T* dy, const uint8_t* places, const Hit* hits, int count) {
    for_columns(t.col_begin, t.col_end, [&](int64_t c, auto lanes) {
      const Vec g = gather(dy, places, hits, count, c, lanes);
      const Vec centred = load(static_cast<const T*>(a.x) + at + c, lanes) - load(b.k.mean + c);
      const Vec inner = g - fma(centred, load(b.slope + c), load(b.bias + c));
      put<streamed>(static_cast<T*>(a.dx) + at + c, inner * load(b.k.scale + c), lanes);
    });
  });
  if (streamed) stream_fence();
}

// Merges the chunks' sums in order, in float64, and makes dx's constants.
static void finish_channels(const BnActMaxPoolBackwardArgs& a, const Grid& grid, const float* partials,
                            const Backward& b, Range channels) {
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    double sum = 0, dot = 0;
    for (int64_t chunk = 0; chunk < grid.chunks; ++chunk) {
      const float* sums = partials + 2 * chunk * grid.padded + c;
      sum += double(sums[0]);
      dot += double(sums[grid.padded]);
    }
    const double rstd = rstd_of(a.var[c], a.eps);
    dot *= rstd;
    if (a.dgamma) a.dgamma[c] = float(dot);
    if (a.dbeta) a.dbeta[c] = float(sum);
    b.bias[c] = float(sum / double(grid.rows));
    b.slope[c] = float(dot * rstd / double(grid.rows));
  }
}

template <class T>
static void backward(const BnActMaxPoolBackwardArgs& a) {
  const PoolShape& s = a.shape;
  const Grid grid(s.N * s.H * s.W, s.C);
  const size_t sums_size = size_t(2 * grid.chunks * grid.padded);
  const Workspace work((sums_size + size_t(5 * grid.padded)) * 4);
  float* partials = work.floats();
  float* at = partials + sums_size;
  const Backward b = {{at, at + grid.padded, at + 2 * grid.padded}, at + 3 * grid.padded, at + 4 * grid.padded};
  find_constants(b.k, s.C, a.gamma, nullptr, a.mean, a.var, a.eps);
  const bool streamed = a.dx && can_stream(a.dx, grid, a.dtype);
  parallel(useful_threads(a.threads, grid), [&](const Team& team) {
    for_tiles(team, grid, false, [&](const Tile& t) {
      float* sums = partials + 2 * t.chunk * grid.padded;
      a.dx && !a.training ? reduce_tile<T, true>(a, b, sums, sums + grid.padded, t)
                          : reduce_tile<T, false>(a, b, sums, sums + grid.padded, t);
    });
    team.sync();
    finish_channels(a, grid, partials, b, team.share(grid.channels, kMergeBlock));
    if (!a.dx || !a.training) return;
    team.sync();
    for_tiles(team, grid, true,
              [&](const Tile& t) { streamed ? dx_tile<T, true>(a, b, t) : dx_tile<T, false>(a, b, t); });
  });
}

void bn_act_max_pool_forward(const BnActMaxPoolArgs& a) {
  const bool f32 = a.dtype == DType::f32;
  if (a.places)
    f32 ? forward<float, true>(a) : forward<bf16, true>(a);
  else
    f32 ? forward<float, false>(a) : forward<bf16, false>(a);
}

void bn_act_max_pool_backward(const BnActMaxPoolBackwardArgs& a) {
  a.dtype == DType::f32 ? backward<float>(a) : backward<bf16>(a);
}

}  // namespace RF_ISA
}  // namespace rf
