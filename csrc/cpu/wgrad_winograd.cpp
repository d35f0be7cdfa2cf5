// The weight gradient of a 3x3 convolution by Winograd's algorithm, the forward's lines (winograd_lines.h) transposed:
// per tile of 4x4 outputs dw += G^T [ (A dy A^T) * (B^T x B) ] G, with 36 products for 144 at stride 1 and 81 at stride
// 2, in float32 whatever the tensors are. G^T is linear, so the products are summed over all tiles first (36 or 81
// GEMMs of K x C, depth = tiles) and transformed once; a tile of fewer outputs joins the sums of the points it has.
// 2*36/16*N*P*Q*K*C flops at stride 1. A block of tiles: the team transforms dy and x together, point by point into
// rows of all filters and of all channels, then the (panel, point) GEMMs run over all of it, each by one thread,
// fetching the next point and the tensors of the next block meanwhile. Sums have one order of blocks: the same bits for
// any team. bf16 tensors are widened: a bf16 F(3x3, 2x2) needs 2.25 times fewer products at twice the rate, so no less
// time, and rounds its transforms; at stride 2, 1.78 times fewer are no gain on wgrad.cpp's pairs.
#include "../conv_backward.h"
#include "../workspace.h"
#include "wgrad_tile.h"
#include "winograd.h"

namespace rf {
namespace RF_ISA {

namespace {

constexpr int64_t kChainTiles = 64;
constexpr int64_t kGrain = 8;              // tiles transformed by one thread
constexpr int64_t kBlockFloats = 1 << 19;  // transformed dy and x of a block: in the caches both threads see

template <class L>
struct Plan : TileKinds<L, L> {
  static constexpr int kPoints = L::kPoints * L::kPoints;
  const ConvShape& s;
  int64_t panels;
  Strips strips;
  int64_t block_tiles, blocks;           // of a block at most
  int64_t dy_row, x_row;                 // floats from tile to tile, and
  int64_t dy_point, x_point, sum_point;  // from point to point: odd lines, or they would share L1 sets

  explicit Plan(const ConvShape& shape) : TileKinds<L, L>(shape.N, shape.P, shape.Q), s(shape), strips(shape.K) {
    panels = ceil_div(s.C, int64_t(kPanel));
    dy_row = odd(s.K);
    x_row = odd(panels * kPanel);
    const int64_t each = kPoints * (dy_row + x_row);
    const int64_t fit = larger(kBlockFloats / each, kChainTiles);
    blocks = ceil_div(this->tiles, fit);
    block_tiles = ceil_div(this->tiles, blocks) + (this->mixed ? 3 : 0);  // each kind's part is rounded up
    dy_point = odd(block_tiles * dy_row);
    x_point = odd(block_tiles * x_row);
    sum_point = odd(strips.count * kTileRows * kPanel);
  }
  static int64_t odd(int64_t floats) { return int64_t(odd_lines(size_t(floats) * 4) / 4); }
  int64_t block_floats() const { return kPoints * (dy_point + x_point); }

  // Tiles of a point in the whole of the tensors: what its GEMMs cost.
  int64_t depth(int point) const {
    int64_t total = 0;
    for (int k = 0; k < 4; ++k) total += this->has(k, point) ? this->count(k) : 0;
    return total;
  }
};

// Part `index` of the tiles. In this order of kinds the tiles that have a point lie together, whichever point it is.
template <class L>
struct Block {
  static constexpr int kOrder[4] = {1, 0, 2, 3};
  Range part[4];     // of a kind's tiles
  int64_t first[5];  // row of the block where it begins
  Range rows[Plan<L>::kPoints];

