// bn_act forward on the CPU: batch statistics, then y = relu((x - mean) * scale + beta + residual).
// Bytes: statistics read x once; apply reads x (and residual) once and writes y once. 3 flops an element each.
// One parallel region; apply walks backwards, so what the statistics left in the caches is read from there.
// The variance is summed around the mean of a chunk's first rows and chunks are merged in float64 (Chan):
// E[x^2] - E[x]^2 loses everything at mean/std = 1e4, and a true second pass would read x once more.
#include "bn_act.h"

namespace rf {
namespace RF_ISA {

// One chunk's sums, [channels] each: the pivot, sum(x - pivot), sum((x - pivot)^2).
struct Moments {
  float *pivot, *sum, *square;
};

static Moments moments_of(float* partials, const Grid& grid, int64_t chunk) {
  float* at = partials + chunk * 3 * grid.padded;
  return {at, at + grid.padded, at + 2 * grid.padded};
}

template <int rows, class T, class Lanes>
RF_INLINE void add_rows(const T* x, int64_t stride, const Moments& m, int64_t c, Lanes lanes) {
  const Vec pivot = load(m.pivot + c);
  Vec sum = zero(), square = zero();
  RF_UNROLL for (int i = 0; i < rows; ++i) {
    const Vec d = load(x + i * stride + c, lanes) - pivot;
    sum = sum + d;
    square = fma(d, d, square);
  }
  store(m.sum + c, load(m.sum + c) + sum);
  store(m.square + c, load(m.square + c) + square);
}

// The mean of the first `rows` rows, a power of two, added as a tree: exact where they are equal, so that a
// constant channel has variance 0 however large it is.
template <int rows, class T, class Lanes>
RF_INLINE Vec mean_of(const T* x, int64_t stride, Lanes lanes) {
  if constexpr (rows == 1)
    return load(x, lanes);
  else
    return (mean_of<rows / 2>(x, stride, lanes) + mean_of<rows / 2>(x + rows / 2 * stride, stride, lanes)) *
           broadcast(0.5f);
}

template <class T>
static void chunk_moments(const T* x, int64_t stride, const Tile& t, const Moments& m) {
  const int64_t size = t.row_end - t.row_begin;
  const T* row = x + t.row_begin * stride;
  for_columns(t.col_begin, t.col_end, [&](int64_t c, auto lanes) {
    // Eight rows, not one: an outlier in the pivot costs digits of the variance, shared by eight it costs few.
    store(m.pivot + c, size >= 8   ? mean_of<8>(row + c, stride, lanes)
                       : size >= 4 ? mean_of<4>(row + c, stride, lanes)
                                   : mean_of<1>(row + c, stride, lanes));
    store(m.sum + c, zero());
    store(m.square + c, zero());
  });
  for_groups(t, size_t(stride) * sizeof(T), [&](int64_t at, auto rows) {
    for_columns(t.col_begin, t.col_end,
                [&](int64_t c, auto lanes) { add_rows<rows.value>(x + at * stride, stride, m, c, lanes); });
  });
}

// Merges the chunks of kMergeBlock channels in order: two passes over the partials, in float64.
static void merge_moments(float* partials, const Grid& grid, int64_t c, double* mean, double* var) {
  for (int i = 0; i < kMergeBlock; ++i) mean[i] = var[i] = 0;
  for (int64_t chunk = 0; chunk < grid.chunks; ++chunk) {
    const Moments m = moments_of(partials, grid, chunk);
    const double size = double(grid.chunk_size(chunk));
    for (int i = 0; i < kMergeBlock; ++i) mean[i] += double(m.pivot[c + i]) * size + double(m.sum[c + i]);
  }
  for (int i = 0; i < kMergeBlock; ++i) mean[i] /= double(grid.rows);
  for (int64_t chunk = 0; chunk < grid.chunks; ++chunk) {
    const Moments m = moments_of(partials, grid, chunk);
    const double size = double(grid.chunk_size(chunk)), inverse = 1 / size;
    for (int i = 0; i < kMergeBlock; ++i) {
      const double inner = double(m.sum[c + i]) * inverse, apart = double(m.pivot[c + i]) + inner - mean[i];
      var[i] += double(m.square[c + i]) + (apart * apart - inner * inner) * size;
    }
  }
  for (int i = 0; i < kMergeBlock; ++i) {
    var[i] /= double(grid.rows);
    if (var[i] < 0) var[i] = 0;  // false for NaN, which stays
  }
}

// Statistics of this thread's channels and, from them or from the given ones, the constants of apply.
static void finish_channels(const BnActArgs& a, const Grid& grid, float* partials, const Affine& k, Range channels) {
  double mean[kMergeBlock], var[kMergeBlock];
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    const int64_t i = c % kMergeBlock;
    if (a.training) {
      if (i == 0) merge_moments(partials, grid, c, mean, var);
      a.mean[c] = float(mean[i]);
      if (a.var) a.var[c] = float(var[i]);
    } else {
      mean[i] = a.mean[c];
      var[i] = a.var[c];
    }
    // float(var): a variance beyond float32 is infinite, as in torch, and gives rstd = 0.
    const float rstd = rstd_of(float(var[i]), a.eps);
    if (a.rstd) a.rstd[c] = rstd;
    k.mean[c] = float(mean[i]);
    k.scale[c] = a.gamma ? a.gamma[c] * rstd : rstd;
    k.beta[c] = a.beta ? a.beta[c] : 0.f;
  }
}

// What is added: nothing, the residual as it is, or what its own norm makes of it.
enum class Added { none, plain, normalised };

template <class T, Added added, bool rectify, bool streamed>
static void apply_tile(const BnActArgs& a, const Affine& k, const Affine& of_residual, const Tile& t) {
  const T* x = static_cast<const T*>(a.x);
  const T* r = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  for (int64_t row = t.row_begin; row < t.row_end; ++row) {
    const int64_t at = row * a.channels;
    for_columns(t.col_begin, t.col_end, [&](int64_t c, auto lanes) {
      Vec v = normalise(load(x + at + c, lanes), k, c);
      if (added == Added::plain) v = v + load(r + at + c, lanes);
      if (added == Added::normalised) v = v + normalise(load(r + at + c, lanes), of_residual, c);
      put<streamed>(y + at + c, rectify ? relu(v) : v, lanes);
    });
  }
  if (streamed) stream_fence();
}

template <class T, Added added, bool streamed>
static void apply_with(const BnActArgs& a, const Affine& k, const Affine& of_residual, const Tile& t) {
  a.relu ? apply_tile<T, added, true, streamed>(a, k, of_residual, t)
         : apply_tile<T, added, false, streamed>(a, k, of_residual, t);
}

template <class T, bool streamed>
static void apply_any(const BnActArgs& a, const Affine& k, const Affine& of_residual, const Tile& t) {
  if (!a.residual)
    apply_with<T, Added::none, streamed>(a, k, of_residual, t);
  else
    a.residual_norm.mean ? apply_with<T, Added::normalised, streamed>(a, k, of_residual, t)
                         : apply_with<T, Added::plain, streamed>(a, k, of_residual, t);
}

// The residual's constants, of this thread's channels.
static void start_residual(const BnVectors& norm, const Affine& k, Range channels) {
  for (int64_t c = channels.begin; c < channels.end && norm.mean; ++c) {
    const float rstd = rstd_of(norm.var[c], norm.eps);
    k.mean[c] = norm.mean[c];
    k.scale[c] = norm.gamma ? norm.gamma[c] * rstd : rstd;
    k.beta[c] = norm.beta ? norm.beta[c] : 0.f;
  }
}

template <class T>
static void forward(const BnActArgs& a, const Grid& grid) {
  float* partials = scratch(size_t((a.training ? 3 * grid.chunks + 6 : 6) * grid.padded));
  float* constants = partials + (a.training ? 3 * grid.chunks * grid.padded : 0);
  const auto affine = [&](int64_t i) -> Affine {
    float* at = constants + 3 * i * grid.padded;
    return {at, at + grid.padded, at + 2 * grid.padded};
  };
  const Affine k = affine(0), of_residual = affine(1);
  const bool streamed = a.y && can_stream(a.y, grid, a.dtype);
  parallel(useful_threads(a.threads, grid), [&](const Team& team) {
    if (a.training) {
      for_tiles(team, grid, false, [&](const Tile& t) {
        chunk_moments(static_cast<const T*>(a.x), grid.channels, t, moments_of(partials, grid, t.chunk));
      });
      team.sync();
    }
    const Range channels = team.share(grid.channels, kMergeBlock);
    finish_channels(a, grid, partials, k, channels);
    start_residual(a.residual_norm, of_residual, channels);
    if (!a.y) return;
    team.sync();
    for_tiles(team, grid, a.training, [&](const Tile& t) {
      streamed ? apply_any<T, true>(a, k, of_residual, t) : apply_any<T, false>(a, k, of_residual, t);
    });
  });
}

void bn_act_forward(const BnActArgs& a) {
  const Grid grid(a.rows, a.channels);
  if (a.rows == 0 || a.channels == 0) return;
  a.dtype == DType::f32 ? forward<float>(a, grid) : forward<bf16>(a, grid);
}

void bn_update_running(const BnRunningArgs& a) {
  const double keep = 1.0 - a.momentum, unbias = double(a.count) / double(a.count - 1);
  for (int64_t c = 0; c < a.channels; ++c) {
    if (a.running_mean) a.running_mean[c] = float(keep * a.running_mean[c] + a.momentum * a.mean[c]);
    if (a.running_var) a.running_var[c] = float(keep * a.running_var[c] + a.momentum * (a.var[c] * unbias));
  }
}

}  // namespace RF_ISA
}  // namespace rf
