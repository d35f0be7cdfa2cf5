// Winograd along the rows of a stem, filters 7 wide of stride 2 on three channels: what the forward
// (conv_stem_winograd.cpp) and the weight gradient (wgrad_stem.cpp) share, the points and the transform of x.
// The even columns of a row meet taps 0, 2, 4, 6 and the odd ones 1, 3, 5: F(4, 4) on +-1/4, +-3/4, +-2, infinity and
// F(4, 3) on 0, +-5/8, +-3/2, infinity take 13 products for 28.
// A row's 13 inputs of a tile are split into 8 phases (columns modulo 8), so that the transform runs over tiles.
#pragma once
#include "conv_algorithms.h"

namespace rf {
namespace RF_ISA {

namespace {  // each translation unit its own: nothing here is large

constexpr int kChannels = 3, kTaps = 7, kOut = 4, kPhases = 8;
constexpr int kEven = 7, kPoints = 13;  // points of the even taps, of both
constexpr float kE[3] = {0.25f, 0.75f, 2.f}, kO[2] = {0.625f, 1.5f};
constexpr float square(float v) { return v * v; }

const char* stem_lines_why_not(const ConvShape& s) {
  if (s.C != kChannels || s.groups != 1) return "Winograd along a stem's rows needs 3 input channels in one group";
  if (s.S != kTaps || s.stride_w != 2) return "Winograd along a stem's rows needs filters 7 wide and stride 2";
  if (s.dilation_h != 1 || s.dilation_w != 1) return "Winograd along a stem's rows needs dilation 1";
  return nullptr;
}

// G of both halves: the products of the row g, point by point.
void filter_line(const double* g, double* out) {
  const double e[6] = {kE[0], -kE[0], kE[1], -kE[1], kE[2], -kE[2]}, o[5] = {0, kO[0], -kO[0], kO[1], -kO[1]};
  const auto at = [&](const double* points, int n, int i, int tap, int taps) {
    double value = 0, factor = 1;
    for (int j = 0; j < n; ++j) factor *= j == i ? 1 : points[i] - points[j];
    for (int t = taps - 1; t >= 0; --t) value = value * points[i] + g[tap + 2 * t];
    return value / factor;
  };
  for (int i = 0; i < 6; ++i) out[i] = at(e, 6, i, 0, 4);
  out[6] = g[6];
  for (int i = 0; i < 5; ++i) out[kEven + i] = at(o, 5, i, 1, 3);
  out[12] = g[5];
}

// B^T of both halves; d(i): input i of every tile.
template <class In, class Make>
RF_INLINE void input_points(const In& d, const Make& make) {
  RF_UNROLL for (int i = 0; i < 3; ++i) {
    const float b2 = square(kE[(i + 1) % 3]), c2 = square(kE[(i + 2) % 3]);
    const Vec even = fma(d(0), broadcast(b2 * c2), fma(d(4), broadcast(-(b2 + c2)), d(8)));
    const Vec odd = fma(d(2), broadcast(b2 * c2), fma(d(6), broadcast(-(b2 + c2)), d(10)));
    make(2 * i, fma(even, broadcast(kE[i]), odd));
    make(2 * i + 1, fma(even, broadcast(-kE[i]), odd));
  }
  constexpr float a2 = square(kE[0]), b2 = square(kE[1]), c2 = square(kE[2]);
  make(6, fma(d(0), broadcast(-a2 * b2 * c2),
              fma(d(4), broadcast(a2 * b2 + b2 * c2 + c2 * a2), fma(d(8), broadcast(-(a2 + b2 + c2)), d(12)))));
  constexpr float p2 = square(kO[0]), q2 = square(kO[1]);
  make(kEven, fma(d(1), broadcast(p2 * q2), fma(d(5), broadcast(-(p2 + q2)), d(9))));
  RF_UNROLL for (int i = 0; i < 2; ++i) {
    const float other = -square(kO[1 - i]);
    const Vec even = fma(d(5), broadcast(other), d(9)), odd = fma(d(3), broadcast(other), d(7));
    make(kEven + 1 + 2 * i, fma(odd, broadcast(kO[i]), even));
    make(kEven + 2 + 2 * i, fma(odd, broadcast(-kO[i]), even));
  }
  make(12, fma(d(3), broadcast(p2 * q2), fma(d(7), broadcast(-(p2 + q2)), d(11))));
}

// Rows of x transformed: [point][row][channel][tile].
struct StemRows {
  int64_t tiles, line, point;  // of a row of outputs; floats from one channel's row to the next, and between points
  size_t v_bytes, phase_bytes;