  Block(const Plan<L>& p, int64_t index) {
    first[0] = 0;
    for (int i = 0; i < 4; ++i) {
      const int64_t count = p.count(kOrder[i]);
      part[i] = {count * index / p.blocks, count * (index + 1) / p.blocks};
      first[i + 1] = first[i] + part[i].size();
    }
    for (int point = 0; point < Plan<L>::kPoints; ++point) {
      Range& r = rows[point] = {0, 0};
      for (int i = 0; i < 4; ++i) {
        if (part[i].size() == 0 || !p.has(kOrder[i], point)) continue;
        r = {r.size() ? r.begin : first[i], first[i + 1]};
      }
    }
  }
  int64_t tiles() const { return first[4]; }
};

// h x w gradients, L::kOut pointers to a row, `n` channels from c, to points `point` floats apart.
template <class L, int h, int w, class T>
__attribute__((noinline)) void gradient_tile(const T* const* at, int64_t c, int n, float* out, int64_t point) {
  Vec d[h][w];
  RF_UNROLL for (int i = 0; i < h; ++i) {
    RF_UNROLL for (int j = 0; j < w; ++j) {
      const T* p = at[i * L::kOut + j] + c;
      d[i][j] = n >= kLanes ? load(p) : load_n(p, n);
    }
  }
  Vec rows[L::kPoints][w];
  RF_UNROLL for (int j = 0; j < w; ++j) {
    line_gradients<L, h>([&](int i) __attribute__((always_inline)) { return d[i][j]; },
                         [&](int i, Vec v) __attribute__((always_inline)) { rows[i][j] = v; });
  }
  RF_UNROLL for (int i = 0; i < L::kPoints; ++i) {
    if (!has_point<L>(h, i)) continue;
    line_gradients<L, w>([&](int j) __attribute__((always_inline)) { return rows[i][j]; },
                         [&](int j, Vec v)
                             __attribute__((always_inline)) { store(out + (i * L::kPoints + j) * point, v); });
  }
}

template <class T>
struct Transforms {
  void (*input)(const T* const*, Range, int64_t, int, float*, int64_t, int64_t) = nullptr;
  void (*gradient)(const T* const*, int64_t, int, float*, int64_t) = nullptr;
};
template <class L, class T>
Transforms<T> transforms_of(int h, int w) {
  Transforms<T> found;
  const auto both = [&](auto rows, auto cols) {
    constexpr int kH = decltype(rows)::value, kW = decltype(cols)::value;
    if (h != kH || w != kW) return;
    found.gradient = gradient_tile<L, kH, kW, T>;
    if constexpr (!std::is_same<T, float>::value) found.input = input_tile<L, kH, L, kW, T, float>;
  };
  const auto each_width = [&](auto rows) {
    both(rows, std::integral_constant<int, L::kOut>());
    if constexpr (L::kTails) both(rows, std::integral_constant<int, 3>()), both(rows, std::integral_constant<int, 2>());
  };
  each_width(std::integral_constant<int, L::kOut>());
  if constexpr (L::kTails) each_width(std::integral_constant<int, 3>()), each_width(std::integral_constant<int, 2>());
  if constexpr (std::is_same<T, float>::value) found.input = tile_transforms<L, L, float, float>(h, w).input;
  return found;
}

template <class L, class T>
class WgradWinograd {
  using Plan = RF_ISA::Plan<L>;
  using Block = RF_ISA::Block<L>;
  static constexpr int kPoints = Plan::kPoints, kOut = L::kOut, kIn = L::kIn;

 public:
  WgradWinograd(const WgradArgs& a, const Plan& p, float* buffer, const float* zeros, const Team& team)
      : a_(a), s_(a.shape), p_(p), team_(team), buffer_(buffer), zeros_(reinterpret_cast<const T*>(zeros)) {
    for (int i = 0; i < 4; ++i) {
      const auto& kind = p.kinds[Block::kOrder[i]];
      if (kind.rows * kind.cols > 0) transforms_[i] = transforms_of<L, T>(kind.h, kind.w);
    }
  }

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
      const Block block(p_, 0);
      transform(block, buffer_);
      team_.sync();
      float* sums = all_sums + team_.rank * sum_floats;
      team_.each(p_.panels, [&](int64_t panel) {
        for (int point = 0; point < kPoints; ++point) {
          Stream ahead[2] = {{buffer_ + (point + 1) % kPoints * p_.dy_point, p_.dy_point * 4,
                              p_.strips.count * block.rows[point].size()},
                             {}},
                 none[2];
          multiply(block, buffer_, panel, point, sums + point * p_.sum_point, true, ahead, none);
        }
        for (int64_t strip = 0; strip < p_.strips.count; ++strip) write(panel, strip, sums);
      });
      return;
    }
    const auto products = [&](int owner) { return products_of(owner).size(); };
    for (int64_t i = 0; i < p_.blocks; ++i) {
      const Block block(p_, i);
      float* at = buffer_ + i % 2 * block_floats;
      transform(block, at);
      team_.sync();  // whoever passes has left the block before: its buffer is free for the next
      const int64_t calls = products(team_.rank) * p_.strips.count;
      Stream tensors[2] = {stream(a_.dy, s_.P * s_.Q * s_.K, i + 1, calls),
                           stream(a_.x, s_.H * s_.W * s_.C, i + 1, calls)};
      Stream ahead[2];
      // Panels within a point: its rows stay in L2 for all of them.
      int known = -1;
      int64_t first = 0;
      team_.each_piece(products, [&](int owner, int64_t piece) {
        if (owner != known) known = owner, first = products_of(owner).begin;
        const int64_t j = first + piece, point = j / p_.panels, panel = j % p_.panels;
        if (panel == 0 && point + 1 < kPoints) {
          const int64_t steps = p_.panels * p_.strips.count * block.rows[point].size();
          ahead[0] = {at + (point + 1) * p_.dy_point, p_.dy_point * 4, steps};
          ahead[1] = {at + kPoints * p_.dy_point + (point + 1) * p_.x_point, p_.x_point * 4, steps};
        }
        multiply(block, at, panel, int(point), all_sums + panel * sum_floats + point * p_.sum_point, i == 0, ahead,
                 tensors);
      });
    }
    team_.sync();
    team_.each(p_.panels * p_.strips.count, [&](int64_t i) {
      write(i / p_.strips.count, i % p_.strips.count, all_sums + i / p_.strips.count * sum_floats);
    });
  }

