// The weight gradient of a 3x3 stride 1 convolution by Winograd's F(3x3, 4x4): per tile of 4x4 outputs
// dw += A^T [ (G dy G^T) * (B^T x B) ] A with 36 products for 144, in float32 whatever the tensors are.
// B is the forward's (winograd_lines.h: points 0, +-3/4, +-3/2, infinity); A^T m A is linear, so the products are
// summed over all tiles first (36 GEMMs of K x C, depth = tiles) and transformed once. 2*36/16*N*P*Q*K*C flops where
// tiles divide the image. A block of tiles: the team transforms dy and x together, point by point into rows of all
// filters and of all channels, then every thread runs its own (panel, point) GEMMs over all of it, fetching the next
// point and the tensors of the next block meanwhile. Sums have one owner and one order of blocks: the same bits for any
// team. bf16 tensors are widened: a bf16 F(3x3, 2x2) needs 2.25 times fewer products at twice the rate, so no less
// time, and rounds its transforms.
#include "../conv_backward.h"
#include "scratch.h"
#include "wgrad_tile.h"
#include "winograd.h"

namespace rf {
namespace RF_ISA {

namespace {

constexpr int kOut = 4, kIn = 6, kPoints = kIn * kIn;
constexpr int64_t kChainTiles = 64;
constexpr int64_t kBlockFloats = 1 << 19;  // transformed dy and x of a block: in the caches both threads see

struct Plan {
  const ConvShape& s;
  int64_t tiles_h, tiles_w, tiles, panels;
  Strips strips;
  int64_t block_tiles, blocks;
  int64_t dy_row, x_row;                 // floats from tile to tile, and
  int64_t dy_point, x_point, sum_point;  // from point to point: odd lines, or they would share L1 sets

  explicit Plan(const ConvShape& shape) : s(shape), strips(shape.K) {
    tiles_h = ceil_div(s.P, int64_t(kOut));
    tiles_w = ceil_div(s.Q, int64_t(kOut));
    tiles = s.N * tiles_h * tiles_w;
    panels = ceil_div(s.C, int64_t(kPanel));
    dy_row = odd(s.K);
    x_row = odd(panels * kPanel);
    const int64_t each = kPoints * (dy_row + x_row);
    const int64_t fit = larger(kBlockFloats / each, kChainTiles);
    blocks = ceil_div(tiles, fit);
    block_tiles = ceil_div(tiles, blocks);
    dy_point = odd(block_tiles * dy_row);
    x_point = odd(block_tiles * x_row);
    sum_point = odd(strips.count * kTileRows * kPanel);
  }
  static int64_t odd(int64_t floats) { return int64_t(odd_lines(size_t(floats) * 4) / 4); }
  int64_t block_floats() const { return kPoints * (dy_point + x_point); }
};

// G dy along one line, without the factors 1/N of its rows: A^T takes them.
RF_INLINE void gradient_line(const Vec* d, Vec* out) {
  constexpr float a = Line4::kA, b = Line4::kB;
  out[0] = d[0];
  RF_UNROLL for (int i = 0; i < 2; ++i) {
    const float p = i ? b : a;
    const Vec even = fma(d[2], broadcast(p * p), d[0]), odd = fma(d[3], broadcast(p * p), d[1]);
    out[1 + 2 * i] = fma(odd, broadcast(p), even);
    out[2 + 2 * i] = fma(odd, broadcast(-p), even);
  }
  out[5] = d[3];
}

// A^T along one line: 6 points to 3 taps.
RF_INLINE void tap_line(const Vec* m, Vec* y) {
  constexpr float a = Line4::kA, b = Line4::kB, a2 = a * a, b2 = b * b;
  constexpr float n0 = 1 / (a2 * b2), na = 1 / (2 * a2 * (a2 - b2)), nb = 1 / (2 * b2 * (b2 - a2));
  const Vec sum_a = m[1] + m[2], sum_b = m[3] + m[4], difference_a = m[1] - m[2], difference_b = m[3] - m[4];
  y[0] = fma(m[0], broadcast(n0), fma(sum_a, broadcast(na), sum_b * broadcast(nb)));
  y[1] = fma(difference_b, broadcast(nb * b), difference_a * broadcast(na * a));
  y[2] = fma(sum_b, broadcast(nb * b2), fma(sum_a, broadcast(na * a2), m[5]));
}

// 4x4 gradients at `at` (null: outside), `n` channels from c, to 36 points `point` floats apart.
template <class T>
RF_INLINE void gradient_tile(const T* const* at, int64_t c, int n, float* out, int64_t point) {
  Vec rows[kIn][kOut];
  RF_UNROLL for (int j = 0; j < kOut; ++j) {
    Vec column[kOut], points[kIn];
    RF_UNROLL for (int i = 0; i < kOut; ++i) {
      const T* p = at[i * kOut + j];
      column[i] = !p ? zero() : n >= kLanes ? load(p + c) : load_n(p + c, n);
    }
    gradient_line(column, points);
    RF_UNROLL for (int i = 0; i < kIn; ++i) rows[i][j] = points[i];
  }
  RF_UNROLL for (int i = 0; i < kIn; ++i) {
    Vec points[kIn];
    gradient_line(rows[i], points);
    RF_UNROLL for (int j = 0; j < kIn; ++j) store(out + (i * kIn + j) * point, points[j]);
  }
}

RF_INLINE void fetch_points(const float* out, int64_t point) {
  for (int i = 0; i < kPoints; ++i) __builtin_prefetch(out + i * point, 1);
}

template <class T>
class WgradWinograd {
 public:
  WgradWinograd(const WgradArgs& a, const Plan& p, float* buffer, const float* zeros, const Team& team)
      : a_(a), s_(a.shape), p_(p), team_(team), buffer_(buffer), zeros_(reinterpret_cast<const T*>(zeros)) {}

