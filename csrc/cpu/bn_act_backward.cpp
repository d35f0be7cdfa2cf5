// bn_act backward on the CPU, two passes in one parallel region.
// Pass 1 reads dy and x (and y, where a residual was added: the ReLU's mask), sums g and g * (x - mean), and writes
// dresidual = g where wanted. Pass 2 reads g (or dy and the mask's source again) and x and writes dx.
// Bytes, in tensors: 2 + 3 without residual, 4 + 3 with one that wants its gradient; eager moves 8 and 13.
// Pass 2 walks backwards, to find pass 1's last tiles in the caches. In eval dx needs no sums: one pass does all.
#include "bn_act.h"

namespace rf {
namespace RF_ISA {

enum class Mask { none, from_y, from_x };

// Constants of dx = scale * (g - bias - (x - mean) * slope), padded like Affine.
struct Backward {
  Affine k;
  float *bias, *slope;
};

template <Mask mask, class T, class Lanes>
RF_INLINE Vec masked_dy(const T* dy, const T* y, Vec x, const Affine& k, int64_t at, int64_t c, Lanes lanes) {
  const Vec g = load(dy + at + c, lanes);
  if (mask == Mask::from_y) return relu_mask(load(y + at + c, lanes), g);
  // The forward's own arithmetic, so that the sign is the forward's own.
  if (mask == Mask::from_x) return relu_mask(normalise(x, k, c), g);
  return g;
}

// Adds `rows` rows to the tile's sums of g and g * (x - mean); writes dresidual, and dx where it needs no sums.
template <int rows, class T, Mask mask, bool keep_g, bool eval_dx, bool streamed>
RF_INLINE void reduce_rows(const BnActBackwardArgs& a, const Backward& b, float* sums, float* dots, int64_t row,
                           const Tile& t) {
  const T *dy = static_cast<const T*>(a.dy), *x = static_cast<const T*>(a.x), *y = static_cast<const T*>(a.y);
  T *dresidual = static_cast<T*>(a.dresidual), *dx = static_cast<T*>(a.dx);
  for_columns(t.col_begin, t.col_end, [&](int64_t c, auto lanes) {
    const Vec mean = load(b.k.mean + c);
    Vec sum = zero(), dot = zero();
    RF_UNROLL for (int i = 0; i < rows; ++i) {
      const int64_t at = (row + i) * a.channels;
      const Vec xv = load(x + at + c, lanes);
      const Vec g = masked_dy<mask>(dy, y, xv, b.k, at, c, lanes);
      sum = sum + g;
      dot = fma(g, xv - mean, dot);
      if (keep_g) put<streamed>(dresidual + at + c, g, lanes);
      if (eval_dx) put<streamed>(dx + at + c, g * load(b.k.scale + c), lanes);
    }
    store(sums + c, load(sums + c) + sum);
    store(dots + c, load(dots + c) + dot);
  });
}

template <class T, Mask mask, bool keep_g, bool eval_dx, bool streamed>
static void reduce_tile(const BnActBackwardArgs& a, const Backward& b, float* sums, float* dots, const Tile& t) {
  for_columns(t.col_begin, t.col_end, [&](int64_t c, auto) {
    store(sums + c, zero());
    store(dots + c, zero());
  });
  for_groups(t, size_t(a.channels) * sizeof(T), [&](int64_t row, auto rows) {
    reduce_rows<rows.value, T, mask, keep_g, eval_dx, streamed>(a, b, sums, dots, row, t);
  });
  if (streamed) stream_fence();
}

template <class T, Mask mask, bool streamed>
static void dx_tile(const BnActBackwardArgs& a, const Backward& b, const T* dy, const Tile& t) {
  const T *x = static_cast<const T*>(a.x), *y = static_cast<const T*>(a.y);
  T* dx = static_cast<T*>(a.dx);
  for (int64_t row = t.row_begin; row < t.row_end; ++row) {
    const int64_t at = row * a.channels;
    for_columns(t.col_begin, t.col_end, [&](int64_t c, auto lanes) {
      const Vec xv = load(x + at + c, lanes);
      const Vec g = masked_dy<mask>(dy, y, xv, b.k, at, c, lanes);
      const Vec inner = g - fma(xv - load(b.k.mean + c), load(b.slope + c), load(b.bias + c));
      put<streamed>(dx + at + c, inner * load(b.k.scale + c), lanes);
    });
  }
  if (streamed) stream_fence();
}

static void start_channels(const BnActBackwardArgs& a, const Backward& b, Range channels) {
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    b.k.mean[c] = a.mean[c];
    const float rstd = rstd_of(a.var[c], a.eps);
    b.k.scale[c] = a.gamma ? a.gamma[c] * rstd : rstd;
    b.k.beta[c] = a.beta ? a.beta[c] : 0.f;
  }
}

// Merges the chunks' sums in order, in float64, and makes pass 2's constants.
static void finish_channels(const BnActBackwardArgs& a, const Grid& grid, const float* partials, const Backward& b,
                            Range channels) {
  double sum[kMergeBlock], dot[kMergeBlock];
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    const int64_t i = c % kMergeBlock;
    const double rstd = rstd_of(a.var[c], a.eps);
    if (a.sums_given) {
      sum[i] = a.dbeta[c];
      dot[i] = a.dgamma[c];
    } else {
      if (i == 0) {
        for (int j = 0; j < kMergeBlock; ++j) sum[j] = dot[j] = 0;
        for (int64_t chunk = 0; chunk < grid.chunks; ++chunk) {
          const float* sums = partials + 2 * chunk * grid.padded + c;
          for (int j = 0; j < kMergeBlock; ++j) sum[j] += double(sums[j]);
          for (int j = 0; j < kMergeBlock; ++j) dot[j] += double(sums[grid.padded + j]);
        }
      }
      dot[i] *= rstd;
      if (a.dgamma) a.dgamma[c] = float(dot[i]);
      if (a.dbeta) a.dbeta[c] = float(sum[i]);
    }
    b.bias[c] = float(sum[i] / double(a.count));
    b.slope[c] = float(dot[i] * rstd / double(a.count));
  }
}

