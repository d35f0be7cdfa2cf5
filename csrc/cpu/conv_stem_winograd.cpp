// "winograd_stem": filters of R x 7 with stride 2 on three channels (the stem of the ImageNet ResNets), float32, by
// Winograd along the rows. The even columns of a row meet taps 0, 2, 4, 6 and the odd ones 1, 3, 5: F(4, 4) on +-1/4,
// +-3/4, +-2, infinity and F(4, 3) on 0, +-5/8, +-3/2, infinity take 13 products for 28. Down the columns the sum is
// direct: with three channels a second transform would cost more than it saves. 13/28 of 2*N*P*Q*K*R*7*3 flops and
// about a fifth more for the transforms; rms error 1.3 to 1.6 times a direct sum's.
// A row's 13 inputs of a tile are split into 8 phases (columns modulo 8), so that the transform runs over tiles; it is
// shared by the R/2 output rows that read the row and by all filters. The points' GEMMs then have tiles for rows and
// R*3 for depth, read in place.
#include "conv_algorithms.h"

namespace rf {
namespace RF_ISA {

namespace {

constexpr int kChannels = 3, kTaps = 7, kOut = 4, kPhases = 8;
constexpr int kEven = 7, kPoints = 13;  // points of the even taps, of both
constexpr float kE[3] = {0.25f, 0.75f, 2.f}, kO[2] = {0.625f, 1.5f};
constexpr float square(float v) { return v * v; }

struct Plan {
  int64_t tiles, line, panels, depth, block_rows;  // line: floats from one row of V to the next
  int64_t point;                                   // floats between points
  size_t v_bytes, phase_bytes;