  // One buffer where there is one block, else two, so that a team transforms a block while its last still multiplies.
  static int64_t floats(const Plan& p, int threads) {
    return (p.blocks > 1 ? 2 : 1) * p.block_floats() +
           (whole_panels(p, threads) ? threads : p.panels) * kPoints * p.sum_point;
  }
  // With one block a thread turns a panel's sums into dw at once: they never leave its cache.
  static bool whole_panels(const Plan& p, int threads) { return p.blocks == 1 && p.panels >= threads; }

  void run() {
    const int64_t block_floats = p_.block_floats(), sum_floats = kPoints * p_.sum_point;
    float* all_sums = buffer_ + (p_.blocks > 1 ? 2 : 1) * block_floats;
    if (whole_panels(p_, team_.size)) {
      transform(0, p_.tiles, buffer_);
      team_.sync();
      float* sums = all_sums + team_.rank * sum_floats;
      const Range mine = team_.share(p_.panels);
      for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
        for (int64_t point = 0; point < kPoints; ++point) {
          Stream ahead[2] = {{buffer_ + (point + 1) % kPoints * p_.dy_point, p_.dy_point * 4,
                              p_.strips.count * p_.tiles},
                             {}},
                 none[2];
          multiply(buffer_, p_.tiles, panel, point, sums + point * p_.sum_point, true, ahead, none);
        }
        for (int64_t strip = 0; strip < p_.strips.count; ++strip) write(panel, strip, sums);
      }
      return;
    }
    const Range mine = team_.share(p_.panels * kPoints);
    for (int64_t block = 0; block < p_.blocks; ++block) {
      const int64_t begin = p_.tiles * block / p_.blocks, end = p_.tiles * (block + 1) / p_.blocks;
      float* at = buffer_ + block % 2 * block_floats;
      transform(begin, end, at);
      team_.sync();  // whoever passes has left the block before: its buffer is free for the next
      const int64_t after = block + 1 < p_.blocks ? p_.tiles * (block + 2) / p_.blocks : end;
      const int64_t calls = mine.size() * p_.strips.count, steps = p_.panels * p_.strips.count * (end - begin);
      Stream tensors[2] = {stream(a_.dy, s_.P, s_.Q, s_.K, {end, after}, calls),
                           stream(a_.x, s_.H, s_.W, s_.C, {end, after}, calls)};
      Stream ahead[2];
      // Panels within a point: its rows stay in L2 for all of them.
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        const int64_t point = i / p_.panels, panel = i % p_.panels;
        if (panel == 0 && point + 1 < kPoints) {
          ahead[0] = {at + (point + 1) * p_.dy_point, p_.dy_point * 4, steps};
          ahead[1] = {at + kPoints * p_.dy_point + (point + 1) * p_.x_point, p_.x_point * 4, steps};
        }
        multiply(at, end - begin, panel, point, all_sums + panel * sum_floats + point * p_.sum_point, block == 0, ahead,
                 tensors);
      }
    }
    team_.sync();
    const Range writes = team_.share(p_.panels * p_.strips.count);
    for (int64_t i = writes.begin; i < writes.end; ++i)
      write(i / p_.strips.count, i % p_.strips.count, all_sums + i / p_.strips.count * sum_floats);
  }

