// "direct": any convolution as an implicit GEMM, rows = output pixels, depth = (r, s, c), columns = output channels.
// 2*N*P*Q*K*R*S*C/groups flops. A block of pixels is gathered into packed tiles in L2 (zeros where the filter
// leaves the image), then every panel of weights sweeps the block: the gather costs one copy of a vector per K
// multiply-adds of it, 1-5 %, and makes stride, dilation, odd channel counts and bf16 the same case.
// Each output element is one chain of multiply-adds in depth order, whatever the blocks and threads.
#pragma once
#include "conv_algorithms.h"

namespace rf {
namespace RF_ISA {

struct DirectPlan {
  int64_t rows, cols, depth, channels;  // per group
  int64_t chunks, words, panels;        // depth rounded up to whole chunks
};

template <class Word>
RF_INLINE DirectPlan direct_plan(const ConvShape& s) {
  DirectPlan p;
  p.rows = s.N * s.P * s.Q;
  p.cols = s.K / s.groups;
  p.channels = s.C / s.groups;
  p.depth = depth_of(s);
  p.chunks = ceil_div(p.depth, int64_t(kChunk<Word>));
  p.words = p.chunks * kLanes;
  p.panels = ceil_div(p.cols, int64_t(kPanel));
  return p;
}

template <class Word>
size_t direct_packed_bytes(const ConvShape& s) {
  const DirectPlan p = direct_plan<Word>(s);
  return size_t(s.groups * p.panels * p.words * kPanel) * sizeof(Word);
}

// packed: [group][panel][word][kPanel], zeros beyond the depth and the columns.
template <class Word>
void direct_pack(const ConvShape& s, void* packed, const float* w, const float* fold, int threads) {
  using Element = typename WordOf<Word>::Element;
  constexpr int kElements = WordOf<Word>::kElements;
  const DirectPlan p = direct_plan<Word>(s);
  const int64_t panel_elements = p.words * kPanel * kElements;
  parallel(threads, [&](const Team& team) {
    const Range mine = team.share(s.groups * p.panels);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      Element* out = static_cast<Element*>(packed) + i * panel_elements;
      std::memset(out, 0, size_t(panel_elements) * sizeof(Element));
      const int64_t first = i % p.panels * kPanel, cols = smaller(int64_t(kPanel), p.cols - first);
      for (int64_t j = 0; j < cols; ++j) {
        const int64_t k = i / p.panels * p.cols + first + j;
        const float* filter = w + k * p.depth;
        const float factor = fold ? fold[k] : 1.f;
        for (int64_t c = 0; c < p.channels; ++c) {
          for (int64_t t = 0; t < s.R * s.S; ++t) {
            const int64_t d = t * p.channels + c;
            from_float(filter[c * s.R * s.S + t] * factor, out + (d / kElements * kPanel + j) * kElements + d % kElements);
          }
        }
      }
    }
  });
}

// One pixel's elements, appended in depth order to its row of a packed tile.
template <class T, class Word>
class RowWriter {
  using Element = typename WordOf<Word>::Element;
  static constexpr int kWide = kChunk<Word>;

 public:
  RF_INLINE RowWriter(Element* row, int64_t chunk_stride) : at_(row), stride_(chunk_stride) {}

  RF_INLINE void copy(const T* x, int64_t n) {
    while (n > 0) {
      if (used_ == 0 && n >= kWide) {
        copy_chunk(at_, x);
        at_ += stride_;
        x += kWide;
        n -= kWide;
        continue;
      }
      const int step = int(smaller(n, int64_t(kWide - used_)));
      copy_part(at_ + used_, x, step);
      advance(step);
      x += step;
      n -= step;
    }
  }
  RF_INLINE void zeros(int64_t n) {
    while (n > 0) {
      const int step = int(smaller(n, int64_t(kWide - used_)));
      std::memset(at_ + used_, 0, size_t(step) * sizeof(Element));
      advance(step);
      n -= step;
    }
  }
  RF_INLINE void finish() {
    if (used_) zeros(kWide - used_);
  }

 private:
  RF_INLINE void advance(int step) {
    used_ += step;
    if (used_ == kWide) {
      used_ = 0;
      at_ += stride_;
    }
  }
  static RF_INLINE void copy_chunk(float* to, const T* x) { store(to, load(x)); }
  static RF_INLINE void copy_chunk(bf16* to, const T* x) { std::memcpy(to, x, sizeof(bf16) * kWide); }
  static RF_INLINE void copy_part(float* to, const T* x, int n) { store_n(to, load_n(x, n), n); }
  static RF_INLINE void copy_part(bf16* to, const T* x, int n) { std::memcpy(to, x, sizeof(bf16) * size_t(n)); }

