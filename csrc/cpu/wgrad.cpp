// The weight gradient of a convolution on the CPU: a GEMM whose depth is the pixels.
// 2*N*P*Q*K*R*S*C flops. A tile is up to 14 filters by two vectors of input channels of one tap, in registers while
// a block of output rows passes: per pixel one broadcast of dy a filter and two loads of x, as in gemm.h.
// dy is packed as [strip of filters][pixel][row], x as [panel of channels][input pixel][kPanel] with its zero border, so
// that all taps read one copy of x at constant offsets and every stride is the loop's own.
// Threads share filters or channels, never pixels: no partial dw to merge, and the same sums for any thread count.
#include "../conv_backward.h"

#include "gemm.h"
#include "parallel.h"
#include "scratch.h"

namespace rf {
namespace RF_ISA {

namespace {

constexpr int64_t kBlockPixels = 448;  // depth of a tile between two visits to dw: dw's traffic against the packed x and dy in L2
constexpr int64_t kChainPixels = 32;   // summed in registers before they join the total: 128 lost two bits against eager
constexpr int kMostRuns = 64;          // images a block may touch
constexpr int kStripStride = 16;       // floats from pixel to pixel in a strip of dy

struct Plan {
  const ConvShape& s;
  bool flat;               // 1x1 without padding: an image's pixels are one row
  int64_t rows, cols;      // output rows and pixels of one
  int64_t in_rows, in_cols;  // packed input rows of an image and pixels of one
  int64_t col_step;        // packed input pixels from one output pixel to the next
  int64_t block_rows;      // output rows of one block
  int64_t strips, panels;

