// The Winograd convolution around its transforms: packing, blocks of tiles, threads.
// Buffers: V [point][tile][channel] as packed GEMM rows, sums [point][panel][tile][kPanel]; points an odd number of
// cache lines apart. Threads share tiles, or (split_cols) transform one V together and share output channels:
// better where there are few tiles and many weights (7x7).
#pragma once
#include "winograd.h"

namespace rf {
namespace RF_ISA {

template <int M, int L, class Word>
struct WinogradPlan {
  static constexpr int kPoints = (M + 2) * (L + 2);
  int64_t tiles_h, tiles_w, tiles, chunks, words, panels;
  int64_t block_tiles, block_panels;
  int64_t v_stride, sum_stride;  // between points, in words and floats
  size_t v_bytes, sum_bytes, zero_bytes;

  WinogradPlan(const ConvShape& s, const ConvConfig& c) {
    tiles_h = ceil_div(s.P, int64_t(M));
    tiles_w = ceil_div(s.Q, int64_t(L));
    tiles = s.N * tiles_h * tiles_w;
    chunks = ceil_div(s.C, int64_t(kChunk<Word>));
    words = chunks * kLanes;
    panels = ceil_div(s.K, int64_t(kPanel));
    block_panels = smaller(panels, ceil_div(int64_t(c.block_cols > 0 ? c.block_cols : 64), int64_t(kPanel)));
    // About 28 tiles, so that V and the sums of 64 channels share L2 with the weights; from 256 channels on the
    // weights come from L3 or memory instead, and more tiles should see them.
    const int64_t usual = (s.C >= 256 ? 56 : 28) / kTileRows * kTileRows;
    block_tiles = smaller(tiles, c.block_rows > 0 ? int64_t(c.block_rows) : usual);
    v_stride = int64_t(odd_lines(size_t(block_tiles * words) * sizeof(Word)) / sizeof(Word));
    sum_stride = int64_t(odd_lines(size_t(block_tiles * block_panels * kPanel) * sizeof(float)) / sizeof(float));
    v_bytes = odd_lines(size_t(v_stride) * kPoints * sizeof(Word));
    sum_bytes = odd_lines(size_t(sum_stride) * kPoints * sizeof(float));
    zero_bytes = odd_lines(size_t(s.C) * sizeof(float) + 64);
  }
  size_t weight_bytes() const { return size_t(kPoints * panels * words * kPanel) * sizeof(Word); }
  size_t scratch_bytes(const ConvConfig& c, int threads) const {
    const size_t each = sum_bytes + zero_bytes;
    return c.split_cols ? v_bytes + each * size_t(threads) : (v_bytes + each) * size_t(threads);
  }
};

// G, from the interpolation points.
template <int M>
inline void winograd_filter_matrix(double (*g)[3]) {
  constexpr int kT = M + 2;
  for (int i = 0; i < kT - 1; ++i) {
    const double at = Points<M>::kAt[i];
    double product = 1;
    for (int j = 0; j < kT - 1; ++j) product *= j == i ? 1 : at - Points<M>::kAt[j];
    g[i][0] = 1 / product, g[i][1] = at / product, g[i][2] = at * at / product;
  }
  g[kT - 1][0] = g[kT - 1][1] = 0;
  g[kT - 1][2] = 1;
}

// G of the rows and of the columns.
template <int M, int L>
struct WinogradFilter {
  double h[M + 2][3], w[L + 2][3];
  WinogradFilter() {
    winograd_filter_matrix<M>(h);
    winograd_filter_matrix<L>(w);
  }
};

// packed: [point][panel][word][kPanel], G g G^T in double, zeros beyond C and K.
template <int M, int L, class Word>
void winograd_pack(const ConvShape& s, void* packed, const float* w, const float* fold, int threads) {
  using Element = typename WordOf<Word>::Element;
  constexpr int kElements = WordOf<Word>::kElements, kH = M + 2, kW = L + 2;
  const WinogradPlan<M, L, Word> p(s, {});
  const WinogradFilter<M, L> g;
  Element* out = static_cast<Element*>(packed);
  parallel(threads, [&](const Team& team) {
    const Range mine = team.share(p.panels);
    for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
      for (int64_t word = 0; word < p.words; ++word) {
        alignas(64) Element line[kH * kW][kPanel * kElements];
        std::memset(line, 0, sizeof(line));
        for (int e = 0; e < kElements; ++e) {
          const int64_t c = word * kElements + e;
          if (c >= s.C) break;
          for (int64_t j = 0; j < kPanel; ++j) {
            const int64_t k = panel * kPanel + j;
            if (k >= s.K) break;
            const float* f = w + (k * s.C + c) * 9;
            const double factor = fold ? fold[k] : 1.0;
            double half[kH][3];
            for (int i = 0; i < kH; ++i)
              for (int x = 0; x < 3; ++x)
                half[i][x] = (g.h[i][0] * f[x] + g.h[i][1] * f[3 + x] + g.h[i][2] * f[6 + x]) * factor;
            for (int i = 0; i < kH; ++i)
              for (int l = 0; l < kW; ++l)
                from_float(float(half[i][0] * g.w[l][0] + half[i][1] * g.w[l][1] + half[i][2] * g.w[l][2]),
                           &line[i * kW + l][j * kElements + e]);
          }
        }
        for (int i = 0; i < kH * kW; ++i)
          std::memcpy(out + (((i * p.panels + panel) * p.words) + word) * kPanel * kElements, line[i], sizeof(line[i]));
      }
    }
  });
}

template <int M, int L, class T, class Word>
class WinogradRun {
  using Plan = WinogradPlan<M, L, Word>;
  using Element = typename WordOf<Word>::Element;
  static constexpr int kH = M + 2, kW = L + 2, kPoints = kH * kW;

