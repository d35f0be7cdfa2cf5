// "stem": three input channels (the 7x7 stride 2 of ImageNet, the 3x3 of CIFAR), NHWC or NCHW, computed in float32.
// 2*N*P*Q*K*R*S*3 flops. The S*3 floats of a filter row are one run of an NHWC row, and neighbouring outputs
// start 3*stride floats apart: from a padded row buffer the register tile reads its rows in place, with
// addresses fixed at compile time. The implicit GEMM's gather took as long as the arithmetic (45 % of peak).
#include "conv_algorithms.h"

namespace rf {
namespace RF_ISA {

namespace {

constexpr int kChannels = 3;

struct Plan {
  int64_t columns, row_floats, taps, panels, block_rows;
  size_t buffer_bytes;
};

Plan plan_of(const ConvShape& s, const ConvConfig& c) {
  Plan p;
  p.columns = (s.Q - 1) * s.stride_w + s.S;
  p.row_floats = p.columns * kChannels;
  p.taps = s.R * s.S * kChannels;
  p.panels = ceil_div(s.K, int64_t(kPanel));
  p.block_rows = smaller(s.P, int64_t(c.block_rows > 0 ? c.block_rows : 8));
  const int64_t rows = (p.block_rows - 1) * s.stride_h + (s.R - 1) * s.dilation_h + 1;
  p.buffer_bytes = odd_lines(size_t(rows * p.row_floats) * sizeof(float));
  return p;
}

const char* why_not(const ConvShape& s, DType) {
  if (s.C != kChannels || s.groups != 1) return "stem needs 3 input channels in one group";
  if (s.stride_w > 2) return "stem needs stride 1 or 2";
  if (s.dilation_w != 1) return "stem needs dilation 1";
  return nullptr;
}

ConvConfig defaults(const ConvShape&, DType, int) { return {}; }

size_t packed_bytes(const ConvShape& s, DType) {
  return size_t(ceil_div(s.K, int64_t(kPanel)) * s.R * s.S * kChannels * kPanel) * sizeof(float);
}

// packed: [panel][r][s][c][kPanel].
void pack(const ConvShape& s, DType, void* packed, const float* w, const float* fold, int) {
  float* out = static_cast<float*>(packed);
  for (int64_t first = 0; first < s.K; first += kPanel) {
    for (int64_t tap = 0; tap < s.R * s.S; ++tap) {
      for (int64_t c = 0; c < kChannels; ++c) {
        for (int64_t k = first; k < first + kPanel; ++k)
          *out++ = k < s.K ? w[(k * kChannels + c) * s.R * s.S + tap] * (fold ? fold[k] : 1.f) : 0.f;
      }
    }
  }
}

size_t scratch_bytes(const ConvShape& s, DType, const ConvConfig& c, int threads) {
  return plan_of(s, c).buffer_bytes * size_t(threads);
}

// kRows neighbouring outputs, kStep floats apart in the row buffer; row_step floats between filter rows.
template <int kRows, int kStep>
void sum_row(const float* x, int64_t row_step, int64_t rows, int64_t run, const float* w, float* sums) {
  Vec acc[kRows][2];
  RF_UNROLL for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = zero();
  for (; rows > 0; --rows, x += row_step) {
    const float* a = x;
#pragma GCC unroll 3
    for (int64_t i = 0; i < run; ++i, ++a, w += kPanel) {
      const Vec w0 = load(w), w1 = load(w + kLanes);
      RF_UNROLL for (int r = 0; r < kRows; ++r) {
        const Vec s = broadcast(a[r * kStep]);
        acc[r][0] = fma(s, w0, acc[r][0]);
        acc[r][1] = fma(s, w1, acc[r][1]);
      }
    }
  }
  RF_UNROLL for (int r = 0; r < kRows; ++r) {
    store(sums + r * kPanel, acc[r][0]);
    store(sums + r * kPanel + kLanes, acc[r][1]);
  }
}

using SumRow = void (*)(const float*, int64_t, int64_t, int64_t, const float*, float*);

template <int kStep>
SumRow pick(int64_t width) {
  return width == kTileRows ? sum_row<kTileRows, kStep> : width == kTileRows / 2 ? sum_row<kTileRows / 2, kStep> : sum_row<1, kStep>;
}

template <class T>
class Run {
 public:
  Run(const ConvArgs& args, const Team& team) : a_(args), s_(args.shape), p_(plan_of(args.shape, args.config)) {
    rows_ = reinterpret_cast<float*>(static_cast<char*>(a_.scratch) + p_.buffer_bytes * size_t(team.rank));
    const Range mine = team.share(s_.N * s_.P);
    for (int64_t at = mine.begin; at < mine.end;) {
      const int64_t n = at / s_.P, p = at % s_.P;
      const int64_t end = smaller(smaller(p + p_.block_rows, s_.P), p + mine.end - at);
      copy_rows(n, {p, end});
      for (int64_t panel = 0; panel < p_.panels; ++panel) compute(n, {p, end}, panel);
      at += end - p;
    }
  }