  explicit Plan(const ConvShape& shape) : s(shape) {
    flat = s.R == 1 && s.S == 1 && s.pad_h == 0 && s.pad_w == 0;
    rows = s.P;
    cols = s.Q;
    // Without taps a strided convolution needs only the pixels it reads: packed, its stride is 1.
    col_step = flat ? 1 : s.stride_w;
    in_cols = flat ? s.Q : (s.Q - 1) * s.stride_w + (s.S - 1) * s.dilation_w + 1;
    const int64_t fit = larger(kBlockPixels / cols, int64_t(1));
    block_rows = smaller(smaller(fit, s.N * rows), flat ? fit : (kMostRuns - 2) * rows);
    in_rows = flat ? 1 : (s.R - 1) * s.dilation_h + 1;
    strips = ceil_div(s.K, int64_t(kTileRows));
    panels = ceil_div(s.C, int64_t(kPanel));
  }
  RF_INLINE int64_t strip_first(int64_t i) const { return s.K * i / strips; }
  // Input rows a run of output rows of one image reads.
  int64_t input_rows(int64_t out_rows) const { return flat ? out_rows : (out_rows - 1) * s.stride_h + in_rows; }
  // Most a block reads: runs of several images each carry their own border.
  int64_t most_input_rows() const {
    const int64_t images = smaller((block_rows + rows - 2) / rows + 1, block_rows);
    return flat ? block_rows : larger(block_rows * s.stride_h, block_rows) + images * in_rows;
  }
};

// A run of output rows of one image inside a block, and where its packed rows begin.
struct Run {
  int64_t image, row, count, dy_row, x_row;
};

// Calls body(run) for each image's part of output rows [begin, end).
template <class Body>
RF_INLINE void for_runs(const Plan& p, int64_t begin, int64_t end, const Body& body) {
  int64_t x_row = 0;
  for (int64_t at = begin; at < end;) {
    const int64_t row = at % p.rows, count = smaller(p.rows - row, end - at);
    body(Run{at / p.rows, row, count, at - begin, x_row});
    x_row += p.input_rows(count);
    at += count;
  }
}

// Strips [from, to) of dy, `strip_stride` apart, each [pixel of the block][kStripStride]. Pixels outside: a strip at a
// time reads 56 bytes of every row of dy, which DRAM answers at half its rate.
template <class T>
void pack_dy(const Plan& p, const T* dy, int64_t begin, int64_t end, Range strips, int64_t strip_stride, float* out) {
  const int64_t pixels = (end - begin) * p.cols, K = p.s.K;
  const T* in = dy + begin * p.cols * K;
  for (int64_t i = 0; i < pixels; ++i, in += K, out += kStripStride) {
    for (int64_t strip = strips.begin; strip < strips.end; ++strip) {
      const int64_t k = p.strip_first(strip), rows = p.strip_first(strip + 1) - k;
      float* to = out + (strip - strips.begin) * strip_stride;
      for (int64_t n = 0; n < rows; n += kLanes) {
        // A whole vector where dy has one: what lies beyond the strip's rows is never read.
        if (k + n + kLanes <= K) store(to + n, load(in + k + n));
        else store_n(to + n, load_n(in + k + n, int(rows - n)), int(rows - n));
      }
    }
  }
}

// One input row of one panel, zeros outside the image.
template <class T>
void pack_x_row(const Plan& p, const T* row, int64_t c, float* out) {
  const ConvShape& s = p.s;
  const int cols = int(smaller(int64_t(kPanel), s.C - c));
  const int64_t step = p.flat ? s.stride_w : 1;
  for (int64_t i = 0; i < p.in_cols; ++i, out += kPanel) {
    const int64_t w = i * step - s.pad_w;
    const bool inside = row && w >= 0 && w < s.W;
    const T* in = row + (inside ? w * s.C + c : 0);
    if (inside && cols == kPanel) {
      store(out, load(in));
      store(out + kLanes, load(in + kLanes));
      continue;
    }
    for (int n = 0; n < kPanel; n += kLanes) {
      const int left = cols - n;
      store(out + n, !inside || left <= 0 ? zero() : left >= kLanes ? load(in + n) : load_n(in + n, left));
    }
  }
}

template <class T>
void pack_x(const Plan& p, const T* x, int64_t begin, int64_t end, int64_t panel, float* out) {
  const ConvShape& s = p.s;
  for_runs(p, begin, end, [&](const Run& run) {
    for (int64_t i = 0; i < p.input_rows(run.count); ++i) {
      const int64_t h = p.flat ? (run.row + i) * s.stride_h : run.row * s.stride_h - s.pad_h + i;
      const bool inside = h >= 0 && h < s.H;
      pack_x_row(p, inside ? x + (run.image * s.H + h) * s.W * s.C : nullptr, panel * kPanel, out + (run.x_row + i) * p.in_cols * kPanel);
    }
  });
}

// One run's share of a tile: rows of `cols` pixels, a = dy's strip, b = x's panel at the tap.
struct Walk {
  int64_t rows, cols;
  int64_t a_row, b_row;  // floats from row to row
  int64_t b_step;        // floats from pixel to pixel of x
};

// The sums so far join the total and start anew: one chain over all pixels would round too often.
template <int kRows>
RF_INLINE void flush(Vec (&acc)[kRows][2], float* sums) {
  RF_UNROLL for (int r = 0; r < kRows; ++r) {
    RF_UNROLL for (int n = 0; n < 2; ++n) {
      float* t = sums + r * kPanel + n * kLanes;
      store(t, load(t) + acc[r][n]);
      acc[r][n] = zero();
    }
  }
}

template <int kRows>
void wgrad_tile(const float* const* a, const float* const* b, const Walk* walks, int runs, float* sums) {
  Vec acc[kRows][2];
  RF_UNROLL for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = zero();
  int64_t chain = 0;
  for (int run = 0; run < runs; ++run) {
    const Walk& w = walks[run];
    for (int64_t i = 0; i < w.rows; ++i) {
      const float *at = a[run] + i * w.a_row, *bt = b[run] + i * w.b_row;
      for (int64_t left = w.cols; left > 0;) {
        const int64_t pixels = smaller(left, kChainPixels);
        if (chain + pixels > kChainPixels) {
          flush(acc, sums);
          chain = 0;
        }
        chain += pixels;
        left -= pixels;
        for (int64_t j = 0; j < pixels; ++j, at += kStripStride, bt += w.b_step) {
          const Vec b0 = load(bt), b1 = load(bt + kLanes);
          RF_UNROLL for (int r = 0; r < kRows; ++r) {
            const Vec v = broadcast(at[r]);
            acc[r][0] = fma(v, b0, acc[r][0]);
            acc[r][1] = fma(v, b1, acc[r][1]);
          }
        }
      }
    }
  }
  flush(acc, sums);
}

using Tile = void (*)(const float* const*, const float* const*, const Walk*, int, float*);
struct Tiles {
  Tile at[kTileRows + 1];
  template <int... I>
  static constexpr Tiles make(std::integer_sequence<int, I...>) {
    return {{nullptr, wgrad_tile<I + 1>...}};
  }
};
constexpr Tiles kTiles = Tiles::make(std::make_integer_sequence<int, kTileRows>());

// dw of one strip and panel from its sums, [tap][row][kPanel].
void write_dw(const WgradArgs& a, const Plan& p, int64_t strip, int64_t panel, const float* sums) {
  const ConvShape& s = a.shape;
  const int64_t k0 = p.strip_first(strip), rows = p.strip_first(strip + 1) - k0, c0 = panel * kPanel;
  const int cols = int(smaller(int64_t(kPanel), s.C - c0));
  for (int64_t r = 0; r < s.R; ++r) {
    for (int64_t t = 0; t < s.S; ++t, sums += kTileRows * kPanel) {
      for (int64_t k = 0; k < rows; ++k) {
        float* out = a.dw + (k0 + k) * a.stride_k + c0 * a.stride_c + r * a.stride_r + t * a.stride_s;
        const float* in = sums + k * kPanel;
        if (a.stride_c == 1) std::memcpy(out, in, size_t(cols) * 4);
        else for (int c = 0; c < cols; ++c) out[c * a.stride_c] = in[c];
      }
    }
  }
}

template <class T>
void wgrad_any(const WgradArgs& a) {
  const ConvShape& s = a.shape;
  const Plan p(s);
  const int64_t taps = s.R * s.S, out_rows = s.N * p.rows, tile = kTileRows * kPanel;
  // The side with more tiles is shared; the other is packed by every thread for itself.
  const bool share_strips = p.strips >= p.panels;
  const int64_t most = share_strips ? p.strips : p.panels;
  const int threads = int(smaller(int64_t(a.threads), most));
  const int64_t dy_floats = (p.block_rows * p.cols | 1) * kStripStride;  // odd lines: strips in different L1 sets
  const int64_t x_floats = p.most_input_rows() * p.in_cols * kPanel;
  const int64_t mine_most = ceil_div(most, int64_t(threads)) + 1;
  const int64_t my_strips = share_strips ? smaller(mine_most, p.strips) : p.strips;
  const int64_t my_floats = my_strips * dy_floats + x_floats + 64;
  const int64_t sums_floats = p.strips * p.panels * taps * tile;
  float* buffer = scratch(size_t(sums_floats + threads * my_floats));
  parallel(threads, [&](const Team& team) {
    const Range all_strips = {0, p.strips}, all_panels = {0, p.panels};
    const Range strips = share_strips ? team.share(p.strips) : all_strips;
    const Range panels = share_strips ? all_panels : team.share(p.panels);
    float* packed_dy = buffer + sums_floats + team.rank * my_floats;
    float* packed_x = packed_dy + my_strips * dy_floats;
    const auto sums_of = [&](int64_t strip, int64_t panel) { return buffer + (panel * p.strips + strip) * taps * tile; };
    for (int64_t panel = panels.begin; panel < panels.end; ++panel)
      std::memset(sums_of(strips.begin, panel), 0, size_t(strips.size() * taps * tile) * 4);

    for (int64_t begin = 0; begin < out_rows; begin += p.block_rows) {
      const int64_t end = smaller(begin + p.block_rows, out_rows);
      pack_dy(p, static_cast<const T*>(a.dy), begin, end, strips, dy_floats, packed_dy);
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        pack_x(p, static_cast<const T*>(a.x), begin, end, panel, packed_x);
        for (int64_t strip = strips.begin; strip < strips.end; ++strip) {
          const float* dy = packed_dy + (strip - strips.begin) * dy_floats;
          const int64_t height = p.strip_first(strip + 1) - p.strip_first(strip);
          float* sums = sums_of(strip, panel);
          for (int64_t tap = 0; tap < taps; ++tap, sums += tile) {
            const int64_t shift = (tap / s.S * s.dilation_h * p.in_cols + tap % s.S * s.dilation_w) * kPanel;
            const float *as[kMostRuns], *bs[kMostRuns];
            Walk walks[kMostRuns];
            int runs = 0;
            if (p.flat) {  // packed without a gap: one long row
              as[0] = dy, bs[0] = packed_x, runs = 1;
              walks[0] = {1, (end - begin) * p.cols, 0, 0, kPanel};
            } else for_runs(p, begin, end, [&](const Run& run) {
              as[runs] = dy + run.dy_row * p.cols * kStripStride;
              bs[runs] = packed_x + run.x_row * p.in_cols * kPanel + shift;
              walks[runs] = {run.count, p.cols, p.cols * kStripStride, s.stride_h * p.in_cols * kPanel, p.col_step * kPanel};
              ++runs;
            });
            kTiles.at[height](as, bs, walks, runs, sums);
          }
        }
      }
    }
    for (int64_t panel = panels.begin; panel < panels.end; ++panel)
      for (int64_t strip = strips.begin; strip < strips.end; ++strip) write_dw(a, p, strip, panel, sums_of(strip, panel));
  });
}

}  // namespace

const char* wgrad_why_not(const ConvShape& s, DType) {
  if (s.groups != 1) return "grouped convolutions are left to torch";
  if (s.C < 8) return "fewer than 8 input channels fill no vector: left to torch";
  return nullptr;
}

void wgrad(const WgradArgs& a) { a.dtype == DType::f32 ? wgrad_any<float>(a) : wgrad_any<bf16>(a); }

}  // namespace RF_ISA
}  // namespace rf