 private:
  // The pixels of dy (null: outside) and of x (zeros_) under one tile.
  struct Pixels {
    const T *dy[kOut * kOut], *x[kPoints];
  };
  void locate(int64_t tile, Pixels& at) const {
    const T *x = static_cast<const T*>(a_.x), *dy = static_cast<const T*>(a_.dy);
    const int64_t image = tile / (p_.tiles_h * p_.tiles_w), p0 = tile / p_.tiles_w % p_.tiles_h * kOut,
                  q0 = tile % p_.tiles_w * kOut;
    for (int i = 0; i < kOut; ++i)
      for (int j = 0; j < kOut; ++j)
        at.dy[i * kOut + j] =
            p0 + i < s_.P && q0 + j < s_.Q ? dy + ((image * s_.P + p0 + i) * s_.Q + q0 + j) * s_.K : nullptr;
    for (int i = 0; i < kIn; ++i) {
      const int64_t h = p0 - s_.pad_h + i;
      for (int j = 0; j < kIn; ++j) {
        const int64_t w = q0 - s_.pad_w + j;
        at.x[i * kIn + j] =
            h >= 0 && h < s_.H && w >= 0 && w < s_.W ? x + ((image * s_.H + h) * s_.W + w) * s_.C : zeros_;
      }
    }
  }

  // This thread's part of a tensor under some tiles: whole rows of tiles lie together.
  Stream stream(const void* tensor, int64_t height, int64_t width, int64_t channels, Range tiles, int64_t steps) const {
    const Range part = team_.share(tiles.size());
    if (part.size() <= 0) return {};
    const int64_t row = (tiles.begin + part.begin) / p_.tiles_w;  // of tiles
    const int64_t pixel = (row / p_.tiles_h * height + row % p_.tiles_h * kOut) * width;
    return {static_cast<const T*>(tensor) + pixel * channels, part.size() * kOut * kOut * channels * int64_t(sizeof(T)),
            steps};
  }

  // Lines of the next tile and of the points about to be written are asked for a vector ahead: pixels and points are
  // too many streams for the hardware to follow, and without this every vector waited for memory (56x56x64: 10 ms of
  // 17).
  void transform(int64_t begin, int64_t end, float* block) {
    const Range mine = team_.share(end - begin);
    const int64_t channels = p_.panels * kPanel;
    if (mine.begin >= mine.end) return;
    Pixels places[2];
    locate(begin + mine.begin, places[mine.begin % 2]);
    for (int64_t t = mine.begin; t < mine.end; ++t) {
      const Pixels& here = places[t % 2];
      Pixels& next = places[(t + 1) % 2];
      locate(begin + smaller(t + 1, mine.end - 1), next);
      float* dy = block + t * p_.dy_row;
      for (int64_t k = 0; k < s_.K; k += kLanes) {
        fetch_points(k + kLanes < s_.K ? dy + k + kLanes : dy + p_.dy_row, p_.dy_point);
        for (int i = 0; i < kOut * kOut; ++i) __builtin_prefetch(next.dy[i] + (next.dy[i] ? k : 0));
        gradient_tile(here.dy, k, int(smaller(s_.K - k, int64_t(kLanes))), dy + k, p_.dy_point);
      }
      float* x = block + kPoints * p_.dy_point + t * p_.x_row;
      for (int64_t c = 0; c < channels; c += kLanes) {
        fetch_points(c + kLanes < channels ? x + c + kLanes : x + p_.x_row, p_.x_point);
        for (int i = 0; i < kPoints; ++i) __builtin_prefetch(next.x[i] + (next.x[i] == zeros_ ? 0 : c));
        input_tile<Line4, kOut, Line4, kOut, T, float>(here.x, {c, c + kLanes}, s_.C, int(channels), x, 0, p_.x_point);
      }
    }
  }

