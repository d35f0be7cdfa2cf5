// The weight gradient of a stem, filters R x 7 with stride 2 on three channels, float32, by Winograd along the rows:
// the forward's lines (stem_lines.h) transposed. Per tile of four outputs of a row dw += G^T [ (A dy) * (B^T x) ], 13
// products for 28, summed over all tiles first, a GEMM a point of R*3 rows by K columns; then transformed once. 13/28
// of 2*N*P*Q*K*R*7*3 flops and, for dy's transform, which writes 13 values for 4, a sixth more. Rows of outputs fall
// into chunks, whichever the team: a chunk's sums are one thread's, and chunks join in their order, so the bits are the
// same for any team. A block of rows is transformed into L2, then every strip and panel of every point sums all of it
// in registers: chains of some 112 tiles.
#include "../conv_backward.h"
#include "../workspace.h"
#include "stem_lines.h"
#include "wgrad_tile.h"

namespace rf {
namespace RF_ISA {

namespace {

constexpr int64_t kBlockRows = 4, kMostChunks = 64;
constexpr int64_t kLeastPixels = 256;  // a sum of ten has a third of the rounding errors of its transforms

struct Plan : StemRows {
  const ConvShape& s;
  int64_t rows, chunk, chunks;  // of outputs
  int64_t depth;                // rows of a point's sums: [r][c]
  Strips strips;
  int64_t dy_point;  // floats of a point's transformed dy
  int64_t own;       // of a thread: transformed x, then dy

  explicit Plan(const ConvShape& shape)
      : StemRows(shape, kBlockRows), s(shape), depth(shape.R * kChannels), strips(depth) {
    rows = s.N * s.P;
    chunk = larger(round_up(ceil_div(rows, kMostChunks), kBlockRows), 2 * kBlockRows);
    chunks = ceil_div(rows, chunk);
    dy_point = int64_t(odd_lines(size_t(kBlockRows * tiles * s.K) * sizeof(float)) / sizeof(float));
    own = int64_t(bytes() / sizeof(float)) + kPoints * dy_point;
  }
  int64_t sums() const { return kPoints * depth * s.K; }  // of a chunk: [point][r][c][K]
  int64_t floats(int threads) const { return chunks * sums() + threads * own; }
};

// sums[row][K] += x[row] dy over the tiles of several rows of outputs. x: a point's first tile of the strip's first
// row.
template <int kRows>
void sum_rows(const Plan& p, const float* x, const float* dy, int64_t rows, float* sums, Stream& ahead) {
  Stream next = ahead;  // in registers
  Vec acc[kRows][2];
  RF_UNROLL for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = zero();
  const int64_t line = p.line, wide = p.s.K;
  for (int64_t row = 0; row < rows; ++row, x += p.s.stride_h * kChannels * line) {
    for (int64_t t = 0; t < p.tiles; ++t, dy += wide) {
      const Vec d0 = load(dy), d1 = load(dy + kLanes);
      next.fetch();
      RF_UNROLL for (int r = 0; r < kRows; ++r) {
        const Vec v = broadcast(x[r * line + t]);
        acc[r][0] = fma(v, d0, acc[r][0]);
        acc[r][1] = fma(v, d1, acc[r][1]);
      }
    }
  }
  RF_UNROLL for (int r = 0; r < kRows; ++r, sums += wide) {
    store(sums, load(sums) + acc[r][0]);
    store(sums + kLanes, load(sums + kLanes) + acc[r][1]);
  }
  ahead = next;
}

struct SumRows {
  void (*at[kTileRows + 1])(const Plan&, const float*, const float*, int64_t, float*, Stream&);
  template <int... I>
  static constexpr SumRows make(std::integer_sequence<int, I...>) {
    return {{nullptr, sum_rows<I + 1>...}};
  }
};
constexpr SumRows kSumRows = SumRows::make(std::make_integer_sequence<int, kTileRows>());

// A of four values of a row: the forward's A^T transposed.
template <class Make>
RF_INLINE void output_points_transposed(const Vec* d, const Make& make) {
  constexpr int kPairs[5] = {0, 2, 4, kEven + 1, kEven + 3};
  constexpr float at[5] = {kE[0], kE[1], kE[2], kO[0], kO[1]};
  RF_UNROLL for (int i = 0; i < 5; ++i) {
    const Vec even = fma(d[2], broadcast(square(at[i])), d[0]), odd = fma(d[3], broadcast(square(at[i])), d[1]);
    make(kPairs[i], fma(odd, broadcast(at[i]), even));
    make(kPairs[i] + 1, fma(odd, broadcast(-at[i]), even));
  }
  make(kEven, d[0]);
  make(6, d[3]);
  make(12, d[3]);
}

class Run {
 public:
  Run(const WgradArgs& a, const Plan& p, float* buffer, const Team& team)
      : a_(a), s_(a.shape), p_(p), sums_(buffer), v_(buffer + p.chunks * p.sums() + team.rank * p.own) {
    dy_points_ = v_ + p_.bytes() / sizeof(float);
    team.each(p_.chunks, [&](int64_t i) { compute(i); });
    team.sync();
    const Range rows = team.share(kPoints * p_.depth);
    for (int64_t i = rows.begin; i < rows.end; ++i) join(sums_ + i * s_.K);
    team.sync();
    const Range outputs = team.share(p_.depth);
    for (int64_t i = outputs.begin; i < outputs.end; ++i) write(i);
  }