  Plan(const ConvShape& s, const ConvConfig& c) {
    tiles = ceil_div(s.Q, int64_t(kOut));
    line = round_up(tiles, int64_t(kLanes));
    panels = ceil_div(s.K, int64_t(kPanel));
    depth = s.R * kChannels;
    block_rows = smaller(s.P, int64_t(c.block_rows > 0 ? c.block_rows : 8));
    const int64_t rows = (block_rows - 1) * s.stride_h + s.R;
    point = int64_t(odd_lines(size_t(rows * kChannels * line) * sizeof(float)) / sizeof(float));
    v_bytes = size_t(point) * kPoints * sizeof(float);
    phase_bytes = odd_lines(size_t(phase_line() * kPhases) * sizeof(float));
  }
  int64_t phase_line() const { return line + kLanes; }  // a tile also reads the phases of the next one
  size_t bytes() const { return v_bytes + phase_bytes; }
};

const char* why_not(const ConvShape& s, DType t) {
  if (t != DType::f32) return "winograd_stem is for float32: bfloat16 multiplies pairs as fast and more exactly";
  if (s.C != kChannels || s.groups != 1) return "winograd_stem needs 3 input channels in one group";
  if (s.S != kTaps || s.stride_w != 2) return "winograd_stem needs filters 7 wide and stride 2";
  if (s.dilation_h != 1 || s.dilation_w != 1) return "winograd_stem needs dilation 1";
  return nullptr;
}

ConvConfig defaults(const ConvShape&, DType, int) { return {}; }

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

// A^T: 4 outputs of the 13 sums m(i).
template <class In>
RF_INLINE void output_points(const In& m, Vec* y) {
  constexpr int kPairs[5] = {0, 2, 4, kEven + 1, kEven + 3};
  constexpr float at[5] = {kE[0], kE[1], kE[2], kO[0], kO[1]};
  y[0] = m(kEven);
  y[1] = y[2] = zero();
  y[3] = m(6) + m(12);
  RF_UNROLL for (int i = 0; i < 5; ++i) {
    const Vec plus = m(kPairs[i]), minus = m(kPairs[i] + 1), sum = plus + minus, difference = plus - minus;
    y[0] = y[0] + sum;
    y[1] = fma(difference, broadcast(at[i]), y[1]);
    y[2] = fma(sum, broadcast(square(at[i])), y[2]);
    y[3] = fma(difference, broadcast(at[i] * square(at[i])), y[3]);
  }
}

size_t packed_bytes(const ConvShape& s, DType) {
  const Plan p(s, {});
  return size_t(p.panels * kPoints * p.depth * kPanel) * sizeof(float);
}

// packed: [panel][point][r][c][kPanel], zeros beyond K.
void pack(const ConvShape& s, DType, void* packed, const float* w, const float* fold, int) {
  const Plan p(s, {});
  float* out = static_cast<float*>(packed);
  std::memset(packed, 0, packed_bytes(s, DType::f32));
  for (int64_t k = 0; k < s.K; ++k) {
    for (int64_t r = 0; r < s.R; ++r) {
      for (int64_t c = 0; c < kChannels; ++c) {
        double g[kTaps], points[kPoints];
        for (int t = 0; t < kTaps; ++t)
          g[t] = double(w[((k * kChannels + c) * s.R + r) * kTaps + t]) * (fold ? fold[k] : 1.f);
        filter_line(g, points);
        for (int i = 0; i < kPoints; ++i)
          out[((k / kPanel * kPoints + i) * p.depth + r * kChannels + c) * kPanel + k % kPanel] = float(points[i]);
      }
    }
  }
}

size_t scratch_bytes(const ConvShape& s, DType, const ConvConfig& c, int threads) {
  return Plan(s, c).bytes() * size_t(threads);
}

// kRows neighbouring tiles of one point by one panel; x: the first tile of a filter's first row, lines apart.
template <int kRows>
void sum_tiles(const float* x, int64_t line, int64_t depth, const float* w, float* sums) {
  Vec acc[kRows][2];
  RF_UNROLL for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = zero();
#pragma GCC unroll 3
  for (; depth > 0; --depth, x += line, w += kPanel) {
    const Vec w0 = load(w), w1 = load(w + kLanes);
    RF_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec s = broadcast(x[r]);
      acc[r][0] = fma(s, w0, acc[r][0]);
      acc[r][1] = fma(s, w1, acc[r][1]);
    }
  }
  RF_UNROLL for (int r = 0; r < kRows; ++r) {
    store(sums + r * kPanel, acc[r][0]);
    store(sums + r * kPanel + kLanes, acc[r][1]);
  }
}

struct Sums {
  void (*at[kTileRows + 1])(const float*, int64_t, int64_t, const float*, float*);
  template <int... I>
  static constexpr Sums make(std::integer_sequence<int, I...>) {
    return {{nullptr, sum_tiles<I + 1>...}};
  }
};
constexpr Sums kSums = Sums::make(std::make_integer_sequence<int, kTileRows>());

class Run {
 public:
  Run(const ConvArgs& args, const Team& team) : a_(args), s_(args.shape), p_(args.shape, args.config) {
    v_ = reinterpret_cast<float*>(static_cast<char*>(a_.scratch) + p_.bytes() * size_t(team.rank));
    phases_ = v_ + p_.v_bytes / sizeof(float);
    const Range mine = team.share(s_.N * s_.P);
    for (int64_t at = mine.begin; at < mine.end;) {
      const int64_t n = at / s_.P, p = at % s_.P;
      const int64_t end = smaller(smaller(p + p_.block_rows, s_.P), p + mine.end - at);
      transform_rows(n, {p, end});
      for (int64_t panel = 0; panel < p_.panels; ++panel) compute(n, {p, end}, panel);
      at += end - p;
    }
  }

 private:
  void transform_rows(int64_t n, Range out) {
    const int64_t first = out.begin * s_.stride_h - s_.pad_h, count = (out.size() - 1) * s_.stride_h + s_.R;
    for (int64_t row = 0; row < count; ++row) {
      const int64_t h = first + row;
      for (int64_t c = 0; c < kChannels; ++c) {
        float* to = v_ + (row * kChannels + c) * p_.line;
        if (h < 0 || h >= s_.H) {
          for (int i = 0; i < kPoints; ++i) std::memset(to + i * p_.point, 0, size_t(p_.line) * sizeof(float));
          continue;
        }
        const float* x = static_cast<const float*>(a_.x);
        s_.planar ? split<1>(x + ((n * kChannels + c) * s_.H + h) * s_.W)
                  : split<kChannels>(x + (n * s_.H + h) * s_.W * kChannels + c);
        const int64_t phase = p_.phase_line();
        for (int64_t t = 0; t < p_.line; t += kLanes) {
          const float* from = phases_ + t;
          input_points([&](int i)
                           __attribute__((always_inline)) { return load(from + i % kPhases * phase + i / kPhases); },
                       [&](int i, Vec v) __attribute__((always_inline)) { store(to + i * p_.point + t, v); });
        }
      }
    }
  }

