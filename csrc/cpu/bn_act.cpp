// bn_act forward on the CPU: batch statistics, then y = relu((x - mean) * scale + beta + residual).
// Bytes: statistics read x once; apply reads x (and residual) once and writes y once. 3 flops an element each.
// One parallel region; apply walks backwards, so what the statistics left in the caches is read from there.
#include "moments.h"

namespace rf {
namespace RF_ISA {

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
  const bool sums = a.training && !a.moments;  // to be taken here
  const Workspace work(size_t((sums ? 3 * grid.chunks + 6 : 6) * grid.padded) * 4);
  float* own = work.floats();
  float* constants = own + (sums ? 3 * grid.chunks * grid.padded : 0);
  float* partials = sums ? own : a.moments;
  const auto affine = [&](int64_t i) -> Affine {
    float* at = constants + 3 * i * grid.padded;
    return {at, at + grid.padded, at + 2 * grid.padded};
  };
  const Affine k = affine(0), of_residual = affine(1);
  const bool streamed = a.y && can_stream(a.y, grid, a.dtype);
  parallel(useful_threads(a.threads, grid), [&](const Team& team) {
    if (sums) {
      const T* x = static_cast<const T*>(a.x);
      for_tiles(team, grid, false, [&](const Tile& t) {
        const Moments m = moments_of(partials, grid, t.chunk);
        start_moments(x + t.row_begin * grid.channels, grid.channels, t.row_end - t.row_begin, t, m);
        add_moments(x, grid.channels, t, m);
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

size_t bn_moments_size(int64_t rows, int64_t channels) {
  const Grid grid(rows, channels);
  return size_t(3 * grid.chunks * grid.padded);
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