  StemRows(const ConvShape& s, int64_t out_rows) {
    tiles = ceil_div(s.Q, int64_t(kOut));
    line = round_up(tiles, int64_t(kLanes));
    const int64_t rows = (out_rows - 1) * s.stride_h + s.R;
    point = int64_t(odd_lines(size_t(rows * kChannels * line) * sizeof(float)) / sizeof(float));
    v_bytes = size_t(point) * kPoints * sizeof(float);
    phase_bytes = odd_lines(size_t(phase_line() * kPhases) * sizeof(float));
  }
  int64_t phase_line() const { return line + kLanes; }  // a tile also reads the phases of the next one
  size_t bytes() const { return v_bytes + phase_bytes; }

  // What the output rows `out` of image n read, to `v`, bytes() of scratch.
  void transform(const ConvShape& s, const float* x, int64_t n, Range out, float* v) const {
    float* const phases = v + v_bytes / sizeof(float);
    const int64_t first = out.begin * s.stride_h - s.pad_h, count = (out.size() - 1) * s.stride_h + s.R;
    for (int64_t row = 0; row < count; ++row) {
      const int64_t h = first + row;
      for (int64_t c = 0; c < kChannels; ++c) {
        float* to = v + (row * kChannels + c) * line;
        if (h < 0 || h >= s.H) {
          for (int i = 0; i < kPoints; ++i) std::memset(to + i * point, 0, size_t(line) * sizeof(float));
          continue;
        }
        s.planar ? split<1>(s, x + ((n * kChannels + c) * s.H + h) * s.W, phases)
                 : split<kChannels>(s, x + (n * s.H + h) * s.W * kChannels + c, phases);
        const int64_t phase = phase_line();
        for (int64_t t = 0; t < line; t += kLanes) {
          const float* from = phases + t;
          input_points([&](int i)
                           __attribute__((always_inline)) { return load(from + i % kPhases * phase + i / kPhases); },
                       [&](int i, Vec value) __attribute__((always_inline)) { store(to + i * point + t, value); });
        }
      }
    }
  }

 private:
  // Column kPhases * t + i of the padded row goes to phase i at t; x: column 0 of the image, kStep between columns.
  template <int kStep>
  void split(const ConvShape& s, const float* x, float* phases) const {
    const int64_t phase = phase_line(), pad = s.pad_w;
    const auto edge = [&](int64_t t) {
      for (int i = 0; i < kPhases; ++i) {
        const int64_t w = t * kPhases + i - pad;
        phases[i * phase + t] = w >= 0 && w < s.W ? x[w * kStep] : 0.f;
      }
    };
    const int64_t inside = smaller(larger(ceil_div(pad, int64_t(kPhases)), int64_t(0)), phase);
    const int64_t outside = larger(smaller((s.W + pad) / kPhases, phase), inside);
    for (int64_t t = 0; t < inside; ++t) edge(t);
    for (int64_t t = inside; t < outside; ++t) {
      const float* at = x + (t * kPhases - pad) * kStep;
      RF_UNROLL for (int i = 0; i < kPhases; ++i) phases[i * phase + t] = at[i * kStep];
    }
    for (int64_t t = outside; t < phase; ++t) edge(t);
  }
};

}  // namespace

}  // namespace RF_ISA
}  // namespace rf
