// Winograd's 3x3 stride 1 convolution F(MxL): Y = A^T [ sum_c (G g G^T) * (B^T d B) ] A per tile of M rows by L columns
// of outputs. (M+2)(L+2) / (9 M L) of the direct multiplications: 0.44 for 2x2, 0.33 for 4x2, 0.25 for 4x4. A block of
// tiles goes through input transform, (M+2)(L+2) small GEMMs and output transform with epilogue while its two buffers
// stay in L2. Points 0, +-3/4, +-3/2 and infinity for M = 4: half the rounding error of 0, +-1, +-2 at the same cost.
// Tried and lost: keeping the whole 6x6 tile between the two passes of the input transform. It spills, and a
// 512-bit store costs two cycles; reading a column again for every pair of points costs one.
#pragma once
#include "conv_algorithms.h"

namespace rf {
namespace RF_ISA {

// One dimension of each transform. `ends` are the points 0 and infinity, `pair` the points +p and -p.
template <int M>
struct Points;

template <>
struct Points<2> {
  static constexpr int kPairs = 1;
  static constexpr double kAt[3] = {0, 1, -1};
  static RF_INLINE Vec ends(Vec d0, Vec d2, Vec) { return d2 - d0; }
  static RF_INLINE void pair(int, Vec d1, Vec d2, Vec, Vec, Vec& plus, Vec& minus) {
    plus = d2 + d1;
    minus = d2 - d1;
  }
  static RF_INLINE void output(const Vec* m, Vec* y) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) + m[3];
  }
};

template <>
struct Points<4> {
  static constexpr int kPairs = 2;
  static constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;
  static constexpr double kAt[5] = {0, kA, -kA, kB, -kB};
  static RF_INLINE Vec ends(Vec d0, Vec d2, Vec d4) {
    return fma(d0, broadcast(kA2 * kB2), fma(d2, broadcast(-(kA2 + kB2)), d4));
  }
  static RF_INLINE void pair(int which, Vec d1, Vec d2, Vec d3, Vec d4, Vec& plus, Vec& minus) {
    const float p = which ? kB : kA, other = which ? -kA2 : -kB2;
    const Vec even = fma(d2, broadcast(other), d4), odd = fma(d1, broadcast(other), d3);
    plus = fma(odd, broadcast(p), even);
    minus = fma(odd, broadcast(-p), even);
  }
  static RF_INLINE void output(const Vec* m, Vec* y) {
    const Vec sum_a = m[1] + m[2], sum_b = m[3] + m[4], difference_a = m[1] - m[2], difference_b = m[3] - m[4];
    y[0] = m[0] + (sum_a + sum_b);
    y[1] = fma(difference_b, broadcast(kB), difference_a * broadcast(kA));
    y[2] = fma(sum_b, broadcast(kB2), sum_a * broadcast(kA2));
    y[3] = fma(difference_b, broadcast(kB2 * kB), difference_a * broadcast(kA2 * kA)) + m[5];
  }
};

// B^T d along one line of M + 2 values.
template <int M>
RF_INLINE void input_line(const Vec* d, Vec* out) {
  constexpr bool kWide = M == 4;
  out[0] = Points<M>::ends(d[0], d[2], d[kWide ? 4 : 2]);
  RF_UNROLL for (int i = 0; i < Points<M>::kPairs; ++i)
      Points<M>::pair(i, d[1], d[2], d[3], d[kWide ? 4 : 3], out[1 + 2 * i], out[2 + 2 * i]);
  out[M + 1] = Points<M>::ends(d[1], d[3], d[kWide ? 5 : 3]);
}