template <class T, Mask mask, bool streamed>
static void reduce_any(const BnActBackwardArgs& a, const Backward& b, float* sums, float* dots, const Tile& t) {
  const bool eval_dx = a.dx && !a.training;
  if (a.dresidual)
    eval_dx ? reduce_tile<T, mask, true, true, streamed>(a, b, sums, dots, t)
            : reduce_tile<T, mask, true, false, streamed>(a, b, sums, dots, t);
  else
    eval_dx ? reduce_tile<T, mask, false, true, streamed>(a, b, sums, dots, t)
            : reduce_tile<T, mask, false, false, false>(a, b, sums, dots, t);
}

template <class T, Mask mask>
static void dx_any(const BnActBackwardArgs& a, const Backward& b, const T* dy, bool streamed, const Tile& t) {
  streamed ? dx_tile<T, mask, true>(a, b, dy, t) : dx_tile<T, mask, false>(a, b, dy, t);
}

template <class T, Mask mask>
static void backward(const BnActBackwardArgs& a, const Grid& grid) {
  const size_t sums_size = size_t(2 * grid.chunks * grid.padded);
  const Workspace work((sums_size + size_t(5 * grid.padded)) * 4);
  float* partials = work.floats();
  float* at = partials + sums_size;
  const Backward b = {{at, at + grid.padded, at + 2 * grid.padded}, at + 3 * grid.padded, at + 4 * grid.padded};
  const bool second_pass = a.dx && a.training;
  const bool reduce = !a.sums_given || !second_pass || a.dresidual;
  const bool streamed = can_stream(a.dx, grid, a.dtype) && can_stream(a.dresidual, grid, a.dtype);
  parallel(useful_threads(a.threads, grid), [&](const Team& team) {
    const Range channels = team.share(grid.channels, kMergeBlock);
    start_channels(a, b, channels);
    team.sync();
    if (reduce) {
      for_tiles(team, grid, false, [&](const Tile& t) {
        float* sums = partials + 2 * t.chunk * grid.padded;
        streamed ? reduce_any<T, mask, true>(a, b, sums, sums + grid.padded, t)
                 : reduce_any<T, mask, false>(a, b, sums, sums + grid.padded, t);
      });
      team.sync();
    }
    finish_channels(a, grid, partials, b, channels);
    if (!second_pass) return;
    team.sync();
    for_tiles(team, grid, reduce, [&](const Tile& t) {
      // dresidual is g already: no mask to read or recompute.
      if (a.dresidual)
        dx_any<T, Mask::none>(a, b, static_cast<const T*>(a.dresidual), streamed, t);
      else
        dx_any<T, mask>(a, b, static_cast<const T*>(a.dy), streamed, t);
    });
  });
}

template <class T>
static void backward_any(const BnActBackwardArgs& a, const Grid& grid) {
  if (!a.relu)
    backward<T, Mask::none>(a, grid);
  else
    a.y ? backward<T, Mask::from_y>(a, grid) : backward<T, Mask::from_x>(a, grid);
}

void bn_act_backward(const BnActBackwardArgs& a) {
  const Grid grid(a.rows, a.channels);
  if (a.rows == 0) {
    for (int64_t c = 0; c < a.channels && !a.sums_given; ++c) {
      if (a.dgamma) a.dgamma[c] = 0;
      if (a.dbeta) a.dbeta[c] = 0;
    }
    return;
  }
  if (a.channels == 0) return;
  a.dtype == DType::f32 ? backward_any<float>(a, grid) : backward_any<bf16>(a, grid);
}

}  // namespace RF_ISA
}  // namespace rf