 public:
  WinogradRun(const ConvArgs& args, const Team& team)
      : a_(args), s_(args.shape), p_(args.shape, args.config), team_(team) {
    char* scratch = static_cast<char*>(a_.scratch);
    const bool shared = a_.config.split_cols;
    const size_t each = p_.sum_bytes + p_.zero_bytes + (shared ? 0 : p_.v_bytes);
    char* own = scratch + (shared ? p_.v_bytes : 0) + each * size_t(team.rank);
    zeros_ = reinterpret_cast<T*>(own);
    std::memset(own, 0, p_.zero_bytes);
    sums_ = reinterpret_cast<float*>(own + p_.zero_bytes);
    v_ = reinterpret_cast<Word*>(shared ? scratch : own + p_.zero_bytes + p_.sum_bytes);
    weights_ = static_cast<const Word*>(a_.packed);
    point_words_ = p_.panels * p_.words * kPanel;
  }

  void run() {
    const Range all_channels = {0, p_.chunks * kChunk<Word>}, all_panels = {0, p_.panels};
    if (a_.config.split_cols) {
      const Range chunks = team_.share(p_.chunks), panels = team_.share(p_.panels);
      const int64_t step = Blocks(p_.tiles, p_.block_tiles).step;
      for (int64_t begin = 0; begin < p_.tiles; begin += step) {
        const Range block = {begin, smaller(begin + step, p_.tiles)};
        if (begin > 0) team_.sync();
        input(block, {chunks.begin * kChunk<Word>, chunks.end * kChunk<Word>});
        team_.sync();
        output(block, panels);
      }
      return;
    }
    const Range mine = team_.share(p_.tiles, share_grain(p_.tiles, team_.size));
    const int64_t step = Blocks(mine.size(), p_.block_tiles).step;
    for (int64_t begin = mine.begin; begin < mine.end; begin += step) {
      const Range block = {begin, smaller(begin + step, mine.end)};
      input(block, all_channels);
      output(block, all_panels);
    }
  }

  // All tiles at once (config: split_cols, block_rows >= tiles, block_cols = kPanel); `pack(panel)` makes a panel's
  // filters at `weights`, points `point_words` apart, right before they are multiplied.
  template <class Pack>
  void run_streamed(const Word* weights, int64_t point_words, const Pack& pack) {
    const Range chunks = team_.share(p_.chunks), panels = team_.share(p_.panels), block = {0, p_.tiles};
    input(block, {chunks.begin * kChunk<Word>, chunks.end * kChunk<Word>});
    team_.sync();
    weights_ = weights;
    point_words_ = point_words;
    for (first_panel_ = panels.begin; first_panel_ < panels.end; ++first_panel_) {
      pack(first_panel_);
      output(block, {first_panel_, first_panel_ + 1});
    }
  }

 private:
  struct Place {
    int64_t n, h, w;  // image, and the tile's first output
  };
  Place place(int64_t tile) const {
    const int64_t per_image = p_.tiles_h * p_.tiles_w, at = tile % per_image;
    return {tile / per_image, at / p_.tiles_w * M, at % p_.tiles_w * L};
  }