  Element* at_;
  int64_t stride_;
  int used_ = 0;
};

// Gathers rows [begin, end) of the implicit matrix for one group into packed tiles.
template <class T, class Word>
void direct_gather(const ConvShape& s, const DirectPlan& p, const T* x, int64_t group, int64_t begin, int64_t end, Word* block) {
  using Element = typename WordOf<Word>::Element;
  const TileRows tiles(end - begin);
  x += group * p.channels;
  int64_t q = begin % s.Q, i = begin / s.Q % s.P, n = begin / s.Q / s.P;
  const bool runs = s.dilation_w == 1 && s.groups == 1;  // the filter's row is one run of memory
  for (int64_t t = 0; t < tiles.tiles; ++t) {
    const int64_t first = tiles.first(t), height = tiles.first(t + 1) - first;
    for (int64_t r = 0; r < height; ++r) {
      RowWriter<T, Word> row(reinterpret_cast<Element*>(block + first * p.words) + r * kChunk<Word>, height * kChunk<Word>);
      const int64_t h0 = i * s.stride_h - s.pad_h, w0 = q * s.stride_w - s.pad_w;
      const T* image = x + n * s.H * s.W * s.C;
      for (int64_t dr = 0; dr < s.R; ++dr) {
        const int64_t h = h0 + dr * s.dilation_h;
        if (h < 0 || h >= s.H) {
          row.zeros(s.S * p.channels);
        } else if (runs) {
          const int64_t left = smaller(larger(-w0, int64_t(0)), s.S);
          const int64_t stop = smaller(larger(s.W - w0, left), s.S);
          row.zeros(left * s.C);
          row.copy(image + (h * s.W + w0 + left) * s.C, (stop - left) * s.C);
          row.zeros((s.S - stop) * s.C);
        } else {
          for (int64_t ds = 0; ds < s.S; ++ds) {
            const int64_t w = w0 + ds * s.dilation_w;
            if (w < 0 || w >= s.W) {
              row.zeros(p.channels);
            } else {
              row.copy(image + (h * s.W + w) * s.C, p.channels);
            }
          }
        }
      }
      row.finish();
      if (++q == s.Q) {
        q = 0;
        if (++i == s.P) i = 0, ++n;
      }
    }
  }
}

// Panels [from, to) of one group over the gathered rows.
template <class T, class Word>
void direct_multiply(const ConvArgs& a, const DirectPlan& p, int64_t group, int64_t begin, int64_t end, int64_t from, int64_t to, const Word* block) {
  const TileRows tiles(end - begin);
  const ConvShape& s = a.shape;
  for (int64_t panel = from; panel < to; ++panel) {
    const Word* weights = static_cast<const Word*>(a.packed) + (group * p.panels + panel) * p.words * kPanel;
    const int64_t k = group * p.cols + panel * kPanel;
    Epilogue<T> e;
    e.scale = a.scale ? a.scale + k : nullptr;
    e.shift = a.shift ? a.shift + k : nullptr;
    e.stride = s.K;
    e.cols = int(smaller(int64_t(kPanel), p.cols - panel * kPanel));
    e.relu = a.relu;
    for (int64_t t = 0; t < tiles.tiles; ++t) {
      const int64_t first = tiles.first(t), height = tiles.first(t + 1) - first;
      const int64_t at = (begin + first) * s.K + k;
      e.y = static_cast<T*>(a.y) + at;
      e.residual = a.residual ? static_cast<const T*>(a.residual) + at : nullptr;
      kConvTiles<Word, T>.at[height](block + first * p.words, weights, p.chunks, e);
    }
  }
}

template <class Word>
RF_INLINE int64_t direct_block_rows(const ConvShape& s, const ConvConfig& c, const DirectPlan& p) {
  if (c.block_rows > 0) return smaller(int64_t(c.block_rows), p.rows);
  const int64_t fit = (256 << 10) / int64_t(sizeof(Word)) / p.words;
  return smaller(larger(fit / kTileRows * kTileRows, int64_t(kTileRows)), p.rows);
}

template <class Word>
size_t direct_scratch_bytes(const ConvShape& s, const ConvConfig& c, int threads) {
  const DirectPlan p = direct_plan<Word>(s);
  const size_t block = odd_lines(size_t(direct_block_rows<Word>(s, c, p) * p.words) * sizeof(Word));
  return c.split_cols && s.groups == 1 ? block : block * size_t(threads);
}

template <class T, class Word>
void direct_run(const ConvArgs& a, const Team& team) {
  const ConvShape& s = a.shape;
  const DirectPlan p = direct_plan<Word>(s);
  const int64_t block_rows = direct_block_rows<Word>(s, a.config, p);
  const int64_t block_panels = a.config.block_cols > 0 ? ceil_div(int64_t(a.config.block_cols), int64_t(kPanel)) : p.panels;
  const T* x = static_cast<const T*>(a.x);
  char* scratch = static_cast<char*>(a.scratch);

  if (a.config.split_cols && s.groups == 1) {
    // The team gathers each block together; every thread then runs its own panels over all of it.
    Word* block = reinterpret_cast<Word*>(scratch);
    const Range mine = team.share(p.panels);
    const int64_t step = Blocks(p.rows, block_rows).step;
    for (int64_t begin = 0; begin < p.rows; begin += step) {
      const int64_t end = smaller(begin + step, p.rows);
      const TileRows tiles(end - begin);
      if (begin > 0) team.sync();
      // A thread's share of whole tiles: TileRows of a sub-range would cut elsewhere, so gather tile by tile.
      const Range part = team.share(tiles.tiles);
      for (int64_t t = part.begin; t < part.end; ++t)
        direct_gather<T, Word>(s, p, x, 0, begin + tiles.first(t), begin + tiles.first(t + 1), block + tiles.first(t) * p.words);
      team.sync();
      direct_multiply<T, Word>(a, p, 0, begin, end, mine.begin, mine.end, block);
    }
    return;
  }

  Word* block = reinterpret_cast<Word*>(scratch + team.rank * odd_lines(size_t(block_rows * p.words) * sizeof(Word)));
  const Range mine = team.share(p.rows, share_grain(p.rows, team.size));
  const int64_t step = Blocks(mine.size(), block_rows).step;
  for (int64_t begin = mine.begin; begin < mine.end; begin += step) {
    const int64_t end = smaller(begin + step, mine.end);
    for (int64_t group = 0; group < s.groups; ++group) {
      direct_gather<T, Word>(s, p, x, group, begin, end, block);
      for (int64_t from = 0; from < p.panels; from += block_panels)
        direct_multiply<T, Word>(a, p, group, begin, end, from, smaller(from + block_panels, p.panels), block);
    }
  }
}

}  // namespace RF_ISA
}  // namespace rf