  void multiply(const float* block, int64_t tiles, int64_t panel, int64_t point, float* sums, bool fresh,
                Stream (&ahead)[2], Stream (&tensors)[2]) {
    const float *dy = block + point * p_.dy_point,
                *x = block + kPoints * p_.dy_point + point * p_.x_point + panel * kPanel;
    for (int64_t strip = 0; strip < p_.strips.count; ++strip) {
      float* sum = sums + strip * kTileRows * kPanel;
      for (Stream& s : tensors) s.fetch_step();
      kOuterTiles<float>.at[p_.strips.height(strip)]({dy + p_.strips.first(strip), p_.dy_row}, {x, p_.x_row}, tiles,
                                                     kChainTiles, sum, fresh, ahead);
    }
  }

  // dw of one strip and panel from its sums, [point][strip][row][kPanel].
  void write(int64_t panel, int64_t strip, const float* sums) {
    const int64_t k0 = p_.strips.first(strip);
    for (int64_t k = 0; k < p_.strips.height(strip); ++k) {
      for (int n = 0; n < kPanel; n += kLanes) {
        const int64_t c0 = panel * kPanel + n;
        if (c0 >= s_.C) break;
        const float* in = sums + (strip * kTileRows + k) * kPanel + n;
        Vec half[3][kIn];
        RF_UNROLL for (int j = 0; j < kIn; ++j) {
          Vec m[kIn], taps[3];
          RF_UNROLL for (int i = 0; i < kIn; ++i) m[i] = load(in + (i * kIn + j) * p_.sum_point);
          tap_line(m, taps);
          RF_UNROLL for (int i = 0; i < 3; ++i) half[i][j] = taps[i];
        }
        const int cols = int(smaller(s_.C - c0, int64_t(kLanes)));
        for (int r = 0; r < 3; ++r) {
          Vec taps[3];
          tap_line(half[r], taps);
          for (int t = 0; t < 3; ++t) {
            float* out = a_.dw + (k0 + k) * a_.stride_k + c0 * a_.stride_c + r * a_.stride_r + t * a_.stride_s;
            if (a_.stride_c == 1) {
              store_n(out, taps[t], cols);
            } else {
              float lanes[kLanes];
              store(lanes, taps[t]);
              for (int c = 0; c < cols; ++c) out[c * a_.stride_c] = lanes[c];
            }
          }
        }
      }
    }
  }

  const WgradArgs& a_;
  const ConvShape& s_;
  const Plan& p_;
  const Team& team_;
  float* buffer_;
  const T* zeros_;  // a pixel outside the image
};

template <class T>
void wgrad_winograd_any(const WgradArgs& a) {
  const Plan p(a.shape);
  const int64_t floats = WgradWinograd<T>::floats(p, a.threads);
  float *buffer = scratch(size_t(floats + a.shape.C)), *zeros = buffer + floats;
  std::memset(zeros, 0, size_t(a.shape.C) * 4);
  parallel(a.threads, [&](const Team& team) { WgradWinograd<T>(a, p, buffer, zeros, team).run(); });
}

}  // namespace

const char* wgrad_winograd_why_not(const ConvShape& s, DType) {
  if (s.R != 3 || s.S != 3) return "Winograd needs a 3x3 filter";
  if (s.stride_h != 1 || s.stride_w != 1) return "Winograd needs stride 1";
  if (s.dilation_h != 1 || s.dilation_w != 1) return "Winograd needs dilation 1";
  if (s.groups != 1) return "Winograd needs groups 1";
  if (s.C < 16 || s.K < 16) return "fewer than 16 channels do not pay for the transforms";
  return nullptr;
}

void wgrad_winograd(const WgradArgs& a) {
  a.dtype == DType::f32 ? wgrad_winograd_any<float>(a) : wgrad_winograd_any<bf16>(a);
}

}  // namespace RF_ISA
}  // namespace rf