  void input(Range block, Range channels) {
    if (channels.begin >= channels.end) return;
    const TileRows rows(block.size());
    const T* x = static_cast<const T*>(a_.x);
    for (int64_t t = 0; t < rows.tiles; ++t) {
      const int64_t first = rows.first(t), height = rows.first(t + 1) - first;
      Element* out = reinterpret_cast<Element*>(v_ + first * p_.words);
      for (int64_t r = 0; r < height; ++r) {
        const Place at = place(block.begin + first + r);
        const T* pixel[kPoints];
        for (int i = 0; i < kH; ++i) {
          const int64_t h = at.h - s_.pad_h + i;
          for (int j = 0; j < kW; ++j) {
            const int64_t w = at.w - s_.pad_w + j;
            const bool inside = h >= 0 && h < s_.H && w >= 0 && w < s_.W;
            pixel[i * kW + j] = inside ? x + ((at.n * s_.H + h) * s_.W + w) * s_.C : zeros_;
          }
        }
        input_tile<M, L, T, Element>(pixel, channels, s_.C, kChunk<Word>, out + r * kChunk<Word>, height * kChunk<Word>,
                                     p_.v_stride * WordOf<Word>::kElements);
      }
    }
  }

  void output(Range block, Range panels) {
    const int64_t tiles = block.size();
    for (int64_t from = panels.begin; from < panels.end; from += p_.block_panels) {
      const int64_t to = smaller(from + p_.block_panels, panels.end);
      multiply(tiles, from, to, to < panels.end ? to : panels.begin);
      for (int64_t panel = from; panel < to; ++panel) {
        for (int64_t k = panel * kPanel; k < smaller((panel + 1) * kPanel, s_.K); k += kLanes)
          transform(block, k, sums_ + (panel - from) * tiles * kPanel + k % kPanel);
      }
    }
  }

  // Panels [from, to) of every point; `after`: the panel whose first point comes next. Fetching what the transforms
  // touch meanwhile (outputs, residual, the next block's input) was tried: no difference.
  void multiply(int64_t tiles, int64_t from, int64_t to, int64_t after) {
    const TileRows rows(tiles);
    const int64_t panel_words = p_.words * kPanel;
    const auto weights = [&](int64_t point, int64_t panel) {
      return weights_ + point * point_words_ + (panel - first_panel_) * panel_words;
    };
    Ahead ahead;
    ahead.weights_step = Ahead::step(panel_words * int64_t(sizeof(Word)), rows.tiles * p_.words);
    for (int point = 0; point < kPoints; ++point) {
      for (int64_t panel = from; panel < to; ++panel) {
        const Word* b = weights(point, panel);
        const Word* next = panel + 1 < to        ? weights(point, panel + 1)
                           : point + 1 < kPoints ? weights(point + 1, from)
                                                 : weights(0, after);
        ahead.weights = reinterpret_cast<const char*>(next);
        float* sums = sums_ + point * p_.sum_stride + (panel - from) * tiles * kPanel;
        for (int64_t t = 0; t < rows.tiles; ++t) {
          const int64_t first = rows.first(t), height = rows.first(t + 1) - first;
          kSumTiles<Word>.at[height](v_ + point * p_.v_stride + first * p_.words, b, p_.chunks, sums + first * kPanel,
                                     ahead);
        }
      }
    }
  }

  void transform(Range block, int64_t k, const float* sums) {
    OutputTile<T> o;
    o.row_stride = s_.Q * s_.K;
    o.pixel_stride = s_.K;
    o.relu = a_.relu;
    o.cols = int(smaller(s_.K - k, int64_t(kLanes)));
    const Vec scale = a_.scale ? load_n(a_.scale + k, o.cols) : broadcast(1.f);
    const Vec shift = a_.shift ? load_n(a_.shift + k, o.cols) : zero();
    for (int64_t tile = block.begin; tile < block.end; ++tile) {
      const Place to = place(tile);
      const int64_t at = ((to.n * s_.P + to.h) * s_.Q + to.w) * s_.K + k;
      o.y = static_cast<T*>(a_.y) + at;
      o.residual = a_.residual ? static_cast<const T*>(a_.residual) + at : nullptr;
      o.high = int(smaller(s_.P - to.h, int64_t(M)));
      o.wide = int(smaller(s_.Q - to.w, int64_t(L)));
      output_tile<M, L, T>(sums + (tile - block.begin) * kPanel, p_.sum_stride, scale, shift, o);
    }
  }

  const ConvArgs& a_;
  const ConvShape& s_;
  const Plan p_;
  const Team& team_;
  T* zeros_;
  Word* v_;
  float* sums_;
  const Word* weights_;  // of first_panel_'s first point
  int64_t point_words_, first_panel_ = 0;
};

}  // namespace RF_ISA
}  // namespace rf
