// "winograd_stem": filters of R x 7 with stride 2 on three channels (the stem of the ImageNet ResNets), float32, by
// Winograd along the rows (stem_lines.h). Down the columns the sum is direct: with three channels a second transform
// would cost more than it saves. 13/28 of 2*N*P*Q*K*R*7*3 flops and about a fifth more for the transforms; rms
// error 1.3 to 1.6 times a direct sum's. A transformed row is shared by the R/2 output rows that read it and by all
// filters. The points' GEMMs then have tiles for rows and R*3 for depth, read in place.
#include "stem_lines.h"

namespace rf {
namespace RF_ISA {

namespace {

struct Plan : StemRows {
  int64_t panels, depth, block_rows;

  Plan(const ConvShape& s, const ConvConfig& c) : StemRows(s, rows_of(s, c)), block_rows(rows_of(s, c)) {
    panels = ceil_div(s.K, int64_t(kPanel));
    depth = s.R * kChannels;
  }
  static int64_t rows_of(const ConvShape& s, const ConvConfig& c) {
    return smaller(s.P, int64_t(c.block_rows > 0 ? c.block_rows : 8));
  }
};

const char* why_not(const ConvShape& s, DType t) {
  if (t != DType::f32) return "winograd_stem is for float32: bfloat16 multiplies pairs as fast and more exactly";
  return stem_lines_why_not(s);
}

ConvConfig defaults(const ConvShape&, DType, int) { return {}; }

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
    const Range mine = team.share(s_.N * s_.P);
    for (int64_t at = mine.begin; at < mine.end;) {
      const int64_t n = at / s_.P, p = at % s_.P;
      const int64_t end = smaller(smaller(p + p_.block_rows, s_.P), p + mine.end - at);
      p_.transform(s_, static_cast<const float*>(a_.x), n, {p, end}, v_);
      for (int64_t panel = 0; panel < p_.panels; ++panel) compute(n, {p, end}, panel);
      at += end - p;
    }
  }

 private:
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
  float* v_;
};

void run(const ConvArgs& a, const Team& team) { Run(a, team); }

}  // namespace

const Algorithm kWinogradStem = {"winograd_stem", 1, kOut, why_not, defaults, packed_bytes, pack, scratch_bytes, run};

}  // namespace RF_ISA
}  // namespace rf