 private:
  void compute(int64_t chunk) const {
    float* const sums = sums_ + chunk * p_.sums();
    std::memset(sums, 0, size_t(p_.sums()) * sizeof(float));
    const int64_t end = smaller((chunk + 1) * p_.chunk, p_.rows);
    for (int64_t row = chunk * p_.chunk; row < end;) {
      const int64_t n = row / s_.P, first = row % s_.P;
      const int64_t count = smaller(smaller(kBlockRows, s_.P - first), end - row);
      p_.transform(s_, static_cast<const float*>(a_.x), n, {first, first + count}, v_);
      for (int64_t i = 0; i < count; ++i) transform_dy(row + i, dy_points_ + i * p_.tiles * s_.K);
      // The rows after these come into L2 meanwhile.
      const int64_t coming = smaller(kBlockRows, p_.rows - row - count) * s_.Q * s_.K * int64_t(sizeof(float));
      const int64_t sweeps = kPoints * s_.K / kPanel * p_.strips.count;
      Stream ahead(static_cast<const float*>(a_.dy) + (row + count) * s_.Q * s_.K, coming, sweeps * count * p_.tiles);
      for (int point = 0; point < kPoints; ++point)
        for (int64_t k = 0; k < s_.K; k += kPanel)
          for (int64_t strip = 0; strip < p_.strips.count; ++strip) {
            const int64_t at = p_.strips.first(strip);
            kSumRows.at[p_.strips.height(strip)](p_, v_ + point * p_.point + at * p_.line,
                                                 dy_points_ + point * p_.dy_point + k, count,
                                                 sums + (point * p_.depth + at) * s_.K + k, ahead);
          }
      row += count;
    }
  }

  // A row of outputs: [point][tile][K].
  void transform_dy(int64_t row, float* to) const {
    const float* from = static_cast<const float*>(a_.dy) + row * s_.Q * s_.K;
    for (int64_t t = 0; t < p_.tiles; ++t, from += kOut * s_.K, to += s_.K) {
      const int wide = int(smaller(s_.Q - t * kOut, int64_t(kOut)));
      for (int64_t k = 0; k < s_.K; k += kLanes) {
        Vec d[kOut];
        RF_UNROLL for (int j = 0; j < kOut; ++j) d[j] = j < wide ? load(from + j * s_.K + k) : zero();
        output_points_transposed(
            d, [&](int point, Vec v) __attribute__((always_inline)) { store(to + point * p_.dy_point + k, v); });
      }
    }
  }

  // All chunks' sums of a row, in their order, to the first's.
  void join(float* sums) const {
    for (int64_t chunk = 1; chunk < p_.chunks; ++chunk)
      for (int64_t k = 0; k < s_.K; k += kLanes) store(sums + k, load(sums + k) + load(sums + chunk * p_.sums() + k));
  }

  // dw of row r and channel c, i = r * kChannels + c, of all filters.
  void write(int64_t i) const {
    static const StemFilter filter;
    for (int64_t k = 0; k < s_.K; ++k) {
      double taps[kTaps] = {};
      for (int point = 0; point < kPoints; ++point) {
        const double total = sums_[(point * p_.depth + i) * s_.K + k];
        for (int t = 0; t < kTaps; ++t) taps[t] += filter.g[point][t] * total;
      }
      float* out = a_.dw + k * a_.stride_k + i % kChannels * a_.stride_c + i / kChannels * a_.stride_r;
      for (int t = 0; t < kTaps; ++t) out[t * a_.stride_s] = float(taps[t]);
    }
  }

  // G: what a tap's value adds to the products of every point.
  struct StemFilter {
    double g[kPoints][kTaps];
    StemFilter() {
      for (int t = 0; t < kTaps; ++t) {
        double taps[kTaps] = {}, points[kPoints];
        taps[t] = 1;
        filter_line(taps, points);
        for (int i = 0; i < kPoints; ++i) g[i][t] = points[i];
      }
    }
  };

  const WgradArgs& a_;
  const ConvShape& s_;
  const Plan& p_;
  float *sums_, *v_, *dy_points_;
};

}  // namespace

const char* wgrad_stem_why_not(const ConvShape& s, DType t) {
  if (t != DType::f32) return "Winograd along a stem's rows is for float32";
  if (s.K % kPanel != 0) return "Winograd along a stem's rows needs filters that fill whole panels";
  if (s.N * s.P * s.Q < kLeastPixels) return "few pixels do not pay for Winograd along a stem's rows";
  if (s.planar) return "Winograd along a stem's rows reads NHWC in backward";
  return stem_lines_why_not(s);
}

void wgrad_stem(const WgradArgs& a) {
  const Plan p(a.shape);
  const Workspace work(size_t(p.floats(a.threads)) * 4);
  parallel(a.threads, [&](const Team& team) { Run(a, p, work.floats(), team); });
}

}  // namespace RF_ISA
}  // namespace rf