  // Column kPhases * t + i of the padded row goes to phase i at t; x: column 0 of the image, kStep between columns.
  template <int kStep>
  void split(const float* x) {
    const int64_t phase = p_.phase_line(), pad = s_.pad_w;
    const auto edge = [&](int64_t t) {
      for (int i = 0; i < kPhases; ++i) {
        const int64_t w = t * kPhases + i - pad;
        phases_[i * phase + t] = w >= 0 && w < s_.W ? x[w * kStep] : 0.f;
      }
    };
    const int64_t inside = smaller(larger(ceil_div(pad, int64_t(kPhases)), int64_t(0)), phase);
    const int64_t outside = larger(smaller((s_.W + pad) / kPhases, phase), inside);
    for (int64_t t = 0; t < inside; ++t) edge(t);
    for (int64_t t = inside; t < outside; ++t) {
      const float* at = x + (t * kPhases - pad) * kStep;
      RF_UNROLL for (int i = 0; i < kPhases; ++i) phases_[i * phase + t] = at[i * kStep];
    }
    for (int64_t t = outside; t < phase; ++t) edge(t);
  }

  void compute(int64_t n, Range out, int64_t panel) {
    const float* w = static_cast<const float*>(a_.packed) + panel * kPoints * p_.depth * kPanel;
    const TileRows tiles(p_.tiles);
    for (int64_t p = out.begin; p < out.end; ++p) {
      const float* row = v_ + (p - out.begin) * s_.stride_h * kChannels * p_.line;
      for (int64_t t = 0; t < tiles.tiles; ++t) {
        const int64_t first = tiles.first(t), count = tiles.first(t + 1) - first;
        alignas(64) float sums[kPoints * kTileRows * kPanel];
        for (int i = 0; i < kPoints; ++i)
          kSums.at[count](row + i * p_.point + first, p_.line, p_.depth, w + i * p_.depth * kPanel,
                          sums + i * count * kPanel);
        for (int64_t k = panel * kPanel; k < smaller((panel + 1) * kPanel, s_.K); k += kLanes)
          finish(sums + k % kPanel, {first, first + count}, (n * s_.P + p) * s_.Q * s_.K + k, k);
      }
    }
  }

  void finish(const float* sums, Range tiles, int64_t at, int64_t k) {
    const int lanes = int(smaller(s_.K - k, int64_t(kLanes)));
    const Vec scale = a_.scale ? load_n(a_.scale + k, lanes) : broadcast(1.f);
    const Vec shift = a_.shift ? load_n(a_.shift + k, lanes) : zero();
    const int64_t point = tiles.size() * kPanel;
    for (int64_t t = tiles.begin; t < tiles.end; ++t, sums += kPanel) {
      Vec y[kOut];
      output_points([&](int i) __attribute__((always_inline)) { return load(sums + i * point); }, y);
      const int64_t wide = smaller(s_.Q - t * kOut, int64_t(kOut));
      RF_UNROLL for (int j = 0; j < kOut; ++j) {
        if (j >= wide) break;
        const int64_t to = at + (t * kOut + j) * s_.K;
        Vec v = fma(y[j], scale, shift);
        if (a_.residual) v = v + load_n(static_cast<const float*>(a_.residual) + to, lanes);
        if (a_.relu) v = relu(v);
        float* out = static_cast<float*>(a_.y) + to;
        lanes == kLanes ? store(out, v) : store_n(out, v, lanes);
      }
    }
  }

  const ConvArgs& a_;
  const ConvShape& s_;
  const Plan p_;
  float *v_, *phases_;
};

void run(const ConvArgs& a, const Team& team) { Run(a, team); }

}  // namespace

const Algorithm kWinogradStem = {"winograd_stem", 1, kOut, why_not, defaults, packed_bytes, pack, scratch_bytes, run};

}  // namespace RF_ISA
}  // namespace rf