 private:
  // A thread's (point, panel) GEMMs. Points differ in depth where tiles do.
  Range products_of(int owner) const {
    int64_t total = 0;
    for (int i = 0; i < kPoints; ++i) total += p_.depth(i) * p_.panels;
    const auto cut = [&](int64_t rank) {
      int64_t before = total * rank / team_.size;
      for (int i = 0; i < kPoints; ++i) {
        const int64_t depth = p_.depth(i);
        if (before < depth * p_.panels) return i * p_.panels + before / depth;
        before -= depth * p_.panels;
      }
      return kPoints * p_.panels;
    };
    return {cut(owner), cut(owner + 1)};
  }

  // The pixels of dy and of x under one tile (zeros_: outside, or not of this kind of tile).
  struct Pixels {
    const T *dy[kOut * kOut], *x[kIn * kIn];
  };
  void locate(int kind, int64_t tile, Pixels& at) const {
    const T *x = static_cast<const T*>(a_.x), *dy = static_cast<const T*>(a_.dy);
    const auto place = p_.place(kind, tile);
    const int h = p_.kinds[kind].h, w = p_.kinds[kind].w;
    for (int i = 0; i < kOut; ++i)
      for (int j = 0; j < kOut; ++j)
        at.dy[i * kOut + j] = i < h && j < w && place.p + i < s_.P && place.q + j < s_.Q
                                  ? dy + ((place.n * s_.P + place.p + i) * s_.Q + place.q + j) * s_.K
                                  : zeros_;
    const int high = (h - 1) * L::kStride + L::kReach, wide = (w - 1) * L::kStride + L::kReach;
    for (int i = 0; i < kIn; ++i) {
      const int64_t row = place.p * L::kStride - s_.pad_h + i;
      for (int j = 0; j < kIn; ++j) {
        const int64_t col = place.q * L::kStride - s_.pad_w + j;
        at.x[i * kIn + j] = i < high && j < wide && row >= 0 && row < s_.H && col >= 0 && col < s_.W
                                ? x + ((place.n * s_.H + row) * s_.W + col) * s_.C
                                : zeros_;
      }
    }
  }

  // This thread's part of what a tensor holds for block `block`, about: blocks are cut from all kinds of tiles alike.
  Stream stream(const void* tensor, int64_t image, int64_t block, int64_t steps) const {
    if (block >= p_.blocks) return {};
    const int64_t all = s_.N * image, begin = all * block / p_.blocks;
    const Range part = team_.share(all * (block + 1) / p_.blocks - begin);
    return {static_cast<const T*>(tensor) + begin + part.begin, part.size() * int64_t(sizeof(T)), steps};
  }