// Transforms channels [0, channels) of one tile. at: the (M+2)(L+2) input pixels, each a run of channels.
// Point (i, j) of a channel lands at out + (i*(L+2)+j)*point_stride, channels in chunks chunk_stride apart.
template <int M, int L, class T, class Element>
__attribute__((noinline)) void input_tile(const T* const* at, Range channels, int64_t real, int chunk, Element* out,
                                          int64_t chunk_stride, int64_t point_stride) {
  constexpr int kW = L + 2;
  for (int64_t c = channels.begin; c < channels.end; c += kLanes) {
    Element* to = out + c / chunk * chunk_stride + c % chunk;
    const int n = int(smaller(larger(real - c, int64_t(0)), int64_t(kLanes)));
    const auto transform = [&](auto get) __attribute__((always_inline)) {
      const auto finish = [&](const Vec* line, int i) __attribute__((always_inline)) {
        Vec points[kW];
        input_line<L>(line, points);
        RF_UNROLL for (int j = 0; j < kW; ++j) store(to + (i * kW + j) * point_stride, points[j]);
      };
      Vec first[kW], second[kW];
      RF_UNROLL for (int j = 0; j < kW; ++j) first[j] = Points<M>::ends(get(0, j), get(2, j), get(M == 4 ? 4 : 2, j));
      finish(first, 0);
      RF_UNROLL for (int p = 0; p < Points<M>::kPairs; ++p) {
        RF_UNROLL for (int j = 0; j < kW; ++j)
            Points<M>::pair(p, get(1, j), get(2, j), get(3, j), get(M == 4 ? 4 : 3, j), first[j], second[j]);
        finish(first, 1 + 2 * p);
        finish(second, 2 + 2 * p);
      }
      RF_UNROLL for (int j = 0; j < kW; ++j) first[j] = Points<M>::ends(get(1, j), get(3, j), get(M == 4 ? 5 : 3, j));
      finish(first, M + 1);
    };
    if (n == kLanes) {
      transform([&](int i, int j) __attribute__((always_inline)) { return load(at[i * kW + j] + c); });
    } else {
      transform([&](int i, int j) __attribute__((always_inline)) { return load_n(at[i * kW + j] + (n ? c : 0), n); });
    }
  }
}

// A^T m A with the epilogue, for `cols` channels of one tile; `high` x `wide` of its outputs exist.
template <class T>
struct OutputTile {
  T* y;
  const T* residual;
  int64_t row_stride, pixel_stride;
  int high, wide, cols;
  bool relu;
};

template <int M, int L, class T>
__attribute__((noinline)) void output_tile(const float* sums, int64_t point_stride, Vec scale, Vec shift,
                                           const OutputTile<T>& o) {
  constexpr int kH = M + 2, kW = L + 2;
  Vec half[M][kW], y[M][L];
  RF_UNROLL for (int j = 0; j < kW; ++j) {
    Vec m[kH], column[M];
    RF_UNROLL for (int i = 0; i < kH; ++i) m[i] = load(sums + (i * kW + j) * point_stride);
    Points<M>::output(m, column);
    RF_UNROLL for (int i = 0; i < M; ++i) half[i][j] = column[i];
  }
  RF_UNROLL for (int i = 0; i < M; ++i) {
    Points<L>::output(half[i], y[i]);
    RF_UNROLL for (int j = 0; j < L; ++j) y[i][j] = fma(y[i][j], scale, shift);
  }
  if (o.high >= M && o.wide >= L && o.cols >= kLanes) {
    RF_UNROLL for (int i = 0; i < M; ++i) {
      RF_UNROLL for (int j = 0; j < L; ++j) {
        const int64_t at = i * o.row_stride + j * o.pixel_stride;
        if (o.residual) y[i][j] = y[i][j] + load(o.residual + at);
        if (o.relu) y[i][j] = relu(y[i][j]);
        store(o.y + at, y[i][j]);
      }
    }
    return;
  }
  const int n = smaller(o.cols, kLanes);
  RF_UNROLL for (int i = 0; i < M; ++i) {
    if (i >= o.high) break;
    RF_UNROLL for (int j = 0; j < L; ++j) {
      if (j >= o.wide) break;
      const int64_t at = i * o.row_stride + j * o.pixel_stride;
      if (o.residual) y[i][j] = y[i][j] + load_n(o.residual + at, n);
      if (o.relu) y[i][j] = relu(y[i][j]);
      store_n(o.y + at, y[i][j], n);
    }
  }
}

}  // namespace RF_ISA
}  // namespace rf