 private:
  void copy_rows(int64_t n, Range out) {
    const int64_t first = out.begin * s_.stride_h - s_.pad_h;
    const int64_t last = (out.end - 1) * s_.stride_h - s_.pad_h + (s_.R - 1) * s_.dilation_h;
    const int64_t left = smaller(larger(s_.pad_w, int64_t(0)), p_.columns), inside = smaller(s_.W, p_.columns - left);
    float* to = rows_;
    for (int64_t h = first; h <= last; ++h, to += p_.row_floats) {
      if (h < 0 || h >= s_.H) {
        std::memset(to, 0, size_t(p_.row_floats) * sizeof(float));
        continue;
      }
      std::memset(to, 0, size_t(left * kChannels) * sizeof(float));
      float* pixel = to + left * kChannels;
      const T* x = static_cast<const T*>(a_.x);
      if (s_.planar) {
        const T* c0 = x + (n * kChannels * s_.H + h) * s_.W;
        const T *c1 = c0 + s_.H * s_.W, *c2 = c1 + s_.H * s_.W;
        for (int64_t w = 0; w < inside; ++w, pixel += kChannels)
          pixel[0] = to_float(c0[w]), pixel[1] = to_float(c1[w]), pixel[2] = to_float(c2[w]);
      } else {
        const T* row = x + (n * s_.H + h) * s_.W * kChannels;
        int64_t i = 0;
        for (; i + kLanes <= inside * kChannels; i += kLanes) store(pixel + i, load(row + i));
        for (; i < inside * kChannels; ++i) pixel[i] = to_float(row[i]);
        pixel += inside * kChannels;
      }
      std::memset(pixel, 0, size_t(to + p_.row_floats - pixel) * sizeof(float));
    }
  }

  void compute(int64_t n, Range out, int64_t panel) {
    const int64_t width = s_.Q >= kTileRows ? kTileRows : s_.Q >= kTileRows / 2 ? kTileRows / 2 : 1;
    const SumRow sum = s_.stride_w == 2 ? pick<2 * kChannels>(width) : pick<kChannels>(width);
    const float* w = static_cast<const float*>(a_.packed) + panel * p_.taps * kPanel;
    for (int64_t p = out.begin; p < out.end; ++p) {
      const float* row = rows_ + (p - out.begin) * s_.stride_h * p_.row_floats;
      for (int64_t done = 0; done < s_.Q;) {
        // The last tile is moved back to be full; what it computes again is not stored again.
        const int64_t q = smaller(done, s_.Q - width);
        alignas(64) float sums[kTileRows * kPanel];
        sum(row + q * s_.stride_w * kChannels, s_.dilation_h * p_.row_floats, s_.R, s_.S * kChannels, w, sums);
        finish_pixels(sums + (done - q) * kPanel, q + width - done, ((n * s_.P + p) * s_.Q + done) * s_.K, panel * kPanel);
        done = q + width;
      }
    }
  }

  void finish_pixels(const float* sums, int64_t count, int64_t at, int64_t first) {
    for (int64_t k = first; k < smaller(first + kPanel, s_.K); k += kLanes) {
      const int n = int(smaller(s_.K - k, int64_t(kLanes)));
      const Vec scale = a_.scale ? load_n(a_.scale + k, n) : broadcast(1.f);
      const Vec shift = a_.shift ? load_n(a_.shift + k, n) : zero();
      T* y = static_cast<T*>(a_.y) + at + k;
      const T* residual = a_.residual ? static_cast<const T*>(a_.residual) + at + k : nullptr;
      for (int64_t i = 0; i < count; ++i, y += s_.K) {
        Vec v = fma(load(sums + i * kPanel + k - first), scale, shift);
        if (residual) v = v + load_n(residual + i * s_.K, n);
        if (a_.relu) v = relu(v);
        n == kLanes ? store(y, v) : store_n(y, v, n);
      }
    }
  }

  const ConvArgs& a_;
  const ConvShape& s_;
  const Plan p_;
  float* rows_;
};

void run(const ConvArgs& a, const Team& team) {
  if (a.dtype == DType::f32) {
    Run<float>(a, team);
  } else {
    Run<bf16>(a, team);
  }
}

}  // namespace

extern const Algorithm kStem;
const Algorithm kStem = {"stem", why_not, defaults, packed_bytes, pack, scratch_bytes, run};

}  // namespace RF_ISA
}  // namespace rf