  // Lines of the next tile are asked for a vector ahead: its pixels are too many streams for the hardware to follow.
  // The points about to be written are not: 36 or 81 requests a vector cost what they saved (56x56x64: 14.8 ms
  // with, 11.6 without).
  void transform(const Block& block, float* to) {
    team_.each_range(block.tiles(), kGrain, [&](Range tiles) { transform(block, tiles, to); });
  }
  void transform(const Block& block, Range mine, float* to) {
    const int64_t channels = p_.panels * kPanel;
    Pixels places[2];
    const auto section = [&](int64_t row) {
      int i = 0;
      while (row >= block.first[i + 1]) ++i;
      return i;
    };
    const auto find = [&](int64_t row, Pixels& at) {
      const int i = section(row);
      locate(Block::kOrder[i], block.part[i].begin + row - block.first[i], at);
    };
    find(mine.begin, places[mine.begin % 2]);
    for (int64_t t = mine.begin; t < mine.end; ++t) {
      const Pixels& here = places[t % 2];
      Pixels& next = places[(t + 1) % 2];
      find(smaller(t + 1, block.tiles() - 1), next);
      const Transforms<T>& transforms = transforms_[section(t)];
      float* dy = to + t * p_.dy_row;
      for (int64_t k = 0; k < s_.K; k += kLanes) {
        for (const T* pixel : next.dy) __builtin_prefetch(pixel + k);
        transforms.gradient(here.dy, k, int(smaller(s_.K - k, int64_t(kLanes))), dy + k, p_.dy_point);
      }
      float* x = to + kPoints * p_.dy_point + t * p_.x_row;
      for (int64_t c = 0; c < channels; c += kLanes) {
        for (const T* pixel : next.x) __builtin_prefetch(pixel + c);
        transforms.input(here.x, {c, c + kLanes}, s_.C, int(channels), x, 0, p_.x_point);
      }
    }
  }

  void multiply(const Block& block, const float* transformed, int64_t panel, int point, float* sums, bool fresh,
                Stream (&ahead)[2], Stream (&tensors)[2]) {
    const Range rows = block.rows[point];
    if (rows.size() == 0 && fresh) std::memset(sums, 0, size_t(p_.strips.count) * kTileRows * kPanel * sizeof(float));
    if (rows.size() == 0) return;
    const float *dy = transformed + point * p_.dy_point + rows.begin * p_.dy_row,
                *x = transformed + kPoints * p_.dy_point + point * p_.x_point + rows.begin * p_.x_row + panel * kPanel;
    for (int64_t strip = 0; strip < p_.strips.count; ++strip) {
      float* sum = sums + strip * kTileRows * kPanel;
      for (Stream& s : tensors) s.fetch_step();
      kOuterTiles<float>.at[p_.strips.height(strip)]({dy + p_.strips.first(strip), p_.dy_row}, {x, p_.x_row},
                                                     rows.size(), kChainTiles, sum, fresh, ahead);
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
        Vec half[3][L::kPoints];
        RF_UNROLL for (int j = 0; j < L::kPoints; ++j) {
          Vec taps[3];
          line_taps<L>([&](int i)
                           __attribute__((always_inline)) { return load(in + (i * L::kPoints + j) * p_.sum_point); },
                       taps);
          RF_UNROLL for (int i = 0; i < 3; ++i) half[i][j] = taps[i];
        }
        const int cols = int(smaller(s_.C - c0, int64_t(kLanes)));
        for (int r = 0; r < 3; ++r) {
          Vec taps[3];
          line_taps<L>([&](int j) __attribute__((always_inline)) { return half[r][j]; }, taps);
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
  Transforms<T> transforms_[4];  // in Block::kOrder
  float* buffer_;
  const T* zeros_;  // a pixel outside the image
};

template <class L, class T>
void wgrad_winograd_any(const WgradArgs& a) {
  const Plan<L> p(a.shape);
  const int64_t floats = WgradWinograd<L, T>::floats(p, a.threads), pixel = larger(p.panels * kPanel, a.shape.K);
  const Workspace work(size_t(floats + pixel) * 4);
  float *buffer = work.floats(), *zeros = buffer + floats;
  std::memset(zeros, 0, size_t(pixel) * 4);
  parallel(a.threads, [&](const Team& team) { WgradWinograd<L, T>(a, p, buffer, zeros, team).run(); });
}

}  // namespace

const char* wgrad_winograd_why_not(const ConvShape& s, DType t) {
  if (s.R != 3 || s.S != 3) return "Winograd needs a 3x3 filter";
  if (s.stride_h != s.stride_w || s.stride_h > 2) return "Winograd needs stride 1 or 2";
  if (s.stride_h == 2 && t != DType::f32) return "at stride 2 pairs of bfloat16 are as fast as Winograd in float32";
  if (s.dilation_h != 1 || s.dilation_w != 1) return "Winograd needs dilation 1";
  if (s.groups != 1) return "Winograd needs groups 1";
  if (s.C < 16 || s.K < 16) return "fewer than 16 channels do not pay for the transforms";
  return nullptr;
}

void wgrad_winograd(const WgradArgs& a) {
  if (a.shape.stride_h == 2)
    wgrad_winograd_any<LineStrided4, float>(a);
  else
    a.dtype == DType::f32 ? wgrad_winograd_any<Line4, float>(a) : wgrad_winograd_any<Line4, bf16>(a);
}

}  // namespace RF_ISA
}  // namespace rf
