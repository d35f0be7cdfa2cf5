// The Winograd convolution around its transforms: packing, blocks of tiles, threads.
// Buffers: V [point][tile][channel] as packed GEMM rows, sums [point][panel][tile][kPanel]; points an odd number of
// cache lines apart. Tiles of several sizes (14 = 4 + 4 + 4 + 2) lie in a block one kind after the other; a point's
// GEMM takes the rows of the kinds that have it. Threads share tiles, or (split_cols) transform one V together and
// share output channels: better where there are few tiles and many weights (7x7).
#pragma once
#include "winograd.h"

namespace rf {
namespace RF_ISA {

template <class H, class W, class Word>
struct WinogradPlan : TileKinds<H, W> {
  static constexpr int kPoints = H::kPoints * W::kPoints;

  int64_t chunks, words, panels;
  int64_t block_tiles, block_panels;
  int64_t v_stride, sum_stride;  // between points, in words and floats
  size_t v_bytes, sum_bytes, zero_bytes;

  WinogradPlan(const ConvShape& s, const ConvConfig& c) : TileKinds<H, W>(s.N, s.P, s.Q) {
    chunks = ceil_div(s.C, int64_t(kChunk<Word>));
    words = chunks * kLanes;
    panels = ceil_div(s.K, int64_t(kPanel));
    block_panels = smaller(panels, ceil_div(int64_t(c.block_cols > 0 ? c.block_cols : 64), int64_t(kPanel)));
    // About 28 tiles, so that V and the sums of 64 channels share L2 with the weights; from 256 channels on the
    // weights come from L3 or memory instead, and more tiles should see them.
    const int64_t usual = (s.C >= 256 ? 56 : 28) / kTileRows * kTileRows;
    block_tiles = smaller(this->tiles, c.block_rows > 0 ? int64_t(c.block_rows) : usual);
    const int64_t most = block_tiles + (this->mixed ? 3 : 0);  // each kind's part is rounded up
    v_stride = int64_t(odd_lines(size_t(most * words) * sizeof(Word)) / sizeof(Word));
    sum_stride = int64_t(odd_lines(size_t(most * block_panels * kPanel) * sizeof(float)) / sizeof(float));
    v_bytes = odd_lines(size_t(v_stride) * kPoints * sizeof(Word));
    sum_bytes = odd_lines(size_t(sum_stride) * kPoints * sizeof(float));
    zero_bytes = odd_lines(size_t(s.C) * sizeof(float) + 64);
  }
  size_t weight_bytes() const { return size_t(kFilters<H, W> * panels * words * kPanel) * sizeof(Word); }
  size_t scratch_bytes(const ConvConfig& c, int threads) const {
    const size_t each = sum_bytes + zero_bytes;
    return c.split_cols ? v_bytes + each * size_t(threads) : (v_bytes + each) * size_t(threads);
  }
};

// G of the rows and of the columns.
template <class H, class W>
struct WinogradFilter {
  double h[H::kPoints][3], w[W::kPoints][3];
  WinogradFilter() {
    line_filter_matrix<H>(h);
    line_filter_matrix<W>(w);
  }
};

// packed: [filter of points][panel][word][kPanel], G g G^T in double, zeros beyond C and K.
template <class H, class W, class Word>
void winograd_pack(const ConvShape& s, void* packed, const float* w, const float* fold, int threads) {
  using Element = typename WordOf<Word>::Element;
  constexpr int kElements = WordOf<Word>::kElements, kH = kFilterPoints<H>, kW = kFilterPoints<W>;
  const WinogradPlan<H, W, Word> p(s, {});
  const WinogradFilter<H, W> g;
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

template <class H, class W, class T, class Word>
class WinogradRun {
  using Plan = WinogradPlan<H, W, Word>;
  using Element = typename WordOf<Word>::Element;
  static constexpr int kPoints = Plan::kPoints;

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
    for (int k = 0; k < 4; ++k) {
      if (p_.count(k) > 0) transforms_[k] = tile_transforms<H, W, T, Element>(p_.kinds[k].h, p_.kinds[k].w);
    }
  }

  void run() {
    const Range all_channels = {0, p_.chunks * kChunk<Word>}, all_panels = {0, p_.panels};
    if (a_.config.split_cols) {
      const Range chunks = team_.share(p_.chunks), panels = team_.share(p_.panels);
      const Share all(p_, Team{}, 0);
      for (int64_t i = 0; i < all.blocks; ++i) {
        const Block block(p_, all, i);
        if (i > 0) team_.sync();
        input(block, {chunks.begin * kChunk<Word>, chunks.end * kChunk<Word>});
        team_.sync();
        output(block, panels);
      }
      return;
    }
    const auto blocks = [&](int owner) { return Share(p_, team_, owner).blocks; };
    team_.each_piece(blocks, [&](int owner, int64_t i) {
      const Block block(p_, Share(p_, team_, owner), i);
      input(block, all_channels);
      output(block, all_panels);
    });
  }

  // All tiles at once (config: split_cols, block_rows >= tiles, block_cols = kPanel); `pack(panel)` makes a panel's
  // filters at `weights`, points `point_words` apart, right before they are multiplied.
  template <class Pack>
  void run_streamed(const Word* weights, int64_t point_words, const Pack& pack) {
    const Range chunks = team_.share(p_.chunks);
    const Block block(p_, Share(p_, Team{}, 0), 0);
    input(block, {chunks.begin * kChunk<Word>, chunks.end * kChunk<Word>});
    team_.sync();
    weights_ = weights;
    point_words_ = point_words;
    team_.each(p_.panels, [&](int64_t panel) {
      first_panel_ = panel;
      pack(panel);
      output(block, {panel, panel + 1});
    });
  }

 private:
  // Part i of n of a range. The kinds at one edge are cut the other way round, so that what does not divide evens out.
  static Range part(Range of, int kind, int64_t i, int64_t n) {
    const int64_t at = kind == 1 || kind == 2 ? n - 1 - i : i;
    return {of.begin + of.size() * at / n, of.begin + of.size() * (at + 1) / n};
  }

  // A thread's tiles of every kind, to be done in `blocks` blocks.
  struct Share {
    Range tiles[4];
    int64_t blocks, step;  // step: tiles of a block where all are of one kind
    Share(const Plan& p, const Team& team, int owner) {
      int64_t total = 0;
      for (int k = 0; k < 4; ++k) {
        const Range all = {0, p.count(k)};
        tiles[k] =
            p.mixed ? part(all, k, owner, team.size) : team.share_of(owner, all.end, share_grain(all.end, team.size));
        total += tiles[k].size();
      }
      step = Blocks(total, p.block_tiles).step;
      blocks = ceil_div(total, p.mixed ? p.block_tiles : step);
    }
  };

  // One block: a section of GEMM rows for every kind of tile, and the points with the sections that have them.
  struct Block {
    struct Section {
      int kind = 0;
      Range tiles = {0, 0};
      int64_t first = 0;  // row of the block
      TileRows rows;
    };
    struct Point {
      int index;
      bool in[4];         // sections
      int64_t row_tiles;  // of these sections
    };
    Section section[4];
    Point point[kPoints];
    int sections = 0, points = 0;
    int64_t tiles = 0;

    Block(const Plan& p, const Share& mine, int64_t i) {
      for (int k = 0; k < 4; ++k) {
        const Range all = mine.tiles[k];
        const int64_t begin = all.begin + i * mine.step;
        const Range here = p.mixed ? part(all, k, i, mine.blocks)
                                   : Range{smaller(begin, all.end), smaller(begin + mine.step, all.end)};
        if (here.size() <= 0) continue;
        Section& made = section[sections++];
        made.kind = k, made.tiles = here, made.first = tiles, made.rows = TileRows(here.size());
        tiles += here.size();
      }
      for (int index = 0; index < kPoints; ++index) {
        Point& made = point[points];
        made = {index, {false, false, false, false}, 0};
        for (int s = 0; s < sections; ++s) {
          made.in[s] = p.has(section[s].kind, index);
          if (made.in[s]) made.row_tiles += section[s].rows.tiles;
        }
        points += made.row_tiles > 0;
      }
    }
  };

  void input(const Block& block, Range channels) {
    if (channels.begin >= channels.end) return;
    for (int i = 0; i < block.sections; ++i) input(block.section[i], channels);
  }

  void input(const typename Block::Section& section, Range channels) {
    const auto& kind = p_.kinds[section.kind];
    const int high = (kind.h - 1) * H::kStride + H::kReach, wide = (kind.w - 1) * W::kStride + W::kReach;
    const TileRows& rows = section.rows;
    const T* x = static_cast<const T*>(a_.x);
    for (int64_t t = 0; t < rows.tiles; ++t) {
      const int64_t first = rows.first(t), height = rows.first(t + 1) - first;
      Element* out = reinterpret_cast<Element*>(v_ + (section.first + first) * p_.words);
      for (int64_t r = 0; r < height; ++r) {
        const auto at = p_.place(section.kind, section.tiles.begin + first + r);
        const T* pixel[H::kIn * W::kIn];
        for (int i = 0; i < high; ++i) {
          const int64_t h = at.p / H::kSpan * H::kStride - s_.pad_h + i;
          for (int j = 0; j < wide; ++j) {
            const int64_t w = at.q / W::kSpan * W::kStride - s_.pad_w + j;
            const bool inside = h >= 0 && h < s_.H && w >= 0 && w < s_.W;
            pixel[i * W::kIn + j] = inside ? x + ((at.n * s_.H + h) * s_.W + w) * s_.C : zeros_;
          }
        }
        transforms_[section.kind].input(pixel, channels, s_.C, kChunk<Word>, out + r * kChunk<Word>,
                                        height * kChunk<Word>, p_.v_stride * WordOf<Word>::kElements);
      }
    }
  }

  void output(const Block& block, Range panels) {
    for (int64_t from = panels.begin; from < panels.end; from += p_.block_panels) {
      const int64_t to = smaller(from + p_.block_panels, panels.end);
      multiply(block, from, to, to < panels.end ? to : panels.begin);
      for (int64_t panel = from; panel < to; ++panel) {
        for (int64_t k = panel * kPanel; k < smaller((panel + 1) * kPanel, s_.K); k += kLanes) {
          const float* sums = sums_ + (panel - from) * block.tiles * kPanel + k % kPanel;
          for (int i = 0; i < block.sections; ++i)
            transform(block.section[i], k, sums + block.section[i].first * kPanel);
        }
      }
    }
  }

  // Panels [from, to) of every point; `after`: the panel whose first point comes next. Fetching what the transforms
  // touch meanwhile (outputs, residual, the next block's input) was tried: no difference.
  void multiply(const Block& block, int64_t from, int64_t to, int64_t after) {
    const int64_t panel_words = p_.words * kPanel;
    const auto weights = [&](int i, int64_t panel) {
      return weights_ + filter_of<H, W>(block.point[i].index) * point_words_ + (panel - first_panel_) * panel_words;
    };
    Ahead ahead;
    for (int i = 0; i < block.points; ++i) {
      const auto& point = block.point[i];
      ahead.weights_step = Ahead::step(panel_words * int64_t(sizeof(Word)), point.row_tiles * p_.words);
      for (int64_t panel = from; panel < to; ++panel) {
        const Word* b = weights(i, panel);
        const Word* next = panel + 1 < to         ? weights(i, panel + 1)
                           : i + 1 < block.points ? weights(i + 1, from)
                                                  : weights(0, after);
        ahead.weights = reinterpret_cast<const char*>(next);
        float* sums = sums_ + point.index * p_.sum_stride + (panel - from) * block.tiles * kPanel;
        for (int s = 0; s < block.sections; ++s) {
          if (!point.in[s]) continue;
          const TileRows& rows = block.section[s].rows;
          for (int64_t t = 0; t < rows.tiles; ++t) {
            const int64_t height = rows.first(t + 1) - rows.first(t), first = block.section[s].first + rows.first(t);
            kSumTiles<Word>.at[height](v_ + point.index * p_.v_stride + first * p_.words, b, p_.chunks,
                                       sums + first * kPanel, ahead);
          }
        }
      }
    }
  }

  void transform(const typename Block::Section& section, int64_t k, const float* sums) {
    const auto& kind = p_.kinds[section.kind];
    OutputTile<T> o;
    o.row_stride = s_.Q * s_.K;
    o.pixel_stride = s_.K;
    o.relu = a_.relu;
    o.cols = int(smaller(s_.K - k, int64_t(kLanes)));
    const Vec scale = a_.scale ? load_n(a_.scale + k, o.cols) : broadcast(1.f);
    const Vec shift = a_.shift ? load_n(a_.shift + k, o.cols) : zero();
    for (int64_t tile = section.tiles.begin; tile < section.tiles.end; ++tile, sums += kPanel) {
      const auto to = p_.place(section.kind, tile);
      const int64_t at = ((to.n * s_.P + to.p) * s_.Q + to.q) * s_.K + k;
      o.y = static_cast<T*>(a_.y) + at;
      o.residual = a_.residual ? static_cast<const T*>(a_.residual) + at : nullptr;
      o.high = int(smaller(s_.P - to.p, int64_t(kind.h * H::kSpan)));
      o.wide = int(smaller(s_.Q - to.q, int64_t(kind.w * W::kSpan)));
      transforms_[section.kind].output(sums, p_.sum_stride, scale, shift, o);
    }
  }

  const ConvArgs& a_;
  const ConvShape& s_;
  const Plan p_;
  const Team& team_;
  TileTransforms<T, Element> transforms_[4];
  T* zeros_;
  Word* v_;
  float* sums_;
  const Word* weights_;  // of first_panel_'s first point
  int64_t point_words_, first_panel_ = 0;
};

}  // namespace RF_ISA
}  // namespace rf
